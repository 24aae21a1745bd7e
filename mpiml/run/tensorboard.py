"""TensorBoard's event files: what they show of the metrics of a run, while it goes on and afterwards; no MPI.

A file is a row of TFRecords, https://www.tensorflow.org/tutorials/load_data/tfrecord, each of which holds an Event.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from mpiml.clock import unwatched
from mpiml.errors import ConfigError
from mpiml.run.directory import PARTIAL, named_errors, replacing
from mpiml.run.metrics import content_of, lines
from mpiml.run.result import LINE_KINDS

VERSION = "brain.Event:2"  # of the format; TensorBoard looks for sessions that begin from this one on
NAME, OWN = "events.out.tfevents.", ".mpiml"  # how names of event files begin, and how ours end
PLAIN = ("learning_rate", "gradient_norm", "noise_scale", "samples_per_second")  # fields that are shown as they are


def check() -> None:
    """Raise ConfigError unless the library is there that event files are written with."""
    try:
        import tensorboardX  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"event files for TensorBoard need the package tensorboardX ({error}): pip install 'mpiml[tensorboard]'"
        ) from None


def scalars(line: Mapping[str, Any], rows: str) -> dict[str, float]:
    """What TensorBoard shows of a line of metrics.jsonl: numbers by tag, without those that are not known.

    `rows`: what was evaluated, test or validation.
    """
    found: dict[str, Any]
    if "evaluation" in line:
        found = {f"{rows}/{name}": value for name, value in line["evaluation"].items() if name != "rows"}
    else:
        scores = line.keys() - LINE_KINDS.keys() - {"workers"}
        found = {f"train/{name}": line[name] for name in ("loss", *sorted(scores)) if name in line}
        found |= {name: line[name] for name in PLAIN if name in line}
        activities = line.get("seconds", {}).items()
        found |= {
            f"seconds/{name}/max": spent["max"]
            for name, spent in activities
            if name != "bytes_sent" and isinstance(spent, dict) and "max" in spent
        }
    return {tag: value for tag, value in found.items() if isinstance(value, (int, float))}


class Events:
    """The event file of a run in a directory: it has all lines, and takes the place of those of ours that are there.

    Of these the newest is left until there is another: a TensorBoard that is looking on is reading it, and could not go
    on to the next. By the beginning of that it forgets what it has read.

    Each line that is added is appended at once, as to metrics.jsonl: of a run that is killed nothing is missing. The
    library's own writers keep lines in a queue, in a thread whose errors end nothing, and sync each of them to disk.

    Args:
        directory: is made if it does not exist.
        rows: what was evaluated, test or validation.
        history: lines of metrics.jsonl that it begins with.
        then: when lines were written that do not say so, as those of older runs; seconds since 1970.
        progress: is called now and then while the history is written.

    Raises ConfigError if the library is missing, OutputError if the file cannot be written.
    """

    def __init__(
        self,
        directory: Path,
        rows: str,
        history: Iterable[Mapping[str, Any]] = (),
        then: float = 0.0,
        progress: Callable[[], object] = unwatched,
    ):
        check()
        self.rows, self.then = rows, then
        self.path = directory / f"{NAME}{time.time():.0f}.{os.uname().nodename}{OWN}"
        with named_errors("create", directory):
            directory.mkdir(parents=True, exist_ok=True)
        with replacing(self.path, progress=progress) as file:
            file.write(self._begin())
            for line in history:
                file.write(self._record(line))
                progress()
        with named_errors("remove old event files in", directory):
            *older, _ = sorted({*directory.glob(f"{NAME}*{OWN}")} - {self.path}) or [self.path]
            for old in (*older, *directory.glob(f".{NAME}*{OWN}.*{PARTIAL}")):
                old.unlink()

    def add(self, line: Mapping[str, Any]) -> None:
        """Append a line of metrics.jsonl. Raises OutputError if that fails."""
        with named_errors("write", self.path), open(self.path, "ab", buffering=0) as file:
            file.write(self._record(line))

    def _begin(self) -> bytes:
        """The start of a session: what has been read of files before does not count."""
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        now = time.time()
        start = Event(wall_time=now, step=0, session_log=SessionLog(status=SessionLog.START))
        return _framed(Event(wall_time=now, file_version=VERSION)) + _framed(start)

    def _record(self, line: Mapping[str, Any]) -> bytes:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        found = scalars(line, self.rows)
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in found.items()]
        return _framed(Event(wall_time=line.get("time", self.then), step=line["step"], summary=Summary(value=values)))


def of_run(
    metrics: Path, directory: Path, rows: str, progress: Callable[[], object] = unwatched
) -> tuple[Events, list[str]]:
    """Event files that begin with all lines of a metrics file so far, and a message for each damaged one."""
    good, problems = lines(metrics, content_of(metrics))
    with named_errors("read", metrics):
        then = metrics.stat().st_mtime if good else time.time()
    return Events(directory, rows, (line for _, line in good), then, progress), problems


def _framed(event: Any) -> bytes:
    """An event as a TFRecord."""
    from tensorboardX.record_writer import masked_crc32c

    content = event.SerializeToString()
    head = struct.pack("<Q", len(content))
    return b"".join((head, struct.pack("<I", masked_crc32c(head)), content, struct.pack("<I", masked_crc32c(content))))
