"""Checkpoints that were damaged, and ones that were forged by somebody who can compute a SHA-256."""

from __future__ import annotations

import itertools
import json
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

from mpiml.errors import OutputError
from mpiml.run import checkpoint
from tests.chaos import forgery
from tests.chaos.campaign import Case, Verdict
from tests.chaos.jobs import Job
from tests.chaos.runs import COMMON, Lab, Reference, checkpoints, records_differ, resumed, weights_differ

SETTINGS = f"{COMMON} --hidden 4 --normalize --steps 6"
BLOCKS = 2000
COMMANDS_EVERY = 80  # trials in this process for one that starts a command
CODES = (0, 65, 70, 74, 78)
LIMIT, MEMORY = 20.0, 6_000_000  # seconds, and KiB of address space, that a command may take with a file of 7 kB
Mutation = tuple[str, str, Callable[[bytes], bytes]]  # what kind, what exactly, and how to make it


def cases(lab: Lab, rng: Random) -> Iterator[Case]:
    """Mutations of the newest checkpoint of a run; one in some hundred is given to the commands."""
    reference = lab.reference(SETTINGS)
    newest = max(checkpoints(reference.path).values())
    small = mutations(newest.read_bytes(), rng)
    started = commands(reference, newest, rng)
    while True:
        before = [case for case in (next(started, None),) if case]
        some = [
            Case(f"{kind}, {what}", lambda path, m=(kind, change): loaded(path, newest, *m))
            for kind, what, change in itertools.islice(small, COMMANDS_EVERY)
        ]
        if not (before or some):
            return
        yield from before + some


def mutations(content: bytes, rng: Random) -> Iterator[Mutation]:
    """Every bit flipped, every length, and some blocks changed, in random order."""
    flips = [(i, bit) for i in range(len(content)) for bit in range(8)]
    drawn: list[tuple[str, Any]] = [("with a flipped bit", flip) for flip in flips]
    drawn += [("cut short", length) for length in range(len(content))]
    drawn += [("with a changed block", rng.random()) for _ in range(BLOCKS)]
    rng.shuffle(drawn)
    for kind, what in drawn:
        yield kind, str(what), lambda content, kind=kind, what=what: WAYS[kind](content, what)


def flipped(content: bytes, at: tuple[int, int]) -> bytes:
    position, bit = at
    return content[:position] + bytes([content[position] ^ 1 << bit]) + content[position + 1 :]


def cut(content: bytes, length: int) -> bytes:
    return content[:length]


def block_changed(content: bytes, seed: float) -> bytes:
    """Zeros or random bytes in place of a block, a block taken out, random bytes put in, or two blocks swapped."""
    rng = Random(seed)
    a, length = rng.randrange(len(content)), rng.randrange(1, 600)
    before, block, after = content[:a], content[a : a + length], content[a + length :]
    other = rng.randrange(len(after) + 1)
    changed = (
        before + bytes(len(block)) + after,
        before + rng.randbytes(len(block)) + after,
        before + after,
        before + rng.randbytes(length) + block + after,
        before + after[:other] + block + after[other:],
    )
    return rng.choice(changed)


WAYS = {"with a flipped bit": flipped, "cut short": cut, "with a changed block": block_changed}


def loaded(path: Path, original: Path, kind: str, change: Callable[[bytes], bytes]) -> Iterator[Verdict]:
    """Read a file that was changed as mpiml reads it."""
    content = original.read_bytes()
    if (changed := change(content)) == content:
        return
    file = path / original.name
    file.write_bytes(changed)
    why = "accepted"
    try:
        checkpoint.load(file)
    except OutputError:
        why = ""
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
    yield f"a checkpoint {kind} is refused", why


def commands(reference: Reference, newest: Path, rng: Random) -> Iterator[Case]:
    """What commands do with damaged and with forged checkpoints, in random order."""
    content = newest.read_bytes()
    damages = [*itertools.islice(mutations(content, rng), 60), *headers(content)]
    drawn = [Case(f"--resume, newest {k}, {what}", _skipping(reference, change)) for k, what, change in damages]
    drawn += [
        Case(f"{command}, forged: {name}", _obeying(reference, change, command))
        for name, change in forgery.forgeries(content).items()
        for command in ("--resume", "--init", "evaluate", "export")
    ]
    rng.shuffle(drawn)
    yield from drawn


def headers(content: bytes) -> Iterator[Mutation]:
    """Files with headers that no library writes."""
    size = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    first = next(name for name in header if name != "__metadata__")

    def built(head: object, length: int | None = None) -> bytes:
        text = head if isinstance(head, bytes) else json.dumps(head).encode()
        return struct.pack("<Q", len(text) if length is None else length) + text + data

    def with_first(**changes: object) -> bytes:
        return built({**header, first: {**header[first], **changes}})

    forged = {
        "length of 2^63": built(header, 1 << 63),
        "length of 2^64 - 1": built(header, (1 << 64) - 1),
        "length of 0": built(header, 0),
        "length of 90 MB": built(header, 90_000_000),
        "deep JSON": built(b"[" * 100_000),
        "deep metadata": built(b'{"__metadata__":' * 5000),
        "shape of 2^62": with_first(shape=[1 << 62, 4]),
        "negative offset": with_first(data_offsets=[-8, 8]),
        "overlap": with_first(data_offsets=[0, len(data)]),
        "unknown dtype": with_first(dtype="F128"),
        "metadata that are no text": built({**header, "__metadata__": {"step": 5}}),
        "nothing": b"",
        "zeros": bytes(len(content)),
        "text": b"hello",
    }
    for name, changed in forged.items():
        yield "with a forged header", name, lambda _, changed=changed: changed


def _skipping(reference: Reference, change: Callable[[bytes], bytes]) -> Callable[[Path], Iterator[Verdict]]:
    """A trial: the newest checkpoint of a run that was killed is damaged."""

    def trial(path: Path) -> Iterator[Verdict]:
        run = _killed(path, reference)
        file = max(checkpoints(run).values())
        file.write_bytes(change(file.read_bytes()))
        ended = resumed(run, reference)
        why = weights_differ(run, ended, reference) or records_differ(run, reference)
        yield "a damaged checkpoint is skipped: --resume gives the same bits from the one before", why

    return trial


def _obeying(
    reference: Reference, change: Callable[[bytes], bytes], command: str
) -> Callable[[Path], Iterator[Verdict]]:
    """A trial: a command is given a forged checkpoint, and a run with nothing but this."""

    def trial(path: Path) -> Iterator[Verdict]:
        run, canary = _killed(path, reference), path / "canary"
        (run / "config.toml").unlink()
        file = max(checkpoints(run).values())
        for other in {*checkpoints(run).values()} - {file}:
            other.unlink()
        file.write_bytes(change(file.read_bytes()))
        module, arguments = {
            "--resume": ("mpiml.train", ["--resume", "--steps", 8, "--out", run]),
            "--init": ("mpiml.train", [*reference.arguments, "--init", file, "--out", path / "new"]),
            "evaluate": ("mpiml.evaluate", ["--checkpoint", file]),
            "export": ("tests.chaos.forgery", [file]),
        }[command]
        with Job(0, *arguments, module=module, memory=MEMORY, **forgery.environment(canary)) as job:
            ended = job.wait(LIMIT)
        bad = "Traceback" in ended.text or "MemoryError" in ended.text or ended.code not in CODES
        why = ended.hung or (f"code {ended.code}: {ended.last}" if bad else "")
        yield "a forged checkpoint: a line and an exit code, no traceback", why
        yield "code that a checkpoint names is not run", f"{canary.read_text()} was run" if canary.exists() else ""

    return trial


def _killed(path: Path, reference: Reference) -> Path:
    """A copy of a run, as if it had been killed after its last save."""
    run = path / "run"
    shutil.copytree(reference.path, run)
    (run / "result.json").write_text(json.dumps({**reference.result, "status": "running"}))
    return run
