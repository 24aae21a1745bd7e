"""What a disk may hold after a crash: a model of names and bytes that are safe, and of those that are not yet."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Tree = dict[str, bytes | None]  # the bytes of each file by its path, None for a directory
DIRECTORY = -1  # in place of a file's number
DOUBTFUL = 6  # so many changes of names are looked at one by one; with older ones that are not safe, all are there


@dataclass
class File:
    """The bytes that a program sees, and those that are on the disk for certain; and changes, which a sync by the rank
    that has made them brings there: other ranks may be on other nodes."""

    content: bytes = b""
    safe: bytes = b""
    unsafe: list[Mapping[str, Any]] = field(default_factory=list)

    def change(self, call: Mapping[str, Any]) -> None:
        """A write, or a change of its size."""
        self.content = altered(self.content, call)
        self.unsafe.append(call)

    def sync(self, rank: int) -> None:
        """Bring what a rank has changed to the disk."""
        for call in self.unsafe:
            if call["rank"] == rank:
                self.safe = altered(self.safe, call)
        self.unsafe = [call for call in self.unsafe if call["rank"] != rank]


@dataclass(frozen=True)
class Change:
    """Names that were given to files, or taken away, at once; all of one directory."""

    directory: str
    names: tuple[tuple[str, int | None], ...]


class Disk:
    """Follows recorded calls, one after the other."""

    def __init__(self) -> None:
        self.files: list[File] = []
        self.names: dict[str, int] = {}
        self._changes: list[Change] = []
        self._safe: set[int] = set()  # changes that are on the disk because their directory was synced
        self._journalled = 0  # on a journalling file system, so many are, because something later was synced

    def follow(self, call: Mapping[str, Any]) -> None:
        """Take a call into account."""
        kind, path = call["kind"], call["path"]
        if kind == "create":
            if path not in self.names:
                self.files.append(File())
                self._change((path, len(self.files) - 1))
            elif call["truncates"]:
                self._file(path).change({**call, "kind": "truncate", "size": 0})
        elif kind == "mkdir":
            self._change((path, DIRECTORY))
        elif kind == "unlink":
            self._change((path, None))
        elif kind == "rename":
            self._change((path, None), (call["to"], self.names[path]))
        elif kind == "link":
            self._change((call["to"], self.names[path]))
        elif kind == "sync":
            self._sync(path, call["rank"])
        elif kind in ("write", "truncate", "extend"):
            self._file(path).change(call)

    def now(self) -> Tree:
        """What a program sees, and all that is left if it is killed."""
        return {path: self._content(number) for path, number in self.names.items()}

    def within(self, call: Mapping[str, Any]) -> Iterator[Tree]:
        """What is left if a program is killed within a write."""
        if call["kind"] == "write":
            size = len(call["data"]) // 2
            for part in sorted({1, size // 2, size - 1} - {0, size}):
                content = altered(self._file(call["path"]).content, {**call, "data": call["data"][: 2 * part]})
                yield self.now() | {call["path"]: content}

    def after_power_failure(self, journal: bool) -> Iterator[Tree]:
        """All that may be on the disk: names as on a file system with a journal, which keeps their order, or in any
        order that POSIX allows; bytes that were not synced old, new, in part, or as zeros."""
        for changes in self._in_order() if journal else self._in_any_order():
            names: dict[str, int] = {}
            for change in changes:
                _apply(names, change)
            doubtful = [path for path, number in names.items() if number >= 0 and not self._is_safe(number)]
            for contents in itertools.product(*(_torn(self.files[names[path]]) for path in doubtful)):
                tree = {path: None if n == DIRECTORY else self.files[n].safe for path, n in names.items()}
                tree |= dict(zip(doubtful, contents, strict=True))
                yield {path: content for path, content in tree.items() if _reachable(path, tree)}

    def _in_order(self) -> Iterator[list[Change]]:
        for count in range(self._journalled, len(self._changes) + 1):
            yield self._changes[:count]

    def _in_any_order(self) -> Iterator[list[Change]]:
        unsafe = [i for i in range(len(self._changes)) if i not in self._safe]
        doubtful = unsafe[-DOUBTFUL:]
        for count in range(len(doubtful) + 1):
            for lost in itertools.combinations(doubtful, count):
                yield [change for i, change in enumerate(self._changes) if i not in lost]

    def _sync(self, path: str, rank: int) -> None:
        number = self.names[path]
        if number == DIRECTORY:
            self._safe |= {i for i, change in enumerate(self._changes) if change.directory == path}
        else:
            self.files[number].sync(rank)
        self._journalled = len(self._changes)

    def _change(self, *names: tuple[str, int | None]) -> None:
        self._changes.append(Change(os.path.dirname(names[-1][0]) or ".", names))
        _apply(self.names, self._changes[-1])

    def _file(self, path: str) -> File:
        return self.files[self.names[path]]

    def _content(self, number: int) -> bytes | None:
        return None if number == DIRECTORY else self.files[number].content

    def _is_safe(self, number: int) -> bool:
        return self.files[number].safe == self.files[number].content


def recorded(record: Path) -> list[dict[str, Any]]:
    """The calls in a file that tests.chaos.shim has written."""
    return [json.loads(line) for line in record.read_text().splitlines()]


def altered(content: bytes, call: Mapping[str, Any]) -> bytes:
    """The bytes of a file after a write, or a change of its size."""
    if call["kind"] == "write":
        at, data = call["at"], bytes.fromhex(call["data"])
        return content[:at].ljust(at, b"\0") + data + content[at + len(data) :]
    size = max(call["size"], len(content)) if call["kind"] == "extend" else call["size"]
    return content[:size].ljust(size, b"\0")


def build(tree: Tree, directory: Path) -> None:
    """Make the files of a tree below a directory."""
    for path, content in sorted(tree.items()):
        if content is None:
            (directory / path).mkdir(parents=True, exist_ok=True)
        else:
            (directory / path).write_bytes(content)


def _apply(names: dict[str, int], change: Change) -> None:
    for path, number in change.names:
        if number is None:
            names.pop(path, None)
        else:
            names[path] = number


def _torn(file: File) -> list[bytes]:
    """What a file may hold whose last bytes were not synced."""
    pairs = enumerate(zip(file.safe, file.content, strict=False))
    common = next((i for i, (old, new) in pairs if old != new), min(len(file.safe), len(file.content)))
    size, half = len(file.content), (common + len(file.content)) // 2
    part = file.content[:half]
    return list(dict.fromkeys([file.safe, file.content, part, part.ljust(size, b"\0"), file.safe.ljust(size, b"\0")]))


def _reachable(path: str, tree: Tree) -> bool:
    """Whether the directories above a path are there too."""
    above = os.path.dirname(path)
    return path == "." or (tree.get(above or ".", b"") is None and _reachable(above or ".", tree))
