"""What a recurrent model carries from one segment to the next: the inputs of its layers, without their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class SegmentMemory:
    """The last `capacity` inputs of every layer, for each row of a batch; rows may have seen fewer.

        model.hidden(first, memory=memory); model.hidden(next, memory=memory)

    layers: of each layer (B, capacity, d_model), the newest last; what a row has not seen yet is 0 and nobody looks at it.
    held: (B,) int64 on the CPU, how many tokens of each row count.
    """

    def __init__(self, n_layers: int, rows: int, capacity: int, d_model: int, device: torch.device) -> None:
        self.capacity = capacity
        self.layers = [torch.zeros(rows, capacity, d_model, device=device) for _ in range(n_layers)]
        self.held = torch.zeros(rows, dtype=torch.int64)

    def keep(self, rows: Tensor) -> None:
        """Forgets everything of the rows that are false (B,): they begin something new."""
        self.held = torch.where(rows.cpu(), self.held, 0)

    def groups(self) -> list[tuple[Tensor, list[Tensor]]]:
        """The rows (n,) that hold equally much, and what they hold of every layer, (n, held, d_model)."""
        found = []
        for held in self.held.unique().tolist():
            rows = (self.held == held).nonzero()[:, 0].to(self.layers[0].device)
            found.append((rows, [layer[rows, self.capacity - held :] for layer in self.layers]))
        return found

    @classmethod
    def restored(cls, state: dict[str, Any], rows: slice, device: torch.device) -> SegmentMemory:
        """The memory of some of the rows that a `state` holds."""
        layers: list[Tensor] = [layer[rows].to(device) for layer in state["layers"]]
        memory = cls(0, 0, layers[0].shape[1], layers[0].shape[2], device)
        memory.layers, memory.held = layers, state["held"][rows].clone()
        return memory

    def append(self, rows: Tensor, inputs: Sequence[Tensor]) -> None:
        """Adds the inputs (n, T, d_model) that every layer has just had for some rows."""
        new = inputs[0].shape[1]
        for number, added in enumerate(inputs):
            layer = self.layers[number]
            if added.dtype != layer.dtype:
                layer = layer.to(added.dtype)
            whole = torch.cat([layer[rows], added.detach()], dim=1)
            self.layers[number] = layer.index_copy(0, rows, whole[:, whole.shape[1] - self.capacity :])
        self.held[rows.cpu()] = (self.held[rows.cpu()] + new).clamp(max=self.capacity)


def state_of(memories: Sequence[SegmentMemory]) -> dict[str, Any]:
    """What a checkpoint keeps of memories, their rows one behind the other."""
    return {
        "layers": [torch.cat(parts).cpu() for parts in zip(*(memory.layers for memory in memories))],
        "held": torch.cat([memory.held for memory in memories]),
    }


def joined(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One state of those of several processes, in their order."""
    return {
        "layers": [torch.cat(parts) for parts in zip(*(state["layers"] for state in states))],
        "held": torch.cat([state["held"] for state in states]),
    }
