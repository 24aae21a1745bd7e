"""A comparison as text for a person, and as JSON for a script."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import numpy as np

from mpiml.command import plural, table
from mpiml.compare.arrays import Compared as Arrays
from mpiml.compare.arrays import Element
from mpiml.compare.causes import Causes, Difference
from mpiml.compare.comparison import DIFFERENT, EQUAL, Comparison
from mpiml.compare.lines import Compared as Lines
from mpiml.compare.lines import Numbers
from mpiml.compare.sides import Side
from mpiml.compare.weights import Weights
from mpiml.errors import first_few

VERDICTS = {EQUAL: "equal", DIFFERENT: "different"}
DAMAGED = "equal as far as they can be read"


def screen(made: Comparison) -> str:
    """The comparison in a few lines."""
    lines = [f"{VERDICTS.get(made.exit_code, DAMAGED)}: A is {_side(made.a)}, B is {_side(made.b)}"]
    if made.lines:
        lines += _lines(made.lines)
    lines += _weights(made.weights)
    if made.different:
        likely, *more = made.causes.likely
        lines += [f"likely cause: {likely}", *(f"also: {cause}" for cause in more)]
    lines += _causes(made.causes, made.different)
    lines += [f"note: {note}" for note in made.notes]
    return "\n".join([*lines, *(f"problem: {problem}" for problem in made.problems)])


def as_json(made: Comparison) -> dict[str, Any]:
    """The comparison as an object that JSON can hold."""
    weights, causes = asdict(made.weights), asdict(made.causes)
    del weights["problems"]
    for element in (weights["differ"] or {}).get("first"), (weights["differ"] or {}).get("farthest"):
        if element:
            element |= {"a": element["a"].item(), "b": element["b"].item()}
    lines = asdict(made.lines) if made.lines else None
    if made.lines and made.lines.differs and lines:
        lines["differs"] = dict(zip(("step", "evaluation"), made.lines.differs, strict=True))
        lines["fields"] = [field._asdict() for field in made.lines.fields]
    return {
        "verdict": VERDICTS.get(made.exit_code, "incomplete"),
        "exit_code": made.exit_code,
        "a": str(made.a.path),
        "b": str(made.b.path),
        "metrics": lines,
        "weights": weights,
        "causes": causes,
        "problems": made.problems,
        "notes": made.notes,
    }


def _side(side: Side) -> str:
    step, ranks = side.result.get("step"), len(side.environment.get("ranks", ()))
    about = [*([f"step {step}"] if step is not None else []), *([plural(ranks, "rank")] if ranks else [])]
    return f"{side.path}" + (f" ({', '.join(about)})" if about else "")


def _lines(made: Lines) -> list[str]:
    """What the metrics say."""
    common = f"{plural(made.steps, 'step')} and {plural(made.evaluations, 'evaluation')} that both have logged"
    alone = [f"{count} of {name} alone" for name, count in zip("AB", made.alone, strict=True) if count]
    common += f" ({', '.join(alone)})" if alone else ""
    if not made.differs:
        return [f"metrics: all numbers are equal, of {common}"]
    step, evaluation = made.differs
    until = f"; those before are equal, up to step {made.equal_until}" if made.equal_until is not None else ""
    rows = [["", "A", "B", "ULP", "relative"], *map(_numbers, made.fields)]
    what = f"the evaluation after step {step}" if evaluation else f"step {step}"
    return [f"metrics: {what} is the first to differ, of {common}{until}", *table(rows, "lllrr")]


def _numbers(field: Numbers) -> list[str]:
    relative = "-" if field.relative is None else f"{field.relative:.1e}"
    return [f"  {_name(field.name)}", _number(field.a), _number(field.b), _count(field.ulp), relative]


def _weights(made: Weights) -> list[str]:
    """What the checkpoints say."""
    lines = []
    if made.compared:
        step, other = made.compared
        which = f"step {step}" if step == other else f"step {step} in A and step {other} in B"
        if made.differ:
            until = f"; those of step {made.equal[-1]} are equal" if made.equal else ""
            lines = [f"checkpoints: those of {which} differ in the {made.differ.part}{until}", *_arrays(made.differ)]
        else:
            steps = first_few(map(str, reversed(made.equal)), 3) or which.removeprefix("step ")
            lines = [f"checkpoints: all arrays are equal, in those of step {steps}"]
    if made.by_result is not None:
        are = "equal" if made.by_result else "different"
        lines.append(f"weights after the last step: {are}, by weights_sha256 in result.json")
    return lines


def _arrays(made: Arrays) -> list[str]:
    rows = [["", "element", "type", "A", "B", "ULP"]]
    if made.first:
        rows.append(["  first", *_element(made.first)])
    if made.first and made.farthest and made.farthest.place != made.first.place:
        rows.append(["  farthest", *_element(made.farthest)])
    lines = table(rows, "lllllr") if made.first else []
    if made.arrays:
        what = (
            f"{made.elements:,} of {made.of_elements:,} elements differ, in {made.arrays} of {plural(made.of, 'array')}"
        )
        lines.append(f"  {what}" + (f"; also different: {', '.join(made.also)}" if made.also else ""))
    lines += [
        f"  only {name} has {first_few(map(_name, names))}"
        for name, names in zip("AB", made.alone, strict=True)
        if names
    ]
    kinds = [f"{_name(name)} is {_kind(a)} in A, {_kind(b)} in B" for name, (a, b) in made.kinds.items()]
    return lines + ([f"  {first_few(kinds, 2)}"] if kinds else [])


def _element(element: Element) -> list[str]:
    index = f"[{', '.join(map(str, element.index))}]" if element.index else ""
    values = _number(element.a), _number(element.b)
    return [f"{_name(element.array)}{index}", element.dtype, *values, _count(element.ulp)]


def _name(name: str) -> str:
    """The name of an array, which may be any text."""
    return name if name.isprintable() else ascii(name)


def _kind(kind: tuple[str, tuple[int, ...]]) -> str:
    return f"{kind[0]} {kind[1]}"


def _number(value: Any) -> str:
    """All digits of a number."""
    return "null" if value is None else str(value) if isinstance(value, np.generic) else repr(value)


def _count(ulp: int | None) -> str:
    return "-" if ulp is None else f"{ulp:,}"


def _causes(made: Causes, different: bool) -> list[str]:
    """What differs besides."""
    found = {
        "settings that change results, though these are equal": [] if different else made.arithmetic,
        "settings that do not change results": made.others,
        "layout": made.layout,
        "environment": made.environment,
    }
    return [f"{what}: {_listed(differing)}" for what, differing in found.items() if differing]


def _listed(differing: Iterable[Difference]) -> str:
    return "; ".join(map(str, differing))
