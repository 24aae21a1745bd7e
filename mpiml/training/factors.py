"""--rates: factors of the learning rate for parameters by name; 0 freezes."""

from __future__ import annotations

from collections.abc import Sequence

from mpiml.errors import ConfigError, first_few
from mpiml.flags import is_finite
from mpiml.nn.base import Layer, parameters
from mpiml.nn.parameters import Parameter
from mpiml.nn.patterns import selects, within_layer

MOST = 4  # factors that have a line each


def parsed(rates: Sequence[str]) -> list[tuple[str, float]]:
    """The pattern and the factor of each item, PATTERN=X. Raises ConfigError for what is none."""
    items = []
    for item in rates:
        pattern, _, factor = (part.strip() for part in item.rpartition("="))
        if not pattern:
            raise ConfigError(f"--rates {item}: must be PATTERN=X, such as layers.1=0")
        if not is_finite(factor) or float(factor) < 0:
            raise ConfigError(f"--rates {item}: the factor must be a finite number, at least 0")
        items.append((pattern, float(factor)))
    return items


def set_rates(layers: Sequence[Layer], rates: Sequence[str]) -> None:
    """Give every parameter of these layers, which have their names, the factor of the last pattern that selects it; an
    array that stands in several layers has the name of its first place.

    Raises ConfigError for a pattern that selects nothing that has a rate, and if nothing is left to train.
    """
    everything = parameters(layers)
    named = [parameter for parameter in everything if parameter.first is parameter]
    trained = [parameter for parameter in named if parameter.momentum is None]
    for parameter in trained:
        parameter.rate = 1.0
    for pattern, factor in parsed(rates):
        selected = [parameter for parameter in trained if selects(pattern, parameter.name)]
        if not selected:
            raise ConfigError(f"--rates {pattern}={factor:g}: {_why_nothing(pattern, everything)}")
        for parameter in selected:
            parameter.rate = factor
    for parameter in everything:
        parameter.rate = parameter.first.rate
    if rates and not any(parameter.size and parameter.optimised for parameter in trained):
        raise ConfigError(f"--rates {','.join(rates)}: no parameter is left to train")


def _why_nothing(pattern: str, named: Sequence[Parameter]) -> str:
    """Why a pattern selects nothing that has a rate, and names that would."""
    if further := [p for p in named if p.first is not p and selects(pattern, p.name)]:
        return f"selects {further[0].name}, which is the array of {further[0].first.name}: name that"
    if averages := [parameter.name for parameter in named if selects(pattern, parameter.name)]:
        return f"selects running averages alone ({first_few(averages)}), which have no learning rate"
    names = [parameter.name for parameter in named if parameter.momentum is None]
    within = [within_layer(name) for name in names]
    paths = [name.rpartition(".")[0] for name in (*names, *within)]
    choice = dict.fromkeys([*paths, *names, *within])
    import difflib  # which no run needs that begins

    if close := set(difflib.get_close_matches(pattern, choice, 5)):
        return f"selects no parameter; close to it are {', '.join(name for name in choice if name in close)}"
    parts = (".".join(name.split(".")[:-1][:3]).removesuffix(".layers") for name in names)  # of a module, or the layer
    return f"selects no parameter; there are {first_few(dict.fromkeys(parts))}"


def notes(layers: Sequence[Layer]) -> list[str]:
    """For each factor but 1: which part of the parameters has it. Many factors, as layers of a deep model may have, are
    one line."""
    trained = [p for p in parameters(layers) if p.momentum is None and p.first is p]
    total = sum(parameter.size for parameter in trained)
    others = sorted({parameter.rate for parameter in trained} - {0.0, 1.0})
    groups = [others] if len(others) > MOST else [[rate] for rate in others]
    lines = []
    for rates in [[0.0], *groups]:
        having = [parameter for parameter in trained if parameter.rate in rates]
        span = " to ".join(f"{rate:g}" for rate in dict.fromkeys((rates[0], rates[-1])))
        what, size = f"learning rate times {span}" if rates[0] else "not trained", sum(p.size for p in having)
        if having:
            count = f"{len(having)} of {len(trained)} parameters"
            lines.append(f"{what}, by --rates: {count}, {size:,} of {total:,} values")
    return lines
