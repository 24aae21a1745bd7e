"""Checkpoints with right digests over wrong content; and `python -m tests.chaos.forgery FILE` exports one."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from mpiml.errors import RunError
from mpiml.run.contents import DIGESTS, Contents
from mpiml.run.verified import kinds_of
from tests.forging import digest_of_array

CANARY = "CHAOS_CANARY"  # the file that code writes to which should not have run
MODULE = "tests.chaos.canary"
DEEP = "[" * 100_000
Arrays = dict[str, Any]


def forged(
    content: bytes, metadata: Mapping[str, str | None], arrays: Callable[[Arrays], Arrays] = lambda same: same
) -> bytes:
    """A checkpoint with other metadata and arrays, and the digests that go with them; None takes something away."""
    size = int.from_bytes(content[:8], "little")
    meta = json.loads(content[8 : 8 + size])["__metadata__"] | metadata | {"sha256": None, DIGESTS: None}
    changed = arrays(safetensors.numpy.load(content))
    contents = Contents.of(kinds_of(changed), {name: text for name, text in meta.items() if text is not None})
    header = contents.header({name: digest_of_array(name, array) for name, array in changed.items()})
    return header + b"".join(changed[name].tobytes() for name in contents.starts)


def environment(canary: Path) -> dict[str, str]:
    """Where code that should not run leaves its trace."""
    return {CANARY: str(canary)}


def forgeries(content: bytes) -> dict[str, Callable[[bytes], bytes]]:
    """What may be wrong with a checkpoint whose SHA-256 is right."""
    size = int.from_bytes(content[:8], "little")
    meta = json.loads(content[8 : 8 + size])["__metadata__"]
    task = json.loads(meta["task"])
    changes = {name: ({**metadata}, None) for name, metadata in _metadata(meta["config"], task).items()}
    changes |= {name: ({}, arrays) for name, arrays in _arrays().items()}
    return {
        name: lambda content, meta=meta, arrays=arrays: forged(content, meta, arrays or (lambda same: same))
        for name, (meta, arrays) in changes.items()
    }


def _metadata(config: str, task: dict[str, Any]) -> dict[str, dict[str, str | None]]:
    def setting(name: str, value: object) -> str:
        lines = [line for line in config.splitlines() if not line.startswith(f"{name} =")]
        return "\n".join([*lines, f"{name} = {json.dumps(value)}"]) + "\n"

    def of_task(**values: object) -> str:
        return json.dumps(task | values)

    shell = ["sh", "-c", f'echo subprocess > "${CANARY}"']
    write = f'echo os.system > "${CANARY}"'
    forgeries: dict[str, dict[str, str | None]] = {
        f"{name} = {MODULE}": {"config": setting(name, f"{MODULE}:{name}")}
        for name in ("model", "data", "loss", "metric", "transform")
    }
    forgeries |= {
        "model = subprocess:call": {"config": setting("model", "subprocess:call"), "task": of_task(shape=shell)},
        "metric = os:system": {"config": setting("metric", "os:system"), "task": of_task(outputs=write)},
        "hidden of 10^8": {"config": setting("hidden", [10**8])},
        "hidden of 10^12": {"config": setting("hidden", [10**12])},
        "batch of text": {"config": setting("batch", "many")},
        "threads of 10^9": {"config": setting("threads", 10**9)},
        "a setting nobody knows": {"config": setting("nonsense", 1)},
        "learning rate of text": {"config": setting("lr", "nan")},
        "init of a path": {"config": setting("init", "/etc/shadow")},
        "outputs of -1": {"task": of_task(outputs=-1)},
        "outputs of text": {"task": of_task(outputs="x")},
        "outputs of 10^10": {"task": of_task(outputs=10**10)},
        "shape of text": {"task": of_task(shape="ab")},
        "shape of a number": {"task": of_task(shape=3)},
        "shape of 10^10": {"task": of_task(shape=[10**5, 10**5])},
        "tokens of 10^12": {"task": of_task(tokens=10**12)},
        "task without shape": {"task": '{"outputs": 3}'},
    }
    odd = {
        "nothing": None,
        "no text": "",
        "brackets": "]]]",
        "a list": "[]",
        "deep": DEEP,
        "a brace": "{",
        "text": '"x"',
    }
    for name in ("config", "task", "constants"):
        forgeries |= {f"{name} of {what}": {name: text} for what, text in odd.items()}
    forgeries |= {
        "constants of an array that is not there": {"constants": '{"layers.9.mask": "array"}'},
        "constants of a weight": {"constants": '{"layers.1.weight": "array"}'},
        "constants of numbers": {"constants": '{"layers.9.mask": 1}'},
    }
    steps = {"nothing": None, "text": "abc", "-5": "-5", "10^30": "1" + "0" * 30, "5000 digits": "9" * 5000}
    forgeries |= {f"step of {what}": {"step": text} for what, text in steps.items()}
    return forgeries | {"format of another kind": {"format": "mpiml-9"}, "deep config": {"config": f"a = {DEEP}"}}


def _arrays() -> dict[str, Callable[[Arrays], Arrays]]:
    def each(change: Callable[[Any], Any]) -> Callable[[Arrays], Arrays]:
        return lambda arrays: {name: change(array) for name, array in arrays.items()}

    return {
        "NaN": each(lambda a: np.full_like(a, np.nan)),
        "float64": each(lambda a: a.astype(np.float64)),
        "int32": each(lambda a: a.astype(np.int32)),
        "transposed": each(lambda a: a.T),
        "flat": each(np.ravel),
        "no arrays": lambda arrays: {},
        "no weights": lambda arrays: {n: a for n, a in arrays.items() if n.startswith(("optimizer.", "data."))},
        "no optimizer": lambda arrays: {n: a for n, a in arrays.items() if not n.startswith("optimizer.")},
        "no data.mean": lambda arrays: {n: a for n, a in arrays.items() if n != "data.mean"},
        "data.mean of another shape": lambda arrays: arrays | {"data.mean": np.zeros(3)},
        "another array": lambda arrays: arrays | {"zzz": np.zeros(4)},
    }


if __name__ == "__main__":
    from mpiml.training.export import trained

    try:
        trained(sys.argv[1])
    except RunError as error:
        print(error)
        sys.exit(error.exit_code)
