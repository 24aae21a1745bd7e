"""Whether somebody watches: under a launcher a rank's output is a pipe, so the launcher's own is looked at."""

import os
import sys
from pathlib import Path

LAUNCHERS = ("hydra_pmi_proxy", "mpiexec", "mpirun", "orterun", "prterun", "prted", "orted", "srun")


def width() -> int | None:
    """Columns of the terminal that standard error ends at, or None if it ends in a file or a pipe."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns
    except (OSError, ValueError):
        pass
    launcher = _launcher()
    if launcher is None:
        return None
    try:
        terminal = os.open(f"/proc/{launcher}/fd/2", os.O_WRONLY | os.O_NOCTTY)
    except OSError:
        return None
    try:
        return os.get_terminal_size(terminal).columns
    except OSError:
        return None
    finally:
        os.close(terminal)


def _launcher() -> int | None:
    """The process number of the outermost launcher among this process's ancestors on this machine."""
    found, process = None, os.getppid()
    try:
        while process > 1:
            status = dict(
                line.split(":\t", 1)
                for line in Path(f"/proc/{process}/status").read_text().splitlines()
                if ":\t" in line
            )
            if status["Name"].startswith(LAUNCHERS):
                found = process
            process = int(status["PPid"])
    except (OSError, KeyError, ValueError):
        pass
    return found
