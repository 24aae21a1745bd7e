"""How a program begins and ends: its streams are there, what the user has begun ends first, its exit code is right."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from mpi4py import MPI

from mpiml.errors import ConfigError
from mpiml.run import alarm
from mpiml.run import start as module

BEGIN = "from mpiml.run import start; start.begin('a.program')\n"


def shell(command: str, script: str, path: Path) -> subprocess.CompletedProcess[str]:
    """A Python script that a shell command, of which it is "$@", starts."""
    words = ["sh", "-c", command, "sh", sys.executable, "-c", BEGIN + script]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "PYTHONUNBUFFERED": ""}
    return subprocess.run(words, check=False, capture_output=True, text=True, timeout=20, cwd=path, env=environment)


@pytest.mark.parametrize("closed", ["2>&-", "1>&-", "0<&-", "0<&- 1>&- 2>&-"])
def test_files_do_not_take_the_place_of_streams_that_are_closed(tmp_path: Path, closed: str) -> None:
    script = "import sys, os; file = open('file', 'w'); print('out'); print('err', file=sys.stderr); os.write(2, b'C')"
    done = shell(f'"$@" {closed}', f"{script}; file.write(str(file.fileno())); file.close(); start.end(0)", tmp_path)
    assert done.returncode == 0, done.stderr
    assert int((tmp_path / "file").read_text()) > 2


@pytest.mark.parametrize("code", [0, 75])
def test_output_that_cannot_be_written_does_not_change_the_exit_code(tmp_path: Path, code: int) -> None:
    script = f"import sys\nfrom mpiml.run.console import say\nsay('lost', sys.stdout)\nstart.end({code})"
    assert shell('"$@" >/dev/full 2>/dev/full', script, tmp_path).returncode == code


def test_what_the_user_has_registered_and_started_ends_first(tmp_path: Path) -> None:
    """MPI is there until then; and what files have not written yet, they write."""
    lines = [
        "import atexit, sys, threading, time",
        "start.start_mpi()",
        "from mpi4py import MPI",
        "file = open('kept', 'w'); file.write('all of it')",
        "atexit.register(lambda: print('at exit', MPI.COMM_WORLD.size))",
        "threading.Thread(target=lambda: (time.sleep(0.2), print('a thread', MPI.COMM_WORLD.size))).start()",
        "start.begun()",
        "start.end(3)",
    ]
    done = shell('"$@"', "\n".join(lines), tmp_path)
    assert (done.returncode, done.stdout) == (3, "a thread 1\nat exit 1\n"), done.stderr
    assert (tmp_path / "kept").read_text() == "all of it"


@pytest.mark.parametrize(
    "script", ["atexit.register(time.sleep, 60)", "threading.Thread(target=time.sleep, args=[60]).start()"]
)
def test_what_the_user_has_started_and_never_ends_does_not_keep_the_process(tmp_path: Path, script: str) -> None:
    soon = "import atexit, threading, time; start.alarm._alarm.seconds = 0.2"
    done = shell('"$@"', f"{soon}\n{script}\nstart.end(0)", tmp_path)
    assert done.returncode == 70
    assert "a.program: rank 0 has been ending: in a thread, or in a function registered with atexit, " in done.stderr


@pytest.mark.mpi
@pytest.mark.skipif(MPI.COMM_WORLD.size == 1, reason="a rank alone leaves nobody waiting")
def test_errors_of_one_rank_that_nothing_catches_end_the_job(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    codes: list[int] = []
    monkeypatch.setattr(module, "end_job", codes.append)
    monkeypatch.setattr(alarm, "end_for_certain", lambda seconds: None)
    monkeypatch.setattr(sys, "excepthook", lambda kind, error, trace: print("shown", error, file=sys.stderr))
    module.end_all_on_errors("mine.py")
    rank, alike = MPI.COMM_WORLD.rank, ConfigError("alike").on_all_ranks()
    sys.excepthook(ConfigError, alike, None)
    assert codes == []
    sys.excepthook(ValueError, ValueError("x"), None)
    assert codes == [module.CODE]
    assert capsys.readouterr().err == f"shown alike\nshown x\nmine.py: this error of rank {rank} ends the job\n"
    process = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: process + 1)  # as in a forked process, which is no rank
    sys.excepthook(ValueError, ValueError("x"), None)
    assert len(codes) == 1
