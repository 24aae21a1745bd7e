"""Ends that come from MPI and its launcher before this package can do anything: each is counted, and named."""

import re

OTHERS = (
    (r"^(exits|loop): .*os\._exit\(0\).*: exit code 0", "MPICH's launcher returns 0 if a rank ends by os._exit(0)"),
    (r"^signals: 2 x SIGINT at once to mpirun", "Hydra kills the job at the second of two SIGINT"),
)


def who_ends_it_first(part: str, case: str, why: str) -> str:
    """Who is known to cause such a miss, other than this package; nobody if it is unknown."""
    return next((who for pattern, who in OTHERS if re.search(pattern, f"{part}: {case}: {why}")), "")
