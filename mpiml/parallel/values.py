"""The values of a stage where nothing is trained: one copy on each node, without gradients or optimizer state."""

from mpi4py import MPI
from numpy.typing import DTypeLike

from mpiml.parallel.grid import Grid
from mpiml.parallel.memory import Memory
from mpiml.parallel.slices import Range, cut
from mpiml.team import wait


class Values:
    """What a gradient sum is to those who only read the values (mpiml.parallel.state.Holder); collective to make.

    The first replica holds them, and `publish` hands them to one replica of each node and lets the others look.

    Args:
        memory: of this stage's replicas on this node.
        size, dtype: of the flat vector.
    """

    def __init__(self, grid: Grid, memory: Memory, size: int, dtype: DTypeLike):
        self.memory, self.values = memory, memory.common(size, dtype)
        self.held: list[Range] = [(0, size)] if grid.replica == 0 else []
        self.holders = [(0, 0, size)]
        first = grid.data.Split(0 if memory.rank == 0 else MPI.UNDEFINED)
        self._firsts = None if first == MPI.COMM_NULL else first

    def publish(self) -> None:
        """Give all replicas the values; collective over them."""
        if self._firsts is not None:
            parts = [self.values[start:stop] for start, stop in cut([(0, len(self.values))])]
            wait([self._firsts.Ibcast(part) for part in parts])
        self.memory.barrier()

    def free(self) -> None:
        """Give back what the MPI library holds."""
        if self._firsts is not None:
            self._firsts.Free()
