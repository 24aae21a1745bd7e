"""What tests of scripts share: a script's other form, and what the page says of the difference."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "mpiml/torch/README.md"


def replaced(text: str, changes: dict[str, str]) -> str:
    for old, new in changes.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def difference(before: str, after: str) -> str:
    """The lines that are only in one of them, as a block on a page, which has it."""
    lines = list(difflib.unified_diff(before.splitlines(), after.splitlines(), n=0, lineterm=""))[2:]
    block = "".join(f"{line[0]}{line[1:].strip()}\n" for line in lines if line[0] in "-+")
    assert f"```text\n{block}```" in PAGE.read_text()
    return block


def kept(script: str) -> str:
    """The script, with its DistributedDataParallel kept to the end.

    If one is the last to know a process group that is destroyed, and is freed right after a backward pass, PyTorch 2.13
    may wait for ever: for a thread of gloo, which waits for the interpreter's lock.
    """
    script, times = re.subn(r"= (.*(DDP|DistributedDataParallel)\(\w+\))\n", r'= globals()["kept"] = \1\n', script)
    assert times == 1
    return script
