"""`python -m mpiml.bench`: see mpiml.study.bench."""

import sys

from mpiml.study.bench import main

if __name__ == "__main__":
    sys.exit(main())
