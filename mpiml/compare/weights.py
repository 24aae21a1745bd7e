"""Which checkpoints of two sides are compared: those of the first step that both still have and that are not equal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from mpiml.compare import arrays
from mpiml.compare.arrays import Compared, File
from mpiml.compare.sides import FILE, Side
from mpiml.errors import OutputError, first_few

DIGEST = "weights_sha256"  # in result.json, of the weights after the last step


@dataclass
class Weights:
    """What the checkpoints of two sides have in common.

    Attributes:
        steps: of which both have one.
        compared: the steps of the two that differ, or of the newest that were compared; None if none could be.
        equal: the steps of which both are equal, by their digests; of those after `compared` it is not known.
        differ: how those that were compared differ; None if they are equal.
        by_result: whether the weights after the last step, of which not both have a checkpoint, are equal by
            result.json; None if it does not say.
        problems: what is wrong with checkpoints that could not be compared.
    """

    steps: list[int]
    compared: tuple[int, int] | None = None
    equal: list[int] = field(default_factory=list)
    differ: Compared | None = None
    by_result: bool | None = None
    problems: list[str] = field(default_factory=list)

    @property
    def known(self) -> bool:
        """Whether any weights have been compared."""
        return self.compared is not None or self.by_result is not None

    @property
    def different(self) -> bool:
        """Whether any of them differ."""
        return self.differ is not None or self.by_result is False


def compare(a: Side, b: Side, quick: bool = False) -> Weights:
    """The earliest two checkpoints of one step that are not equal, by their digests; if all are, the newest, which are
    read to verify them, unless it shall be `quick`. Two files are compared whatever their steps are."""
    if a.kind == b.kind == FILE:
        return _two_files(a, b, quick)
    made = Weights(sorted(a.checkpoints.keys() & b.checkpoints.keys()))
    equal: list[tuple[File, File]] = []
    for step in made.steps:
        if not (a.checkpoints[step].exists() and b.checkpoints[step].exists()):
            continue  # a run that goes on has removed it
        try:
            pair = arrays.opened(a.checkpoints[step]), arrays.opened(b.checkpoints[step])
            if differ := arrays.compare(*pair):
                made.differ, made.compared = differ, (step, step)
                break
        except OutputError as error:
            made.problems.append(str(error))
            continue
        equal.append(pair)
    if not made.differ:
        made.compared = _newest_whole(equal, quick, made.problems)
        made.by_result = _by_result(a, b, made.steps)
    made.equal = [pair[0].step for pair in equal]
    return made


def nothing_in_common(a: Side, b: Side) -> str:
    """Why two sides have no checkpoints of one step."""
    return f"no checkpoints of one step: {_steps(a)}, {_steps(b)}"


def _steps(side: Side) -> str:
    steps = first_few(map(str, sorted(side.checkpoints)))
    return f"{side.path} has {f'those of step {steps}' if steps else 'none'}"


def _by_result(a: Side, b: Side, steps: Sequence[int]) -> bool | None:
    """Whether the weights after the last step of both are equal by result.json; None if it does not say, or if there
    are checkpoints of it among those of `steps`."""
    last, digests = a.result.get("step"), [side.result.get(DIGEST) for side in (a, b)]
    if last != b.result.get("step") or last in steps or not all(digests):
        return None
    return bool(digests[0] == digests[1])


def _two_files(a: Side, b: Side, quick: bool) -> Weights:
    """Two checkpoints that were named. Raises OutputError if one is damaged."""
    (step, path), (other_step, other) = *a.checkpoints.items(), *b.checkpoints.items()
    pair = arrays.opened(path), arrays.opened(other)
    for file in () if quick else pair:
        file.verify()
    return Weights([step] if step == other_step else [], (step, other_step), differ=arrays.compare(*pair))


def _newest_whole(equal: list[tuple[File, File]], quick: bool, problems: list[str]) -> tuple[int, int] | None:
    """The step of the newest of pairs that is not damaged; takes those that are from them, and notes the `problems`."""
    while equal:
        damaged = list[str]()
        for file in () if quick else equal[-1]:
            try:
                file.verify()
            except OutputError as error:
                damaged.append(str(error))
        if not damaged:
            return equal[-1][0].step, equal[-1][1].step
        problems += damaged
        equal.pop()
    return None
