"""Which backward passes average, and noticing their end."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.autograd.graph import Node, get_gradient_edge
from torch.nn import Module
from torch.utils._pytree import tree_map_only

from mpiml.torch.outputs import tensors_in

IGNORE, AVERAGE, WARN = 0, 1, 2  # when a pass comes to parameters and to no output


class Passes:
    """Calls `average` at the end of each backward pass that comes to outputs of the module, or to parameters.

    Hooks on the outputs are needed because a rank may use none of the parameters, and has to average with the others.
    Hooks on the parameters are needed for passes that come to no output, as from a loss that the module has kept; as
    with DistributedDataParallel, such a pass has to be the first after a forward pass.

    Args:
        trained: the parameters that have gradients.
        several: whether there are other ranks.

    Attributes:
        forced: whether the last outputs depended on nothing that requires a gradient, and were made to require one.
    """

    def __init__(self, module: Module, trained: Sequence[Tensor], several: bool, average: Callable[[], None]):
        self._module, self._several, self._average = module, several, average
        self._nodes = [get_gradient_edge(parameter).node for parameter in trained]
        self._at_parameters = IGNORE
        self._averaged_pass = -1  # the number of the last pass that averages at its end
        self.forced = False
        hook = self._came_to_parameter
        self._handles = [p.register_post_accumulate_grad_hook(hook) for p in trained] if several else []

    def follow(self, outputs: Any) -> Any:
        """Average at the end of passes that come to these outputs. Returns them, or others with the same values."""
        tensors = list(tensors_in(outputs))
        followed = [tensor for tensor in tensors if tensor.grad_fn is not None]
        self.forced = self._several and self._module.training and not any(tensor.requires_grad for tensor in tensors)
        if self.forced:  # parameters that require a gradient may be used on other ranks
            outputs = tree_map_only(Tensor, Tensor.detach, outputs)  # the caller's inputs may be among them
            kept = {id(tensor) for tensor in (*self._module.parameters(), *self._module.buffers())}
            unkept = (tensor for tensor in tensors_in(outputs) if id(tensor) not in kept)
            followed = [tensor.requires_grad_() for tensor in unkept if tensor.is_floating_point()]
        for tensor in followed:  # a hook that refers to its own node would keep it for ever
            below = tensor.grad_fn.next_functions if tensor.grad_fn is not None else ()
            tensor.register_hook(partial(self._came_to_output, below))
        self._at_parameters = AVERAGE
        return outputs

    def ignore(self) -> None:
        """Until the next `follow`, do not average for passes that come to parameters alone."""
        self._at_parameters = IGNORE

    def close(self) -> None:
        """Follow parameters no more."""
        for handle in self._handles:
            handle.remove()

    def _came_to_output(self, below: Sequence[tuple[Node | None, int]], gradient: Tensor) -> None:
        if torch._C._current_graph_task_id() != self._averaged_pass and self._adds_gradients(below):
            self._average_at_the_end()

    def _came_to_parameter(self, parameter: Tensor) -> None:
        if self._at_parameters == AVERAGE:
            self._average_at_the_end()
        elif self._at_parameters == WARN:
            self.ignore()
            warnings.warn(
                "a backward pass came to parameters of a DataParallel, but to no output of it, after a pass that "
                "averaged: its gradients stay this rank's own",
                stacklevel=2,
            )

    def _average_at_the_end(self) -> None:
        self._averaged_pass, self._at_parameters = torch._C._current_graph_task_id(), IGNORE
        Variable._execution_engine.queue_callback(self._pass_ended)

    def _pass_ended(self) -> None:
        self._at_parameters = WARN
        self._average()

    def _adds_gradients(self, below: Sequence[tuple[Node | None, int]]) -> bool:
        """Whether the pass that runs adds to gradients of parameters, or would if there were any on this rank. One of
        torch.autograd.grad does not."""
        is_executed = torch._C._will_engine_execute_node
        try:
            if any(map(is_executed, self._nodes)):
                return True
            seen, left = set[Node](), [node for node, _ in below if node is not None]
            while left:
                node = left.pop()
                if not is_executed(node):
                    return False
                seen.add(node)
                left += [other for other, _ in node.next_functions if other is not None and other not in seen]
        except RuntimeError:  # of a tensor whose gradient torch.autograd.grad is asked for
            return False
        return True
