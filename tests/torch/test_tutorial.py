"""A script as in PyTorch's tutorials: four lines of it change, and then its losses and weights are the same."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from tests.conftest import launch
from tests.torch.scripts import difference, kept, replaced

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.contract

BEFORE = Path(__file__).with_name("tutorial.py")
GROUP = '"gloo", init_method=f"file://{snapshot}.ranks", rank=rank, world_size=world_size'
# How a process of gloo's ends: PyTorch 2.13 may abort as a DistributedDataParallel is freed with the interpreter.
LAST = "    dist.destroy_process_group()\n"
AT_ONCE = f"{LAST}    sys.stdout.flush()\n    os._exit(0)\n"
CHANGES = {
    "torch.nn.parallel import DistributedDataParallel as DDP": "mpiml.torch import DataParallel as DDP, rank, size",
    f"    dist.init_process_group({GROUP})\n": "",
    LAST: "",
    "mp.spawn(main, args=(world_size, epochs, snapshot), nprocs=world_size)": "main(rank(), size(), epochs, snapshot)",
}


def losses(printed: str) -> list[float]:
    return [float(word) for line in re.findall(r"losses (.*)", printed) for word in line.split()]


def test_a_tutorial_changes_in_four_lines(tmp_path: Path) -> None:
    text, before, after = BEFORE.read_text(), tmp_path / "before.py", tmp_path / "after.py"
    before.write_text(replaced(kept(text), {LAST: AT_ONCE}))
    after.write_text(replaced(text, CHANGES))
    lines = difference(text, after.read_text()).splitlines()
    assert Counter(line[0] for line in lines) == {"-": 4, "+": 2}
    theirs = launch(0, str(before), "2", "3", str(tmp_path / "theirs.pt"), GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1")
    ours = launch(2, str(after), "2", "3", str(tmp_path / "ours.pt"))
    assert (theirs.returncode, ours.returncode) == (0, 0), theirs.stderr + ours.stderr
    assert len(losses(theirs.stdout)) == 12
    assert losses(ours.stdout) == pytest.approx(losses(theirs.stdout), rel=1e-5)
    one, other = (torch.load(tmp_path / f"{name}.pt") for name in ("ours", "theirs"))
    assert one["epochs"] == other["epochs"] == 3
    torch.testing.assert_close(one["model"], other["model"])
