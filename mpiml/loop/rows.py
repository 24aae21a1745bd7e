"""Which rows this rank trains on in a step: those that mpiml.train would give it."""

from __future__ import annotations

from mpi4py import MPI

from mpiml.data.order import RowOrder
from mpiml.data.order import Rows as Numbers
from mpiml.errors import ConfigError
from mpiml.parallel import grid
from mpiml.partition import part


class Rows(RowOrder):
    """The rows of each micro-batch of each step; making it is collective.

    Rows 0..count-1 are cut into `microbatches` shards. In an epoch each row is used once, in an order that follows from
    the seed, the epoch and the shard alone: whatever the number of ranks, micro-batch m of a step has the same rows.
    A run that goes on after step s only asks for step s + 1.

    Args:
        count: how many rows there are.
        batch: rows of a step, over all ranks.
        microbatches: of a step, over all ranks (default: one each). The same number gives the same rows on any ranks.
        seed: of the order.
        comm: the ranks that train (default: all).
        shuffle: "rows", "none", or "blocks" of `block_rows` consecutive rows.
        strided: whether shard m is every M-th row from row m on, instead of the m-th of M consecutive parts.

    Attributes:
        own: the micro-batches of this rank, a range.
        steps_per_epoch, rows_per_step: of an epoch; rows of a step on average.

    Raises ConfigError, on all ranks alike, if there are fewer micro-batches than ranks, or fewer rows than these.
    """

    def __init__(
        self,
        count: int,
        batch: int,
        microbatches: int | None = None,
        seed: int = 0,
        comm: MPI.Intracomm | None = None,
        *,
        shuffle: str = "rows",
        block_rows: int = 256,
        strided: bool = False,
    ):
        comm = MPI.COMM_WORLD if comm is None else comm
        microbatches = comm.size if microbatches is None else microbatches
        check_microbatches(microbatches, comm.size)
        if count < microbatches or batch < 1:
            raise ConfigError(f"{count} rows, batch {batch}, {microbatches} micro-batches: each needs one row at least")
        if shuffle not in ("rows", "none", "blocks"):
            raise ConfigError(f"shuffle {shuffle!r}: choose from rows, none, blocks")
        super().__init__(count, microbatches, batch, seed, shuffle, block_rows, strided)
        self.own = block(comm, microbatches)

    def mine(self, step: int) -> list[tuple[int, Numbers]]:
        """This rank's micro-batches of step 1, 2, ..., each with the numbers of its rows; some may be empty."""
        return [(m, self.at(step, m)) for m in self.own]


def check_microbatches(microbatches: int, ranks: int) -> None:
    """Raise ConfigError if there are too few micro-batches for so many ranks."""
    if microbatches < ranks:
        raise ConfigError(f"{microbatches} micro-batches: {ranks} ranks need at least one each")


def block(comm: MPI.Intracomm, microbatches: int) -> range:
    """The micro-batches of this rank; collective. Ranks of a node have neighbouring ones, wherever they are placed."""
    replica = grid.by_node(grid.nodes_of_ranks(comm)).index(comm.rank)
    return range(*part(replica, comm.size, microbatches))
