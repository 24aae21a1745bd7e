"""What tests look at: the vectors of the whole model, wherever their parts lie."""

import numpy as np

from mpiml.parallel.state import Key, State
from mpiml.vectors import Vector


def gathered(state: State) -> dict[Key, Vector]:
    """All vectors by stage and name, up to the last element that a rank has, on every rank; collective."""
    whole: dict[Key, Vector] = {}
    for own in state.comm.allgather(state.copied().own):
        for key, views in own.items():
            for (start, stop), view in views.items():
                missing = max(stop - len(whole.get(key, ())), 0)
                whole[key] = np.pad(whole.get(key, view[:0]), (0, missing))
                whole[key][start:stop] = view
    return whole
