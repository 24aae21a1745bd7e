"""`mpirun -n 4 python -m mpiml.doctor`: see mpiml.study.doctor."""

import sys

from mpiml.study.doctor import main

if __name__ == "__main__":
    sys.exit(main())
