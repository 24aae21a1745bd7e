"""Collectives that know of each other: each has a kind and a number, and ranks that are at different ones learn it."""

from __future__ import annotations

from mpiml.errors import RunError
from mpiml.loop.sums import Sum
from mpiml.team import Team

KINDS = ("backward", "steps", "step", "checkpoints", "save", "restore", "end")
JOINED = "join"
NUMBERS = 1 << 10  # numbers are compared modulo this: small enough for sums of squares to be exact
COLUMNS = 3  # of each rank: 1 if it has not joined, its tag, and the square of that


class Meetings:
    """The meetings of one DataParallel: the sums that its ranks make together, one after the other.

    Attributes:
        sum: what is summed with each meeting; its `numbers` are COLUMNS.
        number: of the last meeting.
        over: whether there are no more: ranks have agreed on that, or have been at different ones.
    """

    sum: Sum

    def __init__(self, team: Team):
        self.team, self.number = team, 0
        self.over = False

    def meet(self, kind: str) -> None:
        """Agree that all ranks are at this kind of meeting; collective. Ranks that have joined come along to a
        "backward".

        Raises RunError, on all ranks alike, if they are at different ones.
        """
        self._meet(kind)

    def answer(self) -> bool:
        """Be at whatever the others are at, as a rank that has joined; collective. Returns whether there are others."""
        return self._meet(JOINED) > 0

    def end(self) -> None:
        """Agree that there are no more meetings; collective."""
        if not self.over:
            self.meet("end")
            self.over = True
            self.sum.close()

    def _meet(self, kind: str) -> int:
        """Returns how many ranks have not joined."""
        self.number += 1
        tag = 0 if kind == JOINED else 1 + KINDS.index(kind) + len(KINDS) * (self.number % NUMBERS)
        with self.team.clock.calling(f"{kind}()"):
            present, tags, squares = map(int, self.sum.meet((int(tag > 0), tag, tag**2)))
        elsewhere = present * squares != tags**2  # else all tags are equal, by Cauchy and Schwarz
        incomplete = 0 < present < self.team.size and kind_of(tags // present) != "backward"
        if elsewhere or incomplete:
            raise self._apart(kind)
        return present

    def _apart(self, kind: str) -> RunError:
        """The error of ranks that are at different meetings; collective."""
        self.over = True
        ranks: dict[tuple[str, int], list[int]] = {}
        for rank, place in enumerate(self.team.allgather((kind, self.number))):
            ranks.setdefault(place, []).append(self.team.launched[rank])
        places = sorted(ranks.items(), key=lambda item: (len(item[1]), item[0][0] != "end"))
        texts = "; ".join(f"{_some(members)} {_at(*place)}" for place, members in places)
        error = RunError(
            f"the ranks of a DataParallel are at different calls: {texts}. All must make the same ones, in the same "
            "order: a rank has left, or has skipped or repeated one; `with net.join():` is for ranks with fewer batches"
        )
        return error.on_all_ranks(places[0][1][0])


def kind_of(tag: int) -> str:
    """The kind that a tag stands for."""
    return KINDS[(tag - 1) % len(KINDS)]


def _some(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" + (f" and {len(ranks) - 1} more" if len(ranks) > 1 else "")


def _at(kind: str, number: int) -> str:
    return {
        "end": f"left after call {number - 1}",
        JOINED: f"joined before call {number}",
        "steps": f"began steps() in call {number}",
    }.get(kind, f"came to {kind}(), call {number}")
