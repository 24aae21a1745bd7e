"""The ways a run can end other than well, each with the exit code that a job script sees."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

E = TypeVar("E", bound="RunError")


class RunError(Exception):
    """A run cannot start or go on. Its message is one line that says what to do.

    Attributes:
        exit_code: what the process returns.
        rank: whose fault it is, where one rank is to blame.
        everywhere: whether every rank raises this error now, so that none is left waiting.
        silent: whether another process tells of it: one that is not of this job, but was to be.
    """

    exit_code = 70

    def __init__(self, message: str):
        super().__init__(message)
        self.rank: int | None = None
        self.everywhere = False
        self.silent = False

    def on_all_ranks(self: E, rank: int | None = None) -> E:
        """This error, which every rank raises now; `rank` is whose fault it is."""
        self.rank, self.everywhere = rank, True
        return self


class StallError(RunError):
    """A rank makes no progress, or is gone; or all wait, or their launcher is gone, and `rank` is None."""


class DataError(RunError, ValueError):
    """The data set cannot be used as it is."""

    exit_code = 65


class NotFiniteError(RunError, ArithmeticError):
    """A loss or a gradient is infinite or not a number."""

    exit_code = 70


class DirectoryError(RunError):
    """The run directory belongs to another run."""

    exit_code = 73


class OutputError(RunError):
    """Something in the run directory cannot be written or read."""

    exit_code = 74


class ConfigError(RunError, ValueError):
    """A setting, or the way the job was launched, does not work."""

    exit_code = 78


def known_to_all(error: BaseException | None, ranks: int) -> bool:
    """Whether all ranks leave a block by the same error, or by none: then they can leave it in step."""
    return error is None or ranks == 1 or getattr(error, "everywhere", False)


class Freed(Protocol):
    """What holds communicators or the like."""

    def free(self) -> None: ...


F = TypeVar("F", bound=Freed)


@contextmanager
def freed(thing: F, ranks: int) -> Iterator[F]:
    """Free at the end of a block what all of so many ranks have to free together: not if one of them has failed alone,
    for then the others do not come."""
    try:
        yield thing
    except BaseException as error:
        if known_to_all(error, ranks):
            thing.free()
        raise
    thing.free()


SAVED = 75  # not an error: the state is saved, and the same command with --resume goes on
