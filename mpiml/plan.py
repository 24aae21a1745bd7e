"""`python -m mpiml.plan --ranks 64`: see mpiml.study.plan."""

import sys

from mpiml.study.plan import main

if __name__ == "__main__":
    sys.exit(main())
