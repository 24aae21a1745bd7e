"""What the parts refuse, and the line that says why."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import index
from pathlib import Path
from typing import Any

import numpy as np
from mpi4py import MPI

from mpiml.errors import ConfigError, NotFiniteError, RunError, first_few
from mpiml.loop import trees
from mpiml.parallel.memory import MEMORIES


def check_whole(name: str, number: Any, least: int) -> int:
    """A number as an int. Raises ConfigError unless it is a whole one, at least `least`."""
    try:
        if index(number) >= least:
            return index(number)
    except TypeError:
        pass
    raise ConfigError(f"{name} {number!r}: must be a whole number, {least} or more")


def check_switch(name: str, value: Any) -> None:
    """Raise ConfigError unless a setting is True or False: "no" would be taken for True."""
    if not isinstance(value, (bool, np.bool_)):
        raise ConfigError(f"{name} {value!r}: must be True or False")


def check_stall_timeout(value: Any) -> None:
    """Raise ConfigError unless it is a number of seconds."""
    if not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ConfigError(f"stall_timeout {value!r}: must be a number of seconds, 0 or more")


def check_comm(comm: Any, hint: str = "") -> MPI.Intracomm:
    """The ranks that `comm` names, all by default. Raises ConfigError, which ends with the hint, for what is no
    communicator, or without MPI."""
    if not MPI.Is_initialized():
        raise ConfigError(
            "MPI does not run in this process: if a rank has started it as a worker, what only ranks do belongs below "
            'if __name__ == "__main__":'
        )
    if comm is None:
        return MPI.COMM_WORLD
    if not isinstance(comm, MPI.Intracomm) or comm == MPI.COMM_NULL:
        what = "MPI.COMM_NULL" if isinstance(comm, MPI.Comm) else f"a {type(comm).__name__}"
        raise ConfigError(f"comm is {what}: must be a communicator of mpi4py, such as MPI.COMM_WORLD{hint}")
    return comm


@contextmanager
def communicators_for(what: str) -> Iterator[None]:
    """In a block that makes communicators, raise ConfigError if the MPI library has none left."""
    try:
        yield
    except MPI.Exception as error:
        if "communicators" not in error.Get_error_string():
            raise
        raise ConfigError(
            f"{what}: the MPI library has no communicators left: make one and keep it, or close each"
        ) from error


def check_path(name: str, path: Any) -> Path:
    """A setting as a path. Raises ConfigError for what is none."""
    if not isinstance(path, (str, os.PathLike)) or not str(path) or "\0" in str(path):
        raise ConfigError(f"{name} {path!r}: must be a path")
    return Path(path)


def check_microbatches(microbatches: int, ranks: int) -> None:
    """Raise ConfigError if there are too few micro-batches for so many ranks."""
    if microbatches < ranks:
        raise ConfigError(f"microbatches {microbatches}: {ranks} ranks need at least one each")


def kinds_of(
    like: Any, microbatches: Any, memory: str, finite: Any, numbers: Any, ranks: int
) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
    """The dtype and shape of each leaf of `like`, by name. Raises ConfigError for what a Sum refuses."""
    check_microbatches(check_whole("microbatches", microbatches, 1), ranks)
    check_whole("numbers", numbers, 0)
    check_switch("finite", finite)
    if memory not in MEMORIES:
        raise ConfigError(f"memory {memory!r}: choose from {', '.join(MEMORIES)}")
    if like is None:
        raise ConfigError("like is None: must be an array or a number, or lists, tuples and dicts of such")
    named = list(trees.leaves(like))
    kinds = {name: trees.summed(value, name) for name, value in named}
    if not named or len(kinds) < len(named):
        raise ConfigError(f"like: has {len(named)} arrays with {len(kinds)} names; each needs one of its own")
    return kinds


def not_finite(names: Sequence[str], put: Sequence[tuple[int, str, Sequence[str]]], step: int) -> NotFiniteError:
    """The error of sums that are not finite. Of each rank `put` has its number, its micro-batches, and those of the
    `names` where what it has put is not finite; `step` is 0 if unknown."""
    what = f"the sum of {first_few(names)} is not finite" + (f" in step {step}" if step else "")
    for rank, own, there in put:
        if there:
            return NotFiniteError(
                f"{what}: rank {rank} has put such numbers into {first_few(there)}, in {own}"
            ).on_all_ranks(rank)
    return NotFiniteError(f"{what}: all that was put is, but it is too large to be added up").on_all_ranks()


def apart(calls: Sequence[tuple[str, int, int]]) -> RunError:
    """The error of ranks that are at different calls; of each its call, its step, 0 if unknown, and its number."""

    def place(call: str, step: int, rank: int) -> str:
        return f"rank {rank} is at {call}()" + (f" in step {step}" if step else "")

    names = [call for call, _, _ in calls]
    odd = min(calls, key=lambda one: names.count(one[0]))
    other = next(one for one in calls if one[0] != odd[0])
    return RunError(f"{place(*odd)}, but {place(*other)}: all ranks sum the same steps").on_all_ranks(odd[2])


def check_loss(m: int, loss: Any) -> float:
    """The loss of a micro-batch. Raises ConfigError unless it is a number."""
    number = _number(loss)
    if number is None:
        raise ConfigError(f"put(m={m}): loss {loss!r}: must be a number")
    return number


def check_weight(m: int, weight: Any) -> float:
    """The weight of a micro-batch. Raises ConfigError unless it is a finite number, 0 or more."""
    number = _number(weight)
    if number is None or not 0 <= number < math.inf:
        raise ConfigError(f"put(m={m}): weight {weight!r}: must be a number, 0 or more")
    return number


def _number(value: Any) -> float | None:
    """A number, as an array or tensor of one may be, or None: a text is none, even if it looks like one."""
    try:
        return None if isinstance(value, (str, bytes)) else float(value)
    except (TypeError, ValueError):
        return None


def check_numbers(numbers: Any, count: int) -> list[float]:
    """What is added up beside the arrays of a Sum. Raises ConfigError unless these are so many numbers."""
    try:
        given = [float(number) for number in numbers]
    except (TypeError, ValueError):
        given = None
    if given is None or len(given) != count:
        raise ConfigError(f"meet({numbers!r}): must be {count} numbers, as this Sum was made with numbers={count}")
    return given
