"""The grid: all ranks as pipeline stages x replicas."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from mpi4py import MPI

from mpiml.team import Team, allgather


@dataclass
class Grid:
    """This rank's place, and the communicators along the axes.

    Attributes:
        team: all ranks, renumbered by (node, rank): the replicas of a node are neighbours wherever the launcher has put
            the ranks.
        pipe: the stages of this replica, `stage` of `stages`.
        data: the replicas of this stage, `replica` of `replicas`; the inner axis, so that sums stay on a node.
        node: the ranks of this node; `local`, those of them that are replicas of this stage.
        leaders: the first ranks of all nodes; None on other ranks, and if there is one node only.
        cores: how many cores the ranks of this node may use, all together.
        made: the communicators to free: the others are one of these under another name.
    """

    team: Team
    pipe: MPI.Intracomm
    data: MPI.Intracomm
    stage: int
    stages: int
    replica: int
    replicas: int
    node: MPI.Intracomm
    local: MPI.Intracomm
    leaders: MPI.Intracomm | None
    cores: int
    made: list[MPI.Intracomm]

    @property
    def comm(self) -> MPI.Intracomm:
        """The communicator of all ranks."""
        return self.team.comm

    def free(self) -> None:
        """Give the communicators back: an MPI library has only some thousands. Collective."""
        while self.made:
            self.made.pop(0).Free()

    def divided(self, groups: int) -> Grid:
        """The grid of this rank's group, one of `groups` runs of equally many replicas; collective."""
        comm = MPI.Intracomm(self.comm.Split(self.replica * groups // self.replicas, self.comm.rank))
        grid = build(Team(comm, self.team.clock), self.stages)
        grid.made.append(comm)
        return grid

    def rank_of(self, stage: int, replica: int) -> int:
        """The rank in `comm` at a place of the grid."""
        return stage * self.replicas + replica


def build(team: Team, stages: int) -> Grid:
    """Make a grid of a team's ranks, whose number is a multiple of `stages`; collective."""
    comm = team.comm
    homes = nodes_of_ranks(comm)
    order = by_node(homes)
    ordered = MPI.Intracomm(comm.Create(comm.Get_group().Incl(order)))
    stage, replica = divmod(ordered.rank, ordered.size // stages)
    pipe, data = (MPI.Intracomm(ordered.Split(other)) for other in (replica, stage))
    node, local, leaders, made = ordered, data, None, [pipe, data, ordered]
    if len(set(homes)) > 1:
        node, local = (MPI.Intracomm(among.Split(homes[comm.rank])) for among in (ordered, data))
        first = ordered.Split(0 if node.rank == 0 else MPI.UNDEFINED)
        leaders = None if first == MPI.COMM_NULL else MPI.Intracomm(first)
        made += [comm for comm in (node, local, leaders) if comm]
    return Grid(
        team=Team(ordered, team.clock),
        pipe=pipe,
        data=data,
        stage=stage,
        stages=stages,
        replica=replica,
        replicas=data.size,
        node=node,
        local=local,
        leaders=leaders,
        cores=len(set[int]().union(*allgather(node, os.sched_getaffinity(0)))),
        made=made,
    )


def by_node(homes: Sequence[int]) -> list[int]:
    """The ranks in the order in which they become replicas: those of a node next to each other."""
    return sorted(range(len(homes)), key=lambda rank: (homes[rank], rank))


def nodes_of_ranks(comm: MPI.Intracomm) -> list[int]:
    """For each rank the number of its node, which is the first of the ranks that share memory with it; collective.

    For tests, MPIML_NODES="3,2" makes several nodes of one: of the first 3 ranks that were launched, and of the next 2.
    """
    pretended = os.environ.get("MPIML_NODES")
    if pretended:
        all_homes = [node for node, size in enumerate(pretended.split(",")) for _ in range(int(size))]
        launched = MPI.Group.Translate_ranks(comm.Get_group(), None, MPI.COMM_WORLD.Get_group())
        homes = [all_homes[rank] for rank in launched]
        return [homes.index(home) for home in homes]
    node = comm.Split_type(MPI.COMM_TYPE_SHARED, key=comm.rank)
    (first,) = MPI.Group.Translate_ranks(node.Get_group(), [0], comm.Get_group())
    node.Free()
    return allgather(comm, first)
