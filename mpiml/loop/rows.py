"""Which rows this rank trains on in a step: those that mpiml.train would give it."""

from __future__ import annotations

from mpi4py import MPI

from mpiml.data.order import SHUFFLES, RowNumbers, RowOrder
from mpiml.errors import ConfigError
from mpiml.loop.checks import check_comm, check_microbatches, check_switch, check_whole
from mpiml.loop.guard import called, clock
from mpiml.parallel import grid
from mpiml.partition import part
from mpiml.team import Team


class Rows(RowOrder):
    """The rows of each micro-batch of each step; making it is collective.

        data = Rows(len(x), batch=64, microbatches=8)
        for step in range(1, 5 * data.steps_per_epoch + 1):
            for m, rows in data.mine(step):
                ... x[rows] ...

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

    Raises ConfigError, on all ranks alike, for numbers that do not work or that ranks give differently, for fewer
    micro-batches than ranks, and for fewer rows than micro-batches.
    """

    @called
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
        team = Team(check_comm(comm), clock())
        microbatches = team.size if microbatches is None else microbatches
        numbers = {"count": count, "batch": batch, "microbatches": microbatches, "block_rows": block_rows}

        def checked() -> list[int]:
            whole = [check_whole(name, number, 1) for name, number in numbers.items()]
            check_microbatches(whole[2], team.size)
            if whole[0] < whole[2]:
                raise ConfigError(f"{count} rows, {microbatches} micro-batches: each needs one row at least")
            if shuffle not in SHUFFLES:
                raise ConfigError(f"shuffle {shuffle!r}: choose from {', '.join(SHUFFLES)}")
            check_switch("strided", strided)
            return [*whole, check_whole("seed", seed, 0)]

        rows, shards, size, seed = (whole := team.together(checked))[0], whole[2], whole[1], whole[4]
        others = {"seed": seed, "shuffle": shuffle, "strided": strided}
        team.check_alike(
            {name: str(value) for name, value in (numbers | others).items()}, "all ranks make the same Rows"
        )
        super().__init__(rows, shards, size, seed, shuffle, whole[3], strided)
        self.own = block(team.comm, shards)

    def mine(self, step: int) -> list[tuple[int, RowNumbers]]:
        """This rank's micro-batches of step 1, 2, ...: (m, int64 array of the numbers of its rows) for each, in their
        order. Where there are fewer rows in a step than micro-batches, some have none. Messages name this step from now
        on. Each rank may ask for any step at any time.

        Raises ConfigError unless `step` is a whole number, 1 or more.
        """
        clock().step = check_whole("step", step, 1)
        return [(m, self.at(step, m)) for m in self.own]


def block(comm: MPI.Intracomm, microbatches: int) -> range:
    """The micro-batches of this rank; collective. Ranks of a node have neighbouring ones, wherever they are placed."""
    replica = grid.by_node(grid.nodes_of_ranks(comm)).index(comm.rank)
    return range(*part(replica, comm.size, microbatches))
