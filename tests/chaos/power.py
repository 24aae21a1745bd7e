"""Crashes and power failures: every state in which one may leave a run directory, and --resume in each of them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from tests.chaos.campaign import Case, Verdict
from tests.chaos.disk import Disk, Tree, build, recorded
from tests.chaos.jobs import Job
from tests.chaos.runs import (
    COMMON,
    LIMIT,
    STEP,
    Lab,
    Reference,
    records_differ,
    result,
    resumed,
    strange,
    weights_differ,
)

SETTINGS = f"{COMMON} --hidden 4 --dropout 0.1 --eval-every 3 --keep 2 --keep-best 1 --steps 8"
START = re.compile(r"after step (\d+)")
WORD = re.compile(r"^warning: .*metrics\.jsonl", re.MULTILINE)


@dataclass(frozen=True)
class State:
    """A directory as a crash may leave it: what kind of crash, after which call, and the newest checkpoint in it."""

    kind: str
    after: str
    tree: Tree
    checkpoint: int

    @property
    def key(self) -> object:
        """The same for states that are the same to whoever resumes."""
        return frozenset(self.tree.items())


def cases(lab: Lab, rng: Random) -> Iterator[Case]:
    """All states, each once."""
    reference = lab.reference(SETTINGS)
    calls = record(lab.path / "recorded", reference)
    first: dict[object, State] = {}
    for state in crashes(calls):
        first.setdefault(state.key, state)
    states = list(first.values())
    rng.shuffle(states)
    for state in states:
        yield Case(f"{state.kind} {state.after}", lambda path, state=state: trial(path, reference, state))


def record(path: Path, reference: Reference) -> list[dict]:
    """The calls of a run on its directory, of two ranks, which write checkpoints together while they train."""
    run, log = path / "run", path / "calls"
    path.mkdir()
    more = {"CHAOS_DIRECTORY": str(run), "CHAOS_RECORD": str(log), "CHAOS_RANK": "all"}
    with Job(2, *reference.arguments, "--pipe", 2, "--out", run, module="tests.chaos.shim", **more) as job:
        ended = job.wait(LIMIT)
    assert ended.code == 0, f"a run that is recorded fails: {ended.text}"
    calls = recorded(log)
    assert replayed(calls) == on_disk(run), "not all that was written was recorded"
    return calls


def replayed(calls: list[dict]) -> Tree:
    """The directory that a run has left, from its calls."""
    disk = Disk()
    for call in calls:
        disk.follow(call)
    return disk.now()


def on_disk(run: Path) -> Tree:
    """The directory that a run has left."""
    return {".": None} | {str(p.relative_to(run)): None if p.is_dir() else p.read_bytes() for p in run.rglob("*")}


def crashes(calls: list[dict]) -> Iterator[State]:
    """The states of all kinds after each call."""
    whole = {path: content for path, content in _ever(calls).items() if STEP.search(path)}
    disk, after = Disk(), "before the first call"
    for call in [{"kind": "nothing", "path": "."}, *calls]:
        trees = [("killed within a write", iter(list(disk.within(call))))]
        disk.follow(call)
        if call["kind"] != "nothing":
            after = f"after call {call['call']}, {call['kind']} {call['path']}"
        trees += [
            ("killed after each call", iter([disk.now()])),
            ("power failure, journalling file system", disk.after_power_failure(journal=True)),
            ("power failure, names in any order", disk.after_power_failure(journal=False)),
        ]
        for kind, of_kind in trees:
            for tree in of_kind:
                steps = [int(STEP.search(path)[1]) for path, content in whole.items() if tree.get(path) == content]
                yield State(kind, after, tree, max(steps, default=0))


def _ever(calls: list[dict]) -> Tree:
    """The last content of every name there ever was."""
    disk, ever = Disk(), {}
    for call in calls:
        disk.follow(call)
        ever |= disk.now()
    return ever


def trial(path: Path, reference: Reference, state: State) -> Iterator[Verdict]:
    """Resume in a state."""
    run = path / "run"
    build(state.tree, run)
    before = result(run)
    ended = resumed(run, reference, 0, "--pipe", 1)
    why = weights_differ(run, ended, reference)
    start = next((int(match[1]) for match in START.finditer(ended.text)), 0)
    if not why and start < state.checkpoint:
        why = f"went on after step {start}, though there is a whole checkpoint of step {state.checkpoint}"
    yield f"{state.kind}: weights right, no checkpoint lost", why
    if not why:
        why = "" if WORD.search(ended.text) else records_differ(run, reference)
        yield f"{state.kind}: metrics and result right, or a word", why and f"{why}; result.json said {before}"
        yield "crashes and power failures: no half file is left after --resume", strange(run, reference)
