"""Arrays that stand in several layers: each place has a Parameter of its own, so that gradients tell places apart."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from mpiml.nn.parameters import Parameter


def separate(holders: Iterable[tuple[Any, str, Parameter]]) -> None:
    """Give each place of an array a Parameter of its own: a copy in the place of one that stands in an earlier layer.

    Args:
        holders: each layer with the names of its attributes that are parameters, in layer order.

    Raises ValueError for an array that cannot stand in several layers.
    """
    arrays: dict[Parameter, list[Parameter]] = {}
    for layer, attribute, parameter in holders:
        places = arrays.setdefault(parameter.first, [])
        if any(parameter is other for other in places):
            parameter = _another(layer, attribute, parameter)
        places.append(parameter)
    for places in arrays.values():
        for parameter in places:
            parameter.places = places if len(places) > 1 else ()


def _another(layer: Any, attribute: str, parameter: Parameter) -> Parameter:
    """Put a copy in the place of a layer's parameter."""
    where = f"{attribute} of {type(layer).__name__}, which also stands in an earlier layer"
    if parameter.momentum is not None:
        raise ValueError(f"{where}, is a running average: make one for each layer")
    copied = copy.copy(parameter)
    setattr(layer, attribute, copied)
    if not any(one is copied for one in layer.own_parameters().values()):
        raise ValueError(f"{where}, must be an attribute that can be set: each layer gets a Parameter of its own")
    return copied
