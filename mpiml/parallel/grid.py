"""The grid: all ranks as pipeline stages x replicas."""

from dataclasses import dataclass

from mpi4py import MPI

from mpiml.errors import ConfigError


def check(ranks: int, pipe: int) -> None:
    """Raise ConfigError unless `ranks` divide into pipelines of `pipe` stages."""
    if pipe > ranks or ranks % pipe:
        fits = ", ".join(str(s) for s in range(1, ranks + 1) if ranks % s == 0)
        raise ConfigError(f"{ranks} ranks do not divide into pipelines of {pipe} stages; --pipe {fits} would work")


@dataclass
class Grid:
    """This rank's place, and the communicators along the axes.

    Attributes:
        comm: all ranks, renumbered by (node, rank): a node's replicas are neighbours whatever the launcher did.
        pipe: the stages of this replica, `stage` of `stages`.
        data: the replicas of this stage, `replica` of `replicas`; the inner axis, so that sums stay on a node.
        launched: the rank that the launcher gave each rank of `comm`.
        nodes: the number of this stage's replicas on each node, in order.
    """

    comm: MPI.Intracomm
    pipe: MPI.Intracomm
    data: MPI.Intracomm
    stage: int
    stages: int
    replica: int
    replicas: int
    launched: list[int]
    nodes: list[int]

    def free(self) -> None:
        """Give the communicators back: an MPI library has only some thousands. Collective."""
        for comm in (self.pipe, self.data, self.comm):
            comm.Free()

    def rank_of(self, stage: int, replica: int) -> int:
        """The rank in `comm` at a place of the grid."""
        return stage * self.replicas + replica


def build(comm: MPI.Intracomm, stages: int) -> Grid:
    """Make the grid; collective over `comm`. Call `check` first."""
    node = comm.Split_type(MPI.COMM_TYPE_SHARED, key=comm.rank)
    first_on_node: list[int] = comm.allgather(node.bcast(comm.rank))
    node.Free()
    launched = sorted(range(comm.size), key=lambda rank: (first_on_node[rank], rank))
    ordered = comm.Create(comm.Get_group().Incl(launched))
    cartesian = MPI.Intracomm(ordered).Create_cart([stages, ordered.size // stages])
    ordered.Free()
    stage, replica = cartesian.coords
    pipe, data = cartesian.Sub([True, False]), cartesian.Sub([False, True])
    mine = [first_on_node[rank] for rank in launched[stage * data.size : (stage + 1) * data.size]]
    nodes = [mine.count(first) for first in dict.fromkeys(mine)]
    return Grid(cartesian, pipe, data, stage, stages, replica, data.size, launched, nodes)
