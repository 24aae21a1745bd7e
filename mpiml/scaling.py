"""`python -m mpiml.scaling run|report`: see mpiml.study.scaling."""

import sys

from mpiml.study.scaling import main

if __name__ == "__main__":
    sys.exit(main())
