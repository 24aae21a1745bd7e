"""What a data set asks of a model; no MPI."""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from dataclasses import dataclass, field
from typing import Any

from mpiml import documents
from mpiml.data.dataset import Dataset
from mpiml.data.inputs import Inputs, inputs_of, shapes
from mpiml.errors import OutputError
from mpiml.nn.parameters import Shape
from mpiml.run.checkpoint import Checkpoint

LOWEST = {"shape": 1, "labels": 1, "outputs": 1, "tokens": 0}  # that sizes in a task can be
MOST_AXES = 32  # of a row


@dataclass
class Seen:
    """What rows have shown of what a data set asks of a model.

    Attributes:
        outputs: the number of classes, or of values per label.
        tokens: one more than the highest integer input; 0 if inputs are not integers.
        notes: what a person should know.
        ignore: the label that does not count, if there is one.
        bounds: of each input, where a row has several, the lowest and the highest integer, 0 included.
    """

    outputs: int
    tokens: int
    notes: list[str]
    ignore: int | None = None
    bounds: list[int] = field(default_factory=list)

    @classmethod
    def of_json(cls, value: Any) -> Seen | None:
        """From what a run directory holds of it; None if that is damaged: then the rows are to be looked at again."""
        kinds = typing.get_type_hints(cls)
        if not isinstance(value, dict) or value.keys() != kinds.keys():
            return None
        whole = all(documents.fits(value[name], kind) for name, kind in kinds.items())
        return cls(**value) if whole and value["outputs"] > 0 and value["tokens"] >= 0 else None

    def is_of(self, data: Dataset, classes: int | None, ignore: int | None) -> bool:
        """Whether a look at a data set can have shown that, by what is known without one; `ignore` means no label."""
        outputs, inputs = declared(data, classes).outputs, inputs_of(data.train.x) or ()
        fits = self.outputs == (outputs or self.outputs) and len(self.bounds) == 2 * len(inputs)
        return fits and self.ignore == ignore


def declared(data: Dataset, classes: int | None) -> Seen:
    """What a data set asks of a model as far as is known without a look at it: 0 outputs if only the labels say it."""
    return Seen((classes or data.classes or 0) if data.classification else data.row_labels, 0, [])


@dataclass(frozen=True)
class Task:
    """What a data set asks of a model.

    Attributes:
        shape, labels: of a row of inputs, and of its labels.
        classification: whether labels are classes.
        outputs: how many classes, or values to predict, there are.
        tokens: one more than the highest integer input; 0 if inputs are not integers.
        ignore: the label that means no label, if there is one.
        words: that the classes stand for, if labels were words.
        columns: the names of the inputs, if they have names.
        inputs: what a row is packed from, if it has several inputs.
        bounds: of each of these the lowest and the highest integer, 0 included.
    """

    shape: Shape
    labels: Shape
    classification: bool
    outputs: int
    tokens: int
    ignore: int | None = None
    words: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    inputs: Inputs | None = None
    bounds: tuple[int, ...] = ()

    @classmethod
    def of(cls, data: Dataset, seen: Seen, ignore: int | None = None) -> Task:
        """What a data set asks, by what has been `seen` of it; the label `ignore` means no label."""
        return cls(
            shape=data.train.x.shape,
            labels=data.train.y.shape,
            classification=data.classification,
            outputs=seen.outputs,
            tokens=seen.tokens,
            ignore=ignore,
            words=tuple(data.words),
            columns=tuple(data.names),
            inputs=inputs_of(data.train.x),
            bounds=tuple(seen.bounds),
        )

    @property
    def shapes(self) -> Any:
        """What a function that makes the model gets: the shape of a row, or of each of its inputs."""
        return shapes(self.inputs) if self.inputs else self.shape

    @property
    def vocabulary(self) -> int:
        """How many token ids rows of inputs may hold: where there is a label for each, as many as there are classes."""
        each = self.classification and len(self.labels) == 1 and self.labels == self.shape
        return max(self.tokens, self.outputs if each else 0)

    def to_json(self) -> str:
        """As a checkpoint holds it."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def of_checkpoint(cls, saved: Checkpoint) -> Task:
        """The reverse of `to_json`. Raises OutputError for a checkpoint that holds none, or one that cannot be."""
        origin = f"{saved.origin}: task"
        if not saved.task:
            raise OutputError(f"{saved.origin} does not say what its model takes: go on with the run for one that does")
        kinds = typing.get_type_hints(cls) | {"inputs": list[list[Any]] | None}
        needed = [field.name for field in dataclasses.fields(cls) if field.default is dataclasses.MISSING]
        saved_fields = documents.check_fields(documents.from_json(saved.task, origin), kinds, origin, needed)
        values: dict[str, Any] = {"ignore": -1, "bounds": []} | saved_fields  # where it does not say, -1 was ignored
        if unknown := values.keys() - kinds.keys():
            raise OutputError(f"{origin} has {documents.shown(min(unknown))}, which this version does not know")
        for name, low in LOWEST.items():
            sizes = values[name] if isinstance(values[name], list) else [values[name]]
            if len(sizes) > MOST_AXES or any(size < low for size in sizes):
                raise OutputError(f"{origin} is damaged: {name} is {documents.shown(values[name])}, which cannot be")
        for name, size in (("words", values["outputs"]), ("columns", math.prod(values["shape"]))):
            texts = values.get(name) or []
            if (texts and len(texts) != size) or (name == "words" and len(set(texts)) < len(texts)):
                raise OutputError(f"{origin} is damaged: {name} are not one for each of {size}")
        if values.get("inputs") is not None:
            values["inputs"] = _inputs(values["inputs"], values["shape"], origin)
        if len(values["bounds"]) not in (0, 2 * len(values.get("inputs") or ())):
            raise OutputError(f"{origin} is damaged: bounds {documents.shown(values['bounds'])} are not of its inputs")
        fields: dict[str, Any] = {key: tuple(it) if isinstance(it, list) else it for key, it in values.items()}
        return cls(**fields)


def _inputs(saved: list[Any], shape: list[int], origin: str) -> Inputs:
    """Inputs from JSON. Raises OutputError unless they make a row of `shape`."""
    inputs: Inputs = ()
    for each in saved:
        whole = len(each) == 3 and all(map(documents.fits, each, (str, list[int], str))) and each[2] in tuple("biuf")
        if not whole or len(each[1]) > MOST_AXES or any(size < 1 for size in each[1]):
            raise OutputError(f"{origin} is damaged: inputs hold {documents.shown(each)}, which cannot be")
        inputs += ((each[0], tuple(each[1]), each[2]),)
    names = {name for name, _, _ in inputs}
    if not inputs or ("" in names and names != {""}) or [sum(math.prod(size) for _, size, _ in inputs)] != shape:
        raise OutputError(f"{origin} is damaged: inputs {documents.shown(saved)} do not make rows of {shape}")
    return inputs
