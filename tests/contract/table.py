"""The table of features and layouts: each is trained on one rank once, and must be the same on any layout.

All that is trained on so many ranks is trained in one MPI job, one after the other.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from tests.conftest import Job, launch_all
from tests.contract import features
from tests.contract.on_devices import ON_DEVICES

FEATURES = features.FEATURES | ON_DEVICES
TIMES = {"seconds", "samples_per_second", "time"}
PLACES = {"ranks", "pipe"}  # what result.json says of the layout


@dataclass(frozen=True)
class Layout:
    """A column of the table: ranks, flags that must not matter to the bits, and pretended nodes of so many ranks each.

    Attributes:
        resumed: the layout, if any, on which the run has begun, until its first checkpoint.
        halved: whether nodes must exchange by halving, however few they are.
        devices: variables of the environment: the pretended devices that a rank sees.
    """

    ranks: int
    flags: str = ""
    nodes: str = ""
    resumed: str = ""
    halved: bool = False
    devices: str = ""

    @property
    def words(self) -> str:
        """The layout in a command: environment and flags."""
        nodes = f"MPIML_NODES={self.nodes} " if self.nodes else ""
        halved, resume = "HALVE=1 " if self.halved else "", " --resume" if self.resumed else ""
        return f"{halved}{nodes}{self.devices} {self.flags}{resume}"


def named(*layouts: tuple[int, str, str]) -> dict[str, Layout]:
    """Layouts that are called what they are."""
    return {f"{ranks} {flags} {nodes}".strip(): Layout(ranks, flags, nodes) for ranks, flags, nodes in layouts}


KINDS = {
    "data": Layout(3, "--prefetch 0"),
    "pipe": Layout(2, "--pipe 2 --schedule zb-h1 --prefetch 1"),
    "grid": Layout(4, "--pipe 2 --schedule gpipe --prefetch 4 --balance measured", "2,2"),
    "nodes": Layout(5, "", "3,2"),
    "early": Layout(4, "--bucket 0.0001", "2,2"),  # every matrix in a bucket of its own, which is summed before others
    "stages": Layout(5, "--pipe 5 --cuts 1,4,5,9"),  # for --rates: the first, the third and the last are not trained
    "private": Layout(3, "--memory private"),
    "resumed": Layout(4, "--pipe 2 --prefetch 2", resumed="alone"),
    "halved": Layout(6, "--bucket 0.0001", "2,2,2", halved=True),
    "twelve": Layout(12, "--memory private", resumed="alone", halved=True),  # each a node for itself
}
GRIDS = named(
    (2, "", ""),
    (2, "--pipe 2 --schedule gpipe", ""),
    (4, "--pipe 2", ""),
    (4, "--pipe 4 --schedule zb-h1", ""),
    (6, "--pipe 2 --cuts 1", ""),
    (6, "--pipe 2 --memory shared", ""),
    (6, "--pipe 2 --memory private", ""),
    (8, "", ""),
    (8, "--pipe 4", ""),
    (16, "", ""),
    (16, "--pipe 4", ""),
    (16, "--pipe 4 --schedule gpipe", ""),
)
NODES = named(
    (4, "", "2,2"),
    (6, "", "3,2,1"),
    (8, "", "4,4"),
    (8, "--pipe 2", "2,4,2"),
    (8, "--pipe 4", "5,3"),
    (5, "--memory private", "3,2"),
    (5, "--memory private --bucket 0.0005", "3,2"),
    (6, "--pipe 2 --bucket 0.0005", "3,3"),
    (8, "--bucket 0.0005", "2,2,2,2"),
    (8, "--pipe 4 --schedule zb-h1 --bucket 0.0005", "3,2,3"),
)
FAKE, SHARE = "--device fake", "--device fake --share-devices"
ONE, TWO = "MPIML_FAKE_DEVICES=fake", "MPIML_FAKE_DEVICES=fake,fake"
DEVICES = {
    "owner": Layout(0, FAKE),
    "owners": Layout(3, FAKE),
    "owners-pipe": Layout(2, f"{FAKE} --pipe 2 --schedule zb-h1"),
    "owners-four": Layout(4, f"{FAKE} --pipe 4 --schedule gpipe"),
    "owners-grid": Layout(4, f"{FAKE} --pipe 2 --balance measured --bucket 0.0001", "2,2"),
    "owners-private": Layout(3, f"{FAKE} --memory private", "2,1"),
    "sharers": Layout(3, SHARE, devices=ONE),
    "sharers-pipe": Layout(4, f"{SHARE} --pipe 4", devices=TWO),
    "sharers-nodes": Layout(4, SHARE, "2,2", devices=ONE),
    "unlocked": Layout(3, SHARE, "2,1", devices=f"{ONE} MPIML_FAKE_UNLOCKED=1"),
    "to-sharers": Layout(3, SHARE, devices=TWO, resumed="owner"),
    "to-owners": Layout(2, FAKE, resumed="sharers"),
    "to-grid": Layout(4, f"{FAKE} --pipe 2 --schedule gpipe", "1,3", resumed="owner"),
}
LAYOUTS = {"alone": Layout(0)} | KINDS | GRIDS | NODES | DEVICES


class Table:
    """Runs of features, made when they are first asked for.

    Args:
        path: an empty directory.
        wanted: the layouts and features that will be asked for.
    """

    def __init__(self, path: Path, wanted: Collection[tuple[str, str]]):
        self.path, self.wanted = path, wanted
        self._alone: dict[str, Job] = {}
        self._runs: dict[tuple[str, str], Job] = {}

    def alone(self, name: str) -> Job:
        """The run on one rank, without a launcher; at once with all that will be asked for."""
        if name not in self._alone:
            names = {name, *(other for _, other in self.wanted)} - set(self._alone)
            commands = [(self.path / "alone" / other, self._flags(other, "alone")) for other in sorted(names)]
            self._alone |= {job.run.name: job for job in self._train(0, commands)}
        job = self._alone[name]
        assert job.code == 0, job.err
        return job

    def on(self, layout: str, name: str) -> Job:
        """The run on a layout; at once with all that will be asked for on as many ranks."""
        if layout == "alone":
            return self.alone(name)
        if (layout, name) not in self._runs:
            ranks, left = LAYOUTS[layout].ranks, [p for p in self.wanted if p[0] != "alone" and p not in self._runs]
            wanted = [pair for pair in left if LAYOUTS[pair[0]].ranks == ranks]
            pairs = list(dict.fromkeys([(layout, name), *wanted]))
            commands = [self._command(*pair) for pair in pairs]
            self._runs |= dict(zip(pairs, self._train(ranks, commands), strict=True))
        return self._runs[layout, name]

    def _command(self, layout: str, name: str) -> tuple[Path, str]:
        run = self.path / layout.replace(" ", "") / name
        if LAYOUTS[layout].resumed:
            interrupt(self.on(LAYOUTS[layout].resumed, name).run, run)
        return run, f"{LAYOUTS[layout].words} {self._flags(name)}"

    def here(self, name: str) -> Path:
        """The directory of a feature's data and modules."""
        here = self.path / "features" / name
        if not here.exists():
            here.mkdir(parents=True)
            FEATURES[name].write(here)
        return here

    def _flags(self, name: str, layout: str = "") -> str:
        feature = FEATURES[name]
        data = feature.as_data if layout == "alone" and feature.as_data else feature.data
        return f"{feature.flags} {data}".format(here=self.here(name))

    def _train(self, ranks: int, commands: Sequence[tuple[Path, str]]) -> list[Job]:
        modules = dict.fromkeys(str(self.here(run.name)) for run, _ in commands)
        return launch_all(ranks, commands, PYTHONPATH=":".join(modules))


def interrupt(run: Path, copy: Path) -> None:
    """Copy a run as a job leaves it that is killed some time after its first save."""
    shutil.copytree(run, copy)
    for file in sorted((copy / "checkpoints").iterdir())[1:]:
        file.unlink()
    result = json.loads((copy / "result.json").read_text())
    (copy / "result.json").write_text(json.dumps(result | {"status": "running", "saved": 0}))


def comparable(job: Job) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without times."""
    return [{key: value for key, value in line.items() if key not in TIMES} for line in job.metrics]


def saved(job: Job) -> dict[str, Any]:
    """Everything in the newest checkpoint."""
    return load_file(max((job.run / "checkpoints").glob("step-*.safetensors")))


def assert_same(job: Job, expected: Job) -> None:
    """Same results to the last bit; first the metrics, for they say in which step the runs part."""
    assert job.code == 0, job.err
    assert comparable(job) == comparable(expected)
    results = [{k: v for k, v in one.result.items() if k not in TIMES | PLACES} for one in (job, expected)]
    assert results[0] == results[1]
    checkpoints = [sorted((one.run / "checkpoints").glob("step-*")) for one in (job, expected)]
    assert [path.name for path in checkpoints[0]] == [path.name for path in checkpoints[1]]
    for file, other in zip(*checkpoints, strict=True):
        one, two = load_file(file), load_file(other)
        assert list(one) == list(two)
        assert [name for name in one if one[name].tobytes() != two[name].tobytes()] == [], file.name
