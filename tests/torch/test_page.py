"""The program on the page that goes on from its checkpoints, asked to stop."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from mpiml.loop.guard import guards
from tests.torch.modules import WORLD
from tests.torch.scripts import PAGE, replaced

pytestmark = [pytest.mark.mpi, pytest.mark.skipif(WORLD.size > 4, reason="the program has four micro-batches")]


def test_the_pages_program_stops_when_asked_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM comes to one rank after its third update."""
    monkeypatch.chdir(WORLD.bcast(tmp_path))
    (program,) = re.findall(r"```python\n(# going_on.py\n.*?)```", PAGE.read_text(), re.DOTALL)
    asked = replaced(program, {"        scheduler.step()\n": "        scheduler.step()\n        after(step)\n"})

    def after(step: Any) -> None:
        if step.number == 3 and WORLD.rank == WORLD.size - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    for text, code, steps in ((asked, 75, [3]), (program, 0, [3, 5, 10])):
        with pytest.raises(SystemExit) as ended:
            exec(text, {"after": after})
        assert ended.value.code == code
        guards[-1]._stop.asked = False  # else the guard around the test passes the request on to the next program
        files = sorted(Path("runs/going_on/checkpoints").glob("*.safetensors"))
        assert [int(path.stem.removeprefix("step-")) for path in files] == steps
        WORLD.Barrier()  # files are not replaced before all have looked
