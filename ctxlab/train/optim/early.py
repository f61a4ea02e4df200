"""Updates that do not wait for the end of the backward pass: a gradient goes as soon as its parameter has moved."""

from __future__ import annotations

import functools
from typing import Literal

import torch
from torch import Tensor

Update = Literal["step", "backward"]
"""When parameters are updated: all in one step behind the backward pass, or each within it."""


class EarlyUpdates:
    """Updates each parameter of an optimizer when its gradient is complete, and frees that gradient.

    Gradients never exist together: of n numbers, 4 n bytes become those of the largest tensor (Lv et al. 2023, LOMO,
    arXiv:2306.09782, section 3.1, here with any optimizer and its state). The numbers are those of one step behind backward:
    a parameter's gradient is complete when everything that reads it has been through backward, so nobody meets the new
    value, of a tied one neither. Matrices that `Orthogonal` would multiply side by side are multiplied one by one, which
    rounds otherwise.

    What needs all gradients at once is out of reach: clipping to the norm of the whole, sums over micro-batches or ranks.
    Learning rates have to be set before backward begins.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._norms: dict[Tensor, Tensor] = {}
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(functools.partial(self._update, part, index))
            for part in getattr(optimizer, "parts", (optimizer,))
            for index, group in enumerate(part.param_groups)
            for parameter in group["params"]
        ]

    def take_norm(self, parameters: list[Tensor]) -> Tensor:
        """The norm of the whole gradient of the backward pass before, over these parameters in this order, 0-dim; once."""
        norms, self._norms = self._norms, {}
        found = [norms[parameter] for parameter in parameters if parameter in norms]
        return torch.linalg.vector_norm(torch.stack(found)) if found else torch.zeros(())

    def end(self) -> None:
        """Lets go of the optimizer: gradients stay again, and move nothing."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _update(self, part: torch.optim.Optimizer, index: int, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self._norms[parameter] = torch.linalg.vector_norm(parameter.grad)
        groups = part.param_groups  # which a restored state replaces
        part.param_groups = [{**groups[index], "params": [parameter]}]
        try:
            part.step()
        finally:
            part.param_groups = groups
        parameter.grad = None
