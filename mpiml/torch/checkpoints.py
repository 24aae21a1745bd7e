"""Checkpoints of a PyTorch loop: module, optimizer, schedulers, generators and step in one file without pickles."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn import Module

from mpiml.errors import ConfigError
from mpiml.loop import checkpoints
from mpiml.random import global_generators
from mpiml.torch.average import Average
from mpiml.torch.packed import Arrays, pack, unpack

FORM = "mpiml-torch-1"


class Checkpoints:
    """A directory of checkpoints of a module and what trains it; every method is collective.

        saved = net.checkpoints("runs/mine/checkpoints", keep=3)
        first = saved.restore(optimizer=optimizer, scheduler=scheduler) + 1
        ...
        saved.save(step, optimizer=optimizer, scheduler=scheduler)

    Args:
        module: what it holds is saved under its own names, without "module.".
        average: of the DataParallel: ranks that are at different calls of it learn so.
        directory: is made if it does not exist.
        keep: how many checkpoints are kept, the newest.

    Attributes:
        meta: what was saved beside the state that `restore` has read.

    Raises, on all ranks alike, ConfigError for settings that do not work, OutputError if the directory cannot be made;
    and with each method RunError if ranks are at different calls of the DataParallel, naming these.
    """

    def __init__(self, module: Module, average: Average, directory: str | os.PathLike[str], keep: int = 3):
        average.checkpoint("checkpoints")
        self._module, self._average, self._team = module, average, average.team
        self._files = checkpoints.Checkpoints(directory, self._team.comm, keep)
        self.meta: dict[str, Any] = {}

    def save(
        self, step: int, *, optimizer: Any = None, scheduler: Any = None, meta: Mapping[str, Any] | None = None
    ) -> None:
        """Write the state after a step: that of rank 0, and of each rank its generators.

        Args:
            optimizer, scheduler: one, or a list of them; whatever has a `state_dict`.
            meta: what JSON can say.

        Raises, on all ranks alike, ConfigError for a state that cannot be saved, OutputError if it cannot be written.
        """
        self._average.checkpoint("save")
        generators = self._team.allgather({name: each.state() for name, each in global_generators().items()})
        arrays: Arrays = {}
        content: dict[str, Any] = {}

        def packed() -> None:
            state = {"module": self._module.state_dict(), "generators": generators}
            parts = _parts(optimizer, scheduler)
            state |= {name: part.state_dict() for name, part in parts.items()}
            content["form"] = FORM
            content["kinds"] = {name: type(part).__name__ for name, part in parts.items()}
            content["state"] = {name: pack(value, name, arrays) for name, value in state.items()}
            content["meta"] = dict(meta or {})

        self._team.on_rank_0(packed)
        self._files.save(step, arrays, content)

    def restore(self, *, optimizer: Any = None, scheduler: Any = None) -> int:
        """Put the newest checkpoint into the module and these. Returns its step, 0 if there is none yet.

        Generators are restored on as many ranks as have saved them; on another number they stay as they are.

        Raises, on all ranks alike and with nothing changed, ConfigError for a checkpoint of another module, optimizer
        or scheduler, naming what differs, OutputError if none of the checkpoints can be used.
        """
        self._average.checkpoint("restore")
        saved = self._files.newest()
        if saved is None:
            return 0

        def check() -> dict[str, Any]:
            where = f"the checkpoint of step {saved.step}"
            if saved.meta.get("form") != FORM or not saved.meta.keys() >= {"kinds", "state", "meta"}:
                raise ConfigError(f"{where} is not of a PyTorch loop: choose another directory")
            _same(where, saved.meta["kinds"], {n: type(p).__name__ for n, p in parts.items()})
            state = {name: unpack(value, saved.arrays) for name, value in saved.meta["state"].items()}
            _same(where, _kinds("module", state["module"]), _kinds("module", self._module.state_dict()))
            for name, part in parts.items():
                _same(where, _groups(name, state[name]), _groups(name, part.state_dict()))
            return state

        parts = self._team.together(lambda: _parts(optimizer, scheduler))
        state = self._team.together(check)
        self._module.load_state_dict(state["module"])
        for name, part in parts.items():
            part.load_state_dict(state[name])
        if len(state["generators"]) == self._team.size:
            states = state["generators"][self._team.rank]
            for name, generator in global_generators().items():
                if name in states:  # that of a GPU is only where one was used
                    generator.restore(states[name])
        self.meta = saved.meta["meta"]
        return saved.step


def _parts(optimizer: Any, scheduler: Any) -> dict[str, Any]:
    """Optimizers and schedulers by name."""
    parts: dict[str, Any] = {}
    for name, given in (("optimizer", optimizer), ("scheduler", scheduler)):
        if isinstance(given, Sequence):
            parts |= {f"{name}.{index}": each for index, each in enumerate(given)}
        elif given is not None:
            parts[name] = given
    for name, part in parts.items():
        if not (hasattr(part, "state_dict") and hasattr(part, "load_state_dict")):
            raise ConfigError(f"{name} is {type(part).__name__}, which has no state_dict")
    return parts


def _kinds(name: str, state: Mapping[str, Any]) -> dict[str, str]:
    """What a module's state must have in common with another's, by name."""
    kinds = {f"{name}.{key}": value for key, value in state.items()}
    return {
        key: f"{str(v.dtype).removeprefix('torch.')} {tuple(v.shape)}" if isinstance(v, Tensor) else "state of its own"
        for key, v in kinds.items()
    }


def _groups(name: str, state: Any) -> dict[str, str]:
    """How many parameters each group of an optimizer has."""
    groups = state.get("param_groups", []) if isinstance(state, dict) else []
    return {f"{name}.param_groups.{i}": f"{len(group['params'])} parameters" for i, group in enumerate(groups)}


def _same(where: str, saved: Mapping[str, str], here: Mapping[str, str]) -> None:
    """Raise ConfigError, naming the first thing that differs."""
    for name in sorted({*saved, *here}):
        if saved.get(name) != here.get(name):
            there, now = saved.get(name, "nothing"), here.get(name, "nothing")
            raise ConfigError(f"{where}: {name} is {there} in it, and {now} here")
