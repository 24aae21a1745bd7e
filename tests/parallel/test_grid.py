"""Tests of the grid: every rank's place, its communicators, and grids that are refused."""

import pytest
from mpi4py import MPI

from mpiml.clock import Clock
from mpiml.parallel import grid as grids
from mpiml.team import Team
from tests.conftest import launch

WORLD = MPI.COMM_WORLD


@pytest.mark.mpi
@pytest.mark.parametrize("pipe", [1, 2, 3, 4, 5, 8, 16])
def test_places_and_communicators(pipe: int) -> None:
    if WORLD.size % pipe:
        return
    grid = grids.build(Team(WORLD, Clock()), pipe)
    assert (grid.stages, grid.replicas) == (pipe, WORLD.size // pipe)
    assert (grid.stage, grid.replica) == divmod(grid.comm.rank, grid.replicas)
    assert grid.rank_of(grid.stage, grid.replica) == grid.comm.rank
    assert (grid.pipe.rank, grid.pipe.size) == (grid.stage, grid.stages)
    assert (grid.data.rank, grid.data.size) == (grid.replica, grid.replicas)
    places = grid.comm.allgather((grid.stage, grid.replica))
    on_pipe, on_data = grid.pipe.allgather((grid.stage, grid.replica)), grid.data.allgather((grid.stage, grid.replica))
    assert len(set(places)) == WORLD.size
    assert on_pipe == [(stage, grid.replica) for stage in range(pipe)]
    assert on_data == [(grid.stage, replica) for replica in range(grid.replicas)]


def nodes(grid: grids.Grid) -> list[int]:
    """How many replicas of this rank's stage each node has."""
    everyone = grid.data.allgather((grid.local.rank, grid.local.size))
    return [size for rank, size in everyone if rank == 0]


@pytest.mark.mpi
def test_ranks_and_nodes_add_up() -> None:
    grid = grids.build(Team(WORLD, Clock()), 1)
    launched = grid.comm.allgather(WORLD.rank)
    assert launched == grid.team.launched
    assert sum(nodes(grid)) == grid.replicas


@pytest.mark.mpi
def test_a_part_of_the_job_has_a_grid_of_its_own() -> None:
    part = WORLD.Split(WORLD.rank % 2, -WORLD.rank)
    grid = grids.build(Team(part, Clock()), part.size)
    launched, stages = grid.comm.allgather(WORLD.rank), grid.pipe.allgather(grid.stage)
    assert launched == grid.team.launched
    assert stages == list(range(part.size))


SHOW = """
from mpi4py import MPI
from mpiml.clock import Clock
from mpiml.parallel import grid
from mpiml.team import Team
from tests.parallel.test_grid import nodes
for pipe in {pipes}:
    made = grid.build(Team(MPI.COMM_WORLD, Clock()), pipe)
    of_ranks = made.comm.gather((made.team.launched, nodes(made)))
    if made.comm.rank == 0:
        print(of_ranks)
"""


@pytest.mark.skipif("MPICH" not in MPI.Get_library_version(), reason="only MPICH can pretend to have several nodes")
@pytest.mark.parametrize(
    ("ranks", "grids"),
    [
        (4, {1: ([0, 2, 1, 3], [2, 2]), 2: ([0, 2, 1, 3], [2])}),
        (5, {1: ([0, 2, 4, 1, 3], [3, 2])}),
        (6, {2: ([0, 2, 4, 1, 3, 5], [3])}),
    ],
)
def test_a_nodes_replicas_are_neighbours(ranks: int, grids: dict[int, tuple[list[int], list[int]]]) -> None:
    """On two nodes that the launcher filled in turn, with each number of stages."""
    done = launch(ranks, "-c", SHOW.format(pipes=list(grids)), limit=30, MPIR_CVAR_ODD_EVEN_CLIQUES="1")
    assert done.stdout.splitlines() == [str([of_rank] * ranks) for of_rank in grids.values()], done.stderr
