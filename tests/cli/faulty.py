"""A position that fails in the way it is told to, for sweeps whose cells must not take each other along.

Where there is a file `cured` in the folder that the line is typed in, nothing fails.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn

from ctxlab.model.config import ModelConfig
from ctxlab.model.position.base import POSITIONS, Position

_ROWS = 1 << 24  # of the table that hoards: 8 GiB at nano's width


@POSITIONS.register("faulty")
class Faulty(Position):
    """No position at all; with `hoards`, a table that nothing reads."""

    class Config(Position.Config):
        name: Literal["faulty"] = "faulty"
        fault: str = Field("none", description="raises, hangs, dies, hoards; any other word does no harm")

    paper = "none"
    form = "none"
    relative = True
    bidirectional = False

    def __init__(self, config: Config, model: ModelConfig, context: int, *, causal: bool = True) -> None:
        super().__init__(config, model, context, causal=causal)
        self.fault = _fault(config)
        if self.fault == "hoards":
            self.hoard = nn.Parameter(torch.empty(_ROWS, model.d_model))

    @classmethod
    def n_parameters(cls, config: Any, model: ModelConfig, context: int) -> int:
        return _ROWS * model.d_model if _fault(config) == "hoards" else 0

    def initialize(self) -> None:
        if self.fault == "raises":
            raise RuntimeError("told to raise")
        if self.fault == "hangs":
            time.sleep(3600)
        if self.fault == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault == "hoards":
            for part in self.hoard.detach().split(1 << 17):  # slowly: a limit is looked at twice a second
                part.fill_(1.0)
                time.sleep(0.1)


def _fault(config: Any) -> str:
    return "none" if Path("cured").exists() else str(config.fault)
