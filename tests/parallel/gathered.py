"""What tests look at: the vectors of the whole model, wherever their parts lie."""

import numpy as np

from mpiml.parallel.state import Key, State
from mpiml.vectors import Vector


def gathered(state: State) -> dict[Key, Vector]:
    """All vectors by stage and name, on every rank; collective."""
    sizes = {(state.stage, name): part.size for name, part in state.parts.items()}
    every = state.comm.allgather((sizes, state.copied().own))
    dtype = next(view.dtype for _, own in every for views in own.values() for view in views.values())
    whole = {key: np.zeros(size, dtype) for sizes, _ in every for key, size in sizes.items()}
    for _, own in every:
        for key, views in own.items():
            for (start, stop), view in views.items():
                whole[key][start:stop] = view
    return whole
