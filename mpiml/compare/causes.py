"""What explains that two runs differ: settings, data, processor and libraries, the most likely cause first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from mpiml.compare.sides import FILE, Side
from mpiml.config import OF_THE_JOB, settings
from mpiml.data import fingerprint
from mpiml.errors import first_few
from mpiml.flags import flag, text
from mpiml.run import environment
from mpiml.usercode import is_name

# Settings that a resumed run may change, but with which another run is another one.
FROM_THE_START = ("init", "init_partial", "init_names", "workers")
OF_DECAY = ("decay_steps", "lr_floor")  # they do nothing where the learning rate does not fall
MICROBATCHES, ALLREDUCE = "--microbatches", "--allreduce"
BITS = ("processor", "device", "BLAS", "NumPy", "mpiml")  # of the environment, what bits depend on most
NOTHING = "nothing that is known of them explains it: look for memory errors, a faulty node"


@dataclass(frozen=True)
class Difference:
    """Something that differs: a setting, by its flag, or a fact; and its text in A and in B."""

    what: str
    a: str
    b: str

    def __str__(self) -> str:
        return f"{self.what} {self.a} in A, {self.b} in B"


@dataclass
class Causes:
    """What differs between two sides beside their results.

    Attributes:
        arithmetic: settings that change results; others: those that do not.
        environment: processor, libraries and versions; layout: ranks, stages, hosts.
        data: how the data differ, in words; None if they do not, or if it is not known.
        unknown: what is not known of one of them.
        likely: what explains another result, the most likely first.
    """

    arithmetic: list[Difference] = field(default_factory=list)
    others: list[Difference] = field(default_factory=list)
    environment: list[Difference] = field(default_factory=list)
    layout: list[Difference] = field(default_factory=list)
    data: str | None = None
    unknown: list[str] = field(default_factory=list)
    likely: list[str] = field(default_factory=list)


def explain(a: Side, b: Side) -> Causes:
    """What differs between two sides, and what of it explains other results."""
    made = Causes(unknown=list(_unknown(a, b)))
    here, there = _data(a), _data(b)
    if a.settings and b.settings:
        for name, setting in _settings(a.settings, b.settings):
            changes = _changes_results(name, a.settings, b.settings) or (name == "data" and not (here and there))
            (made.arithmetic if changes else made.others).append(setting)
    made.environment = list(_differing(_environment(a), _environment(b)))
    made.layout = list(_differing(_layout(a), _layout(b)))
    if here and there:
        made.data = fingerprint.difference(here, there, "in B", "in A")
    made.likely = list(_likely(made, a, b)) or [_nothing(a, b, made)]
    return made


def _likely(causes: Causes, a: Side, b: Side) -> Iterator[str]:
    """What explains other results, the most likely first."""
    parts = [s for s in causes.arithmetic if s.what in (MICROBATCHES, "--leaf")]
    rest = [s for s in causes.arithmetic if s not in parts]
    if parts:
        yield f"other micro-batches: {_joined(parts)}; equal bits need equal ones"
    if "mpi" in (a.settings.get("allreduce"), b.settings.get("allreduce")) and causes.layout:
        yield (
            f"{ALLREDUCE} mpi with another layout: {_joined(causes.layout)}; MPI_Allreduce adds in an order of its own"
        )
    if rest:
        yield f"other settings: {_joined(rest)}"
    if causes.data:
        yield f"other data: {causes.data}"
    if bits := [s for s in causes.environment if s.what in BITS]:
        yield f"another {' and '.join(s.what for s in bits)}: {_joined(bits)}"
    steps = [next(iter(side.checkpoints)) for side in (a, b) if side.kind == FILE]
    if len(steps) == 2 and steps[0] != steps[1]:
        yield f"other steps: {steps[0]} in A, {steps[1]} in B"
    if a.settings.get("allreduce") == b.settings.get("allreduce") == "mpi" and not causes.layout:
        yield f"{ALLREDUCE} mpi: two runs on the same ranks may differ, if the MPI library adds in another order"


def _nothing(a: Side, b: Side, causes: Causes) -> str:
    """Where to look if nothing explains them."""
    hosts = ", ".join(f"{side.name} ran on {first_few(found)}" for side in (a, b) if (found := _hosts(side)))
    code = sorted({str(value) for side in (a, b) for value in side.settings.values() if _is_code(value)})
    own = f", or code of your own ({first_few(code)}) that has changed or is not deterministic" if code else " or disk"
    lacking = f" ({'; '.join(causes.unknown)})" if causes.unknown else ""
    return f"{NOTHING}{own}{lacking}" + (f"; {hosts}" if hosts else "")


def _is_code(value: Any) -> bool:
    return isinstance(value, str) and is_name(value)


def _joined(differing: list[Difference]) -> str:
    return "; ".join(map(str, differing))


def _unknown(a: Side, b: Side) -> Iterator[str]:
    for side in (a, b):
        what = [name for name in ("settings", "environment") if not getattr(side, name)]
        if what:
            yield f"{' and '.join(what)} of {side} are not known"


def _settings(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[tuple[str, Difference]]:
    """The settings that differ, by the names of config's fields. What one version of mpiml does not have is at the
    default of the other."""
    defaults = {field.name.replace("_", "-"): field.default for field in settings()}
    for key in sorted({*a, *b}, key=lambda key: (list(defaults).index(key) if key in defaults else len(defaults), key)):
        name, default = key.replace("-", "_"), defaults.get(key)
        one, other = (_shown(table.get(key, default)) for table in (a, b))
        if one != other and name not in OF_THE_JOB:
            yield name, Difference(flag(key), one, other)


def _shown(value: Any) -> str:
    """A value of a setting as text."""
    if isinstance(value, bool):
        return str(value).lower()
    if value in (None, (), []):
        return "none"
    return text(tuple(value) if isinstance(value, list) else value)


def _changes_results(name: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether another value of a setting changes a run's results: a resumed run may not have it."""
    if name in OF_DECAY:
        return any(table.get("decay", "none") != "none" for table in (a, b))
    if name == "steps":  # a round of workers ends with the last one
        return any(table.get("average-every") for table in (a, b))
    fixed = {field.name: not field.metadata["on_resume"] for field in settings()}
    return fixed.get(name, True) or name in FROM_THE_START


def _data(side: Side) -> fingerprint.Fingerprint | None:
    """The fingerprint of the data, if it is known."""
    data = side.environment.get("data")
    return data if data and all(len(entry) == 2 for entry in data) else None


def _environment(side: Side) -> dict[str, str]:
    """What bits may depend on; of a run that has gone on elsewhere, from the first job to the last."""
    now = environment.essentials(side.environment)
    return {name: "; then ".join([*_earlier(side, name), value]) for name, value in now.items()}


def _earlier(side: Side, name: str) -> Iterator[str]:
    for job in side.environment.get("earlier", ()):
        if name in job:
            yield f"{job[name]} until step {job.get('until')}"


def _layout(side: Side) -> dict[str, str]:
    ranks = len(side.environment.get("ranks", ())) or side.result.get("ranks")
    stages = side.settings.get("pipe")
    numbers = {"ranks": ranks, "stages": stages, "nodes": len(_hosts(side)) or None}
    return {name: str(number) for name, number in numbers.items() if number is not None}


def _hosts(side: Side) -> list[str]:
    return sorted({str(rank["host"]) for rank in side.environment.get("ranks", ()) if "host" in rank})


def _differing(a: Mapping[str, str], b: Mapping[str, str]) -> list[Difference]:
    return [Difference(name, a[name], b[name]) for name in a if name in b and a[name] != b[name]]
