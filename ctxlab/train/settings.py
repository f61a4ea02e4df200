"""What `trainer:` in a config says: the budget, the batch, the machine, and when to look and to save."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from ctxlab.fields import Count, Length, OrAuto, OrNone, Seconds
from ctxlab.model.offload import OffloadSetting
from ctxlab.model.remake import RecomputeSetting
from ctxlab.registry import ComponentConfig
from ctxlab.train.compiling import CompileSetting
from ctxlab.train.optim.early import Update

UNCHANGED_BY: dict[str, Any] = {"identity": False}  # a field that changes no number: left out of a cell's identity


def _from_flag(value: Any) -> Any:
    """Records from before there were policies have true for block and false for none."""
    return {True: "block", False: "none"}[value] if isinstance(value, bool) else value


class ContextStage(ComponentConfig):
    """One stage of a length curriculum: the next `share` of the token budget is spent at `context`."""

    context: Length
    share: float = Field(gt=0, lt=1, description="part of the whole token budget spent at this context")


class LoraConfig(ComponentConfig):
    """Adapters that are trained in place of the weights of another run, and the head of a task beside them (see lora.py)."""

    r: OrNone | Count = Field("none", description="rank of what is added to a matrix; none: no adapters")
    alpha: float = Field(16.0, gt=0, description="what is added is multiplied by alpha / r")
    dropout: float = Field(0.0, ge=0, lt=1, description="of what the adapters read")
    targets: tuple[str, ...] = Field(
        ("query", "value"), min_length=1, description="matrices: query, key, value, out, gate, up, down"
    )


class TrainerConfig(ComponentConfig):
    """Budget, batch, machine, validation and checkpoints of a training run.

    The first budget reached ends the run; at least one is set. `batch_tokens` is the number of tokens an optimizer step
    sees at every context; the micro-batch only decides how many of its rows are in memory at once and changes no result
    beyond the order of a sum.
    """

    max_tokens: OrNone | Count = Field("none", description="budget in training tokens, e.g. 5M")
    max_steps: OrNone | Count = Field("none", description="budget in optimizer steps")
    max_time: OrNone | Seconds = Field(
        "none", description="budget in seconds of training, e.g. 15min; alone it needs schedule=wsd or constant"
    )
    batch_tokens: Count = Field(4096, description="tokens of one optimizer step, the same at every context")
    micro_batch: OrAuto | int = Field(
        "auto", description="rows in memory at once; auto fits total memory by closed form"
    )
    freeze: tuple[str, ...] = Field(
        (), description="parameters that stay as they are, by name or pattern: embedding, blocks.0, '*.attention.*'"
    )
    lora: LoraConfig = LoraConfig()
    context_schedule: tuple[ContextStage, ...] = Field((), description="length curriculum before the final context")
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    devices: int = Field(1, ge=1)
    strategy: Literal["auto", "ddp"] = "auto"
    recompute: Annotated[RecomputeSetting, BeforeValidator(_from_flag)] = Field(
        "none",
        description="what backward computes again instead of keeping it: nothing that takes time, feed-forward layers, or "
        "whole blocks; auto: the least that fits the machine",
    )
    offload: OffloadSetting = Field(
        "none",
        description="where what backward needs waits: cpu, the host's memory, pinned, and not the GPU's; disk, the cache folder",
    )
    loss_chunk: OrAuto | int = Field("auto", description="tokens whose logits exist at once in the loss")
    update: Update = Field(
        "step",
        description="when weights are updated: in one step behind the backward pass, or each within it as soon as its "
        "gradient is complete, which is freed at once",
    )
    compile: CompileSetting = Field(
        False, description="torch.compile; auto: where the run is so long that it pays, never on a CPU"
    )
    validate_every: OrAuto | OrNone | Count = Field("auto", description="steps between validations; auto: 5 in a run")
    validate_tokens: Count = Field(32_768, description="validation tokens scored each time")
    log_every: Count = Field(1, json_schema_extra=UNCHANGED_BY)
    checkpoint_every: OrAuto | OrNone | Count = Field(
        "auto", description="steps between checkpoints; auto: 10 in a run"
    )
    average: OrNone | int = Field(
        "none", description="last checkpoints whose weights are kept, to be averaged by checkpoint=average"
    )

    @model_validator(mode="after")
    def _some_budget(self) -> TrainerConfig:
        if self.max_tokens == self.max_steps == self.max_time == "none":
            raise ValueError("trainer: set one of max_tokens, max_steps, max_time")
        if isinstance(self.micro_batch, int) and self.micro_batch < 1:
            raise ValueError(f"micro_batch: expected a number >= 1 or auto, got {self.micro_batch}")
        if isinstance(self.average, int) and self.average < 2:
            raise ValueError(f"average: expected a number >= 2 or none, got {self.average}")
        if isinstance(self.loss_chunk, int) and self.loss_chunk < 1:
            raise ValueError(f"loss_chunk: expected a number >= 1 or auto, got {self.loss_chunk}")
        if sum(stage.share for stage in self.context_schedule) >= 1:
            raise ValueError("context_schedule: the shares must add up to less than 1 (the rest is spent at `context`)")
        return self
