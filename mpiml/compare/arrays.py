"""Two checkpoints: which arrays differ, by their digests, and of these the first element and the farthest."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mpiml.compare import ulp
from mpiml.documents import shown
from mpiml.errors import OutputError
from mpiml.run import verified
from mpiml.run.checkpoint import BEFORE, BESIDE, FORMAT, OF_LOOPS
from mpiml.run.contents import Contents, contents_in
from mpiml.run.digests import Kind
from mpiml.run.step_files import step_in

FORMATS = (FORMAT, BEFORE, OF_LOOPS)
WEIGHTS = "weights"
PARTS = {  # of a checkpoint, by the beginning of arrays' names, in the order in which they are looked at
    "": WEIGHTS,
    "data.": "normalisation of inputs",
    "optimizer.": "optimizer state",
    "ema.": "average of the weights",
    "outer.": "momentum of the outer step",
    "worker.": "workers' models",
    "round.": "account of the round",
}


@dataclass
class File:
    """A checkpoint: its header, and the digest of each array."""

    path: Path
    step: int
    contents: Contents
    digests: Mapping[str, bytes]

    @property
    def kinds(self) -> Mapping[str, Kind]:
        return self.contents.kinds

    def verify(self) -> None:
        """Read all of it. Raises OutputError if it is damaged."""
        verified.read(self.path, lambda name: True, keep=False)


@dataclass
class Element:
    """An element that differs: where it is, both values, and their distance; None if one of them is NaN."""

    array: str
    index: tuple[int, ...]
    dtype: str
    a: Any
    b: Any
    ulp: int | None

    @property
    def place(self) -> tuple[str, tuple[int, ...]]:
        """Where it is."""
        return self.array, self.index


@dataclass
class Compared:
    """How a part of two checkpoints differs.

    Attributes:
        part: one of PARTS; also: the others that differ.
        arrays: how many of both have other elements; of: how many both have with one shape and dtype.
        elements: how many elements differ; of_elements: of all in these `of` arrays.
        first: in the order of the layers; farthest: by ULP.
        alone: names of arrays that only A has, and that only B has.
        kinds: of arrays of both with other shapes or dtypes, that of A and that of B.
    """

    part: str
    also: list[str]
    arrays: int = 0
    of: int = 0
    elements: int = 0
    of_elements: int = 0
    first: Element | None = None
    farthest: Element | None = None
    alone: tuple[list[str], list[str]] = field(default_factory=lambda: ([], []))
    kinds: dict[str, tuple[Kind, Kind]] = field(default_factory=dict)


def checked(path: Path) -> Contents:
    """What a file holds. Raises OutputError unless it is a checkpoint of a format that is known here."""
    contents = contents_in(path)
    known = contents.texts.get("format")
    if known not in FORMATS:
        raise OutputError(f"{path} is no checkpoint that this version of mpiml can read: {_format(known)}")
    return contents


def opened(path: Path) -> File:
    """A checkpoint, of which only the header is read if that has digests of arrays. Raises OutputError if it cannot be
    read, is damaged, or none."""
    contents = checked(path)
    digests = contents.digests
    if digests is None:
        verified.read(path, lambda name: True, keep=False)
        digests = {name: verified.digest(name, verified.one_array(path, contents, name)) for name in contents.kinds}
    return File(path, step_in(contents.texts, path), contents, digests)


def compare(a: File, b: File) -> Compared | None:
    """How the first of their parts that is not equal differs; None if all are equal. One array of each is in memory.

    Raises OutputError if an array that differs is damaged.
    """
    parts = _parts_that_differ(a, b)
    if not parts:
        return None
    made, names = Compared(parts[0], parts[1:]), sorted({*a.kinds, *b.kinds}, key=natural)
    names = [name for name in names if _part(name) == made.part]
    made.alone = [n for n in names if n not in b.kinds], [n for n in names if n not in a.kinds]
    both = [name for name in names if name in a.kinds and name in b.kinds]
    made.kinds = {n: (a.kinds[n], b.kinds[n]) for n in both if a.kinds[n] != b.kinds[n]}
    alike = [name for name in both if name not in made.kinds]
    made.of, made.of_elements = len(alike), sum(int(np.prod(a.kinds[name][1], dtype=object)) for name in alike)
    for name in alike:
        if a.digests[name] != b.digests[name]:
            _count(made, name, *(verified.one_array(file.path, file.contents, name) for file in (a, b)))
    return made


def natural(name: str) -> list[Any]:
    """A key that sorts names with numbers as a reader would: layers.2 before layers.10."""
    texts = re.split(r"([0-9]+)", name)  # every second one is a number
    return [(len(part.lstrip("0")), part.lstrip("0"), part) if at % 2 else part for at, part in enumerate(texts)]


def _parts_that_differ(a: File, b: File) -> list[str]:
    one, other = (_by_part(file.digests) for file in (a, b))
    return [part for part in PARTS.values() if one.get(part) != other.get(part)]


def _by_part(digests: Mapping[str, bytes]) -> dict[str, dict[str, bytes]]:
    """Digests of arrays, by part and name."""
    parts: dict[str, dict[str, bytes]] = {}
    for name, digest in digests.items():
        parts.setdefault(_part(name), {})[name] = digest
    return parts


def _part(name: str) -> str:
    return next((PARTS[beginning] for beginning in BESIDE if name.startswith(beginning)), WEIGHTS)


def _count(made: Compared, name: str, a: verified.Array, b: verified.Array) -> None:
    """Count the elements of an array that differ."""
    if a.dtype.kind == "c":
        a, b = (array[..., None].view(array.real.dtype) for array in (a, b))
    found = ulp.differing(a, b)
    if found.first is None or found.farthest is None:
        return
    made.arrays, made.elements = made.arrays + 1, made.elements + found.elements
    made.first = made.first or _element(name, a, b, found.first)
    farthest = _element(name, a, b, found.farthest)
    if made.farthest is None or _far(farthest) > _far(made.farthest):
        made.farthest = farthest


def _far(element: Element) -> float:
    return float("inf") if element.ulp is None else element.ulp


def _element(name: str, a: verified.Array, b: verified.Array, at: int) -> Element:
    index = tuple(map(int, np.unravel_index(at, a.shape)))
    one, other = a[index], b[index]
    return Element(name, index, a.dtype.name, one, other, ulp.distance(one, other))


def _format(known: str | None) -> str:
    if known is None:
        return "its metadata have no format"
    return f"its format is {shown(known)}, not {_words(FORMATS)}"


def _words(words: Iterable[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} or {last}"
