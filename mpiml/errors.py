"""The errors that end a run, each with the exit code that a job script sees."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

E = TypeVar("E", bound="RunError")


class RunError(Exception):
    """A run cannot start or continue. The message is one line that says what to do.

    Attributes:
        exit_code: of the process.
        rank: the one that caused it, if it was one.
        everywhere: whether every rank raises this error now, so that none is left waiting.
        silent: whether a process of another job, which should have been the same job, reports it.
    """

    exit_code = 70

    def __init__(self, message: str):
        super().__init__(" ".join(line.strip() for line in message.splitlines()))  # other libraries' texts have more
        self.rank: int | None = None
        self.everywhere = False
        self.silent = False

    def on_all_ranks(self: E, rank: int | None = None) -> E:
        """This error, marked as one that every rank raises now; `rank` caused it."""
        self.rank, self.everywhere = rank, True
        return self


class StallError(RunError):
    """A rank makes no progress or has ended. `rank` is None if all wait for each other, or their launcher has ended."""


class DataError(RunError, ValueError):
    """The data set cannot be used as it is."""

    exit_code = 65


class NotFiniteError(RunError, ArithmeticError):
    """A loss, gradient or weight is infinite or not a number."""

    exit_code = 70


class DirectoryError(RunError):
    """The run directory belongs to another run."""

    exit_code = 73


class OutputError(RunError):
    """A file, mostly in the run directory, cannot be written or read."""

    exit_code = 74


class ConfigError(RunError, ValueError):
    """A setting, or the way the job was launched, does not work."""

    exit_code = 78


def first_few(names: Iterable[str], most: int = 4, like: str = "") -> str:
    """The first of some names, or those that are most `like` a text, for a message, and how many more there are."""
    names = list(names)
    if len(names) <= most:
        return ", ".join(names)
    few = names[:most]
    if like:
        import difflib  # only for an error

        few = difflib.get_close_matches(like, names, most, cutoff=0)
    return f"{', '.join(few)} and {len(names) - most} more"


def known_to_all(error: BaseException | None, ranks: int) -> bool:
    """Whether all ranks leave a block by the same error, or without one: then they may still communicate."""
    return error is None or ranks == 1 or getattr(error, "everywhere", False)


class Freed(Protocol):
    """An object that holds communicators or the like."""

    def free(self) -> None: ...


F = TypeVar("F", bound=Freed)


@contextmanager
def freed(thing: F, ranks: int) -> Iterator[F]:
    """At the end of a block free a thing that all `ranks` have to free together; not if one rank fails alone, because
    the others do not come here then."""
    try:
        yield thing
    except BaseException as error:
        if known_to_all(error, ranks):
            thing.free()
        raise
    thing.free()


SAVED = 75  # exit code, not of an error: the state is saved, and the same command with --resume continues the run
