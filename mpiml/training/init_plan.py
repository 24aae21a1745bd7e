"""What a run takes of --init: which array of the model which one of the file, seen from the file's header alone."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mpiml.documents import AVERAGE
from mpiml.errors import OutputError, first_few
from mpiml.nn.constants import ARRAY
from mpiml.nn.export import Form
from mpiml.nn.parameters import Shape
from mpiml.run.checkpoint import BESIDE, Header
from mpiml.training.init_names import Entry, Mapped, NameMap
from mpiml.training.place import BuiltModel

Array = NDArray[Any]
FLOATS = ("float16", "bfloat16", "float32", "float64")
MOST = 8  # names in a note


class Wanted(NamedTuple):
    """An array of the model: a parameter, a running average, or a constant, which may stay as the model makes it."""

    dtype: str
    shape: Shape
    averaged: bool = False
    constant: bool = False


class Source(NamedTuple):
    """Where an array of the model comes from: its name in the file, how it gets our axes, the entry of a map that says
    so, if there is one, and what else the file may call it, if the model shares it."""

    name: str
    form: Form
    entry: Entry | None = None
    others: Sequence[str] = ()

    @property
    def transposed(self) -> bool:
        """Whether the file has a matrix the other way round than PyTorch."""
        return self.entry is not None and self.entry.transpose

    @property
    def shape(self) -> Shape:
        """What the file should have."""
        return self.form.torch_shape[::-1] if self.transposed else self.form.torch_shape


@dataclass(frozen=True)
class Plan:
    """What is taken of a file, and what is not.

    Attributes:
        wanted: the model's arrays, by name.
        sources: of those that are taken.
        absent: of those that the file does not have.
        other: of those that are of another kind in the file.
        left: arrays of the file that the model does not have.
    """

    file: Header
    foreign: bool
    wanted: Mapping[str, Wanted]
    sources: Mapping[str, Source]
    absent: Mapping[str, Source]
    other: Mapping[str, Source]
    left: Sequence[str]

    def count(self) -> str:
        """How many of the model's arrays are taken."""
        return f"{len(self.sources)} of {len(self.wanted)} arrays"

    def notes(self) -> list[str]:
        """What a person should know."""
        origin, kinds = self.file.origin, self.file.kinds
        types = {kinds[s.name][0] for n, s in self.sources.items() if kinds[s.name][0] != self.wanted[n].dtype}
        others = [f"{name} ({self._there_and_here(name)})" for name in self.other]
        kept = [name for name in self.wanted if name not in self.sources]
        drawn, made = ([n for n in kept if self.wanted[n].constant is constant] for constant in (False, True))
        return [
            *(f"{text} in {origin}: converted to the model's type" for text in sorted(types & set(FLOATS))),
            *([f"not taken, because of another shape or type: {first_few(others, MOST)}"] if others else []),
            *([f"taken by no array of the model: {first_few(self.left, MOST)}"] if self.left else []),
            *([f"as drawn: {first_few(drawn, MOST)}"] if drawn else []),
            *([f"constants as the model makes them: {first_few(made, MOST)}"] if made else []),
        ]

    def value(self, name: str, array: Array) -> Array:
        """What an array of the model becomes, by its array in the file. Raises OutputError for one that is not finite,
        unless it is a constant, which may be what it is."""
        source, wanted = self.sources[name], self.wanted[name]
        array = source.form.from_torch(array.T if source.transposed else array)
        if np.dtype(wanted.dtype).kind in "iu" and array.dtype.kind == "f":
            array = array.round()
        with np.errstate(over="ignore", invalid="ignore"):
            value = array.astype(wanted.dtype, order="C", copy=False)
        if not (wanted.constant or np.isfinite(value).all()):
            as_type = f" as {wanted.dtype}" if np.isfinite(array).all() else ""
            raise OutputError(f"{self.file.origin}: {source.name} is not finite{as_type}; nothing of it is taken")
        return value

    def check(self, partial: bool, mapped: bool) -> None:
        """Raise OutputError if nothing is taken; or, without --init-partial, if anything is of another kind, missing or
        too much. A checkpoint may lack constants, files may have more of them, and with a map more of everything."""
        origin, ways = self.file.origin, ""
        if any(not self.wanted[name].constant for name in self.sources):
            ways = f"; --init-partial takes what fits, {self.count()}"
        elif partial:
            raise OutputError(f"nothing in {origin} fits the model: it has {self._there()}, the model {self._here()}")
        if partial:
            return
        if self.foreign and not mapped:
            ways += "; --init-names says what is called otherwise"
        for name in self.wanted:
            if name in self.other:
                raise OutputError(f"{origin}: {self.difference(name, self.other[name])}{ways}")
            if name in self.absent and (self.foreign or not self.wanted[name].constant):
                raise OutputError(f"{self.lack(name, self.absent[name])}{ways}")
        if not mapped and (more := [name for name in self.left if not self._idle(name)]):
            raise OutputError(f"{origin} has {min(more)}, which the model does not have: it is of another model{ways}")

    def check_shared(self, source: Source, differing: Sequence[str]) -> None:
        """Raise OutputError if there are `differing` arrays in the file of what the model shares."""
        if differing:
            raise OutputError(
                f"{self.file.origin}: {source.name} and {differing[0]} are not equal, but one array in the model; "
                "--init-names can say which it takes"
            )

    def lack(self, name: str, source: Source) -> str:
        """That the file does not have what an array of the model is to come from."""
        of_ours = f" for the model's {name}" if name != source.name else ""
        there = f"it has {self._there(f'{source.name} {source.shape}')}"
        taken = " that no other takes" if source.name in self.file.kinds else ""
        why = there if source.entry else f"it is of another model{f'; {there}' if self.foreign or of_ours else ''}"
        return f"{self.file.origin} has no {source.name}{taken}{of_ours}: {why}"

    def difference(self, name: str, source: Source) -> str:
        """How an array of the file is of another kind than the model's."""
        (dtype, shape), takes = self.file.kinds[source.name], f"{self.wanted[name].dtype} {source.shape}"
        turned = self.foreign and len(shape) == 2 and shape == source.shape[::-1] and shape != source.shape
        hint = "; --init-names can say transpose = true" if turned and not source.transposed else ""
        if name == source.name and not self.foreign:
            return f"{name} is {dtype} {shape}, the model's {takes}"
        order = " in PyTorch's order" if source.form.torch_shape != source.form.shape else ""
        return f"{source.name} is {dtype} {shape}, {name} of the model takes {takes}{order}{hint}"

    def _there_and_here(self, name: str) -> str:
        """In what an array is other in the file: its shape, or its type."""
        source = self.other[name]
        dtype, shape = self.file.kinds[source.name]
        here = self.wanted[name].dtype if shape == source.shape else source.shape
        return f"{dtype if shape == source.shape else shape} there, {here} here"

    def _idle(self, name: str) -> bool:
        """Whether an array of the file is a constant: a file may have ones that the model does not need."""
        integer = self.foreign and self.file.kinds[name][0].startswith(("int", "uint", "bool"))
        return integer or (self.file.constants or {}).get(name) == ARRAY

    def _there(self, like: str = "") -> str:
        names = [f"{name} {kind[1]}" for name, kind in self.file.kinds.items() if not name.startswith(BESIDE)]
        return first_few(names, like=like) or "no arrays"

    def _here(self) -> str:
        sources = {**self.absent, **self.other, **self.sources}
        return first_few([f"{sources[n].name} {sources[n].shape}" for n in self.wanted if not self.wanted[n].constant])


def plan(model: BuiltModel, file: Header, foreign: bool, names: NameMap | None, partial: bool) -> Plan:
    """What a model takes of a file; `foreign`: it is no checkpoint, so that it has PyTorch's names and axes.

    Raises ConfigError for a map that names what is not there, OutputError as Plan.check.
    """
    wanted = _wanted(model)
    forms = model.forms if foreign else {name: Form.same(array.shape, [name]) for name, array in wanted.items()}
    mapped: Mapping[str, Mapped] = {}
    if names:
        aliases = {name: [name, *(f"layers.{one}" for one in forms[name].names if foreign)] for name in wanted}
        mapped = names.of(aliases, _named(file, foreign))
    sources = _sources(forms, file, foreign, mapped)
    given_away = {source.name for source in mapped.values()}  # by the map, so that no default name takes them

    def outcome(name: str) -> str:
        source = sources[name]
        if source.name not in file.kinds or (not source.entry and source.name in given_away):
            return "absent"
        fits = file.kinds[source.name][1] == source.shape and _becomes(file, source.name, wanted[name], foreign)
        return "taken" if fits else "other"

    outcomes = {name: outcome(name) for name in wanted}
    taken, absent, other = (
        {name: sources[name] for name in wanted if outcomes[name] == one} for one in ("taken", "absent", "other")
    )
    used = {source.name for source in (*taken.values(), *other.values())}
    used |= {one for source in taken.values() for one in source.others}
    left = [name for name in file.kinds if name not in used and (foreign or not name.startswith(BESIDE))]
    result = Plan(file, foreign, wanted, taken, absent, other, left)
    for source in taken.values():
        result.check_shared(source, [one for one in source.others if file.kinds[one][1] != source.shape])
    if names:
        _check_mapped(result, names, partial)
    result.check(partial, names is not None)
    return result


def _sources(forms: Mapping[str, Form], file: Header, foreign: bool, mapped: Mapping[str, Mapped]) -> dict[str, Source]:
    """Where each array of the model comes from: as a map says, or else under the name that the file has for it."""
    default = _names(forms, file) if foreign else {name: [name] for name in forms}
    given_away = {source.name for source in mapped.values()}
    sources: dict[str, Source] = {}
    for name, form in forms.items():
        there = [one for one in default[name] if one in file.kinds and one not in given_away]
        sources[name] = Source((there or default[name])[0], form, None, there[1:])
    return sources | {name: Source(source, forms[name], entry) for name, (source, entry) in mapped.items()}


def _check_mapped(plan: Plan, names: NameMap, partial: bool) -> None:
    """Raise ConfigError if an entry of a map names what the file does not have, or has in another kind; with `partial`,
    a pattern may."""
    for name, source in {**plan.absent, **plan.other, **plan.sources}.items():
        entry = source.entry
        if entry and entry.transpose and len(source.shape) > 2:
            raise names.error(entry, f"{name} has more than two axes, so there is nothing to transpose")
        if entry and name not in plan.sources and (entry.exact or not partial):
            other = name in plan.other
            text = f"{plan.file.origin}: {plan.difference(name, source)}" if other else plan.lack(name, source)
            raise names.error(entry, text)


def _named(file: Header, foreign: bool) -> dict[str, str]:
    """The names that a map may ask a file for, and the array that each means. In a checkpoint with averages of weights,
    those of what is not averaged, such as frozen parameters and running averages, are the arrays themselves."""
    averages = not foreign and any(name.startswith(AVERAGE) for name in file.kinds)
    return {f"{AVERAGE}{name}": name for name in file.kinds if averages} | {name: name for name in file.kinds}


def _wanted(model: BuiltModel) -> dict[str, Wanted]:
    """The model's arrays by name, in its order; constants come last."""
    trained = {
        parameter.first.name: Wanted(layout.dtype.name, parameter.shape, averaged=parameter.momentum is not None)
        for layout in model.layouts
        for parameter in layout.parameters
    }
    constants = model.constants.arrays.items()
    return trained | {name: Wanted(array.dtype.name, array.shape, constant=True) for name, array in constants}


def _becomes(file: Header, name: str, wanted: Wanted, foreign: bool) -> bool:
    """Whether an array of the file can be converted to the type that is wanted: all floating-point types go together,
    PyTorch's counters may be averages, and averages that a checkpoint has of whole numbers are rounded."""
    has = file.kinds[name][0]
    if wanted.dtype in FLOATS:
        return has in FLOATS or (wanted.averaged and has.startswith(("int", "uint")))
    average = not foreign and has in FLOATS and name not in (file.constants or {})
    return has == wanted.dtype or (average and wanted.dtype.startswith(("int", "uint")))


def _names(forms: Mapping[str, Form], file: Header) -> dict[str, list[str]]:
    """What a file of PyTorch calls the model's arrays: as the user's module does, or a Sequential of all layers, with
    or without what all names in the file begin with; the way of which it has most."""
    low, high = (end(file.kinds, default="").split(".")[:-1] for end in (min, max))
    shared = [word for word, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(low, high, strict=False))]
    ways = [
        {ours: [prefix + name for name in (own and form.own_names) or form.names] for ours, form in forms.items()}
        for own in (True, False)
        for prefix in ("", "".join(f"{word}." for word in shared))
    ]
    return max(ways, key=lambda way: sum(not file.kinds.keys().isdisjoint(names) for names in way.values()))
