"""Checkpoints: a new folder a step, a pointer replaced atomically; safetensors, the rest loaded weights-only.

checkpoints/step-000220/weights.safetensors   names that know no parallelism
checkpoints/step-000220/adapters.safetensors  where adapters are trained: they, and the head of a task beside them
checkpoints/step-000220/training.pt           optimizer state, random generators, a recurrent model's memory: what a resume needs
checkpoints/step-000220/checkpoint.json       step, tokens, seconds, validation loss
checkpoints/last, checkpoints/best            text files that hold the name of a folder
checkpoints/average                           the names of the last few, a line each, where they are kept to be averaged
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ctxlab.data.tokenizers.base import Tokenizer
from ctxlab.data.tokenizers.sides import Tokenizers, are_apart, load_tokenizers
from ctxlab.data.tokenizers.until import Until
from ctxlab.errors import IncompatibleError, RecordError, RunError, UndefinedBeyondTraining
from ctxlab.model.base import Model, build_model, read_parts
from ctxlab.model.beam import beam_search
from ctxlab.model.generation import DecodingConfig, decode, generate, room
from ctxlab.records.store import Run, RunStore
from ctxlab.train.lora import ADAPTERS, is_adapted, plain_weights, save_adapters
from ctxlab.train.objectives.base import OBJECTIVES
from ctxlab.train.pairs import encode

WEIGHTS, TRAINING, FACTS = "weights.safetensors", "training.pt", "checkpoint.json"


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint on disk and its facts."""

    path: Path
    step: int
    tokens: int
    seconds: float
    validation_loss: float | None
    averaged: tuple[Path, ...] = ()  # whose weights' mean it stands for, where it is no single one


def save_checkpoint(
    folder: Path,
    *,
    model: nn.Module,
    training: dict[str, Any],
    step: int,
    tokens: int,
    seconds: float,
    validation_loss: float | None,
    base: str = "",
) -> Checkpoint:
    """Writes one checkpoint folder so that it is there whole or not at all.

    Adapters are written merged, and beside that by themselves: `base` is the sha256 of the weights that they belong to.
    Raises RunError with the system's reason (a full disk, say); what was there before stays untouched.
    """
    draft = folder / f".step-{step:06d}"
    facts = {"step": step, "tokens": tokens, "seconds": seconds, "validation_loss": validation_loss}
    try:
        shutil.rmtree(draft, ignore_errors=True)  # of a process that was killed while it wrote this very step
        draft.mkdir(parents=True)
        save_file({name: tensor.contiguous() for name, tensor in plain_weights(model).items()}, draft / WEIGHTS)
        if is_adapted(model):
            save_adapters(model, draft / ADAPTERS, base)
        with open(draft / TRAINING, "wb") as file:  # torch's own writer would not say why it failed
            torch.save(training, file)
        (draft / FACTS).write_text(json.dumps(facts))
        for path in (*draft.iterdir(), draft):
            _flush(path)
        final = _free_name(folder, step)
        os.replace(draft, final)
        _flush(folder)
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch and safetensors report a failed write as RuntimeError and SafetensorError.
        shutil.rmtree(draft, ignore_errors=True)
        raise RunError(f"the checkpoint of step {step} could not be written to {folder}: {_reason(error)}") from error
    return Checkpoint(final, step, tokens, seconds, validation_loss)


def point(folder: Path, pointer: str, checkpoint: Checkpoint) -> None:
    """Makes `last` or `best` name a checkpoint, atomically. Raises RunError with the system's reason."""
    _name(folder, pointer, [checkpoint.path.name])


def remember(folder: Path, checkpoint: Checkpoint, most: int) -> None:
    """Adds a checkpoint to those that `average` names, the last `most`, one a step: what a crash took back is not there twice.

    Raises RunError with the system's reason.
    """
    before = [name for name in _named(folder, "average") if int(name.split("-")[1]) < checkpoint.step]
    _name(folder, "average", [*before, checkpoint.path.name][-most:])


def _named(folder: Path, pointer: str) -> list[str]:
    return (folder / pointer).read_text().split() if (folder / pointer).exists() else []


def _name(folder: Path, pointer: str, names: Sequence[str]) -> None:
    draft = folder / f".{pointer}"
    try:
        draft.write_text("".join(f"{name}\n" for name in names))
        _flush(draft)
        os.replace(draft, folder / pointer)
        _flush(folder)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise RunError(f"checkpoint={pointer} could not be written to {folder}: {_reason(error)}") from error


def prune(folder: Path) -> None:
    """Removes checkpoints that no pointer names, and what a crash left half written. Those that are only averaged keep their
    weights alone."""
    whole = {*_named(folder, "last"), *_named(folder, "best")}
    averaged = set(_named(folder, "average"))
    for path in folder.glob("*step-*"):
        if path.name not in whole | averaged:
            shutil.rmtree(path, ignore_errors=True)
        elif path.name not in whole:
            (path / TRAINING).unlink(missing_ok=True)


def _free_name(folder: Path, step: int) -> Path:
    """A folder for a step that is not there yet: one that a pointer may name is never removed to be written anew."""
    name = f"step-{step:06d}"
    again = (folder / f"{name}-{number}" for number in itertools.count(2))
    return next(path for path in itertools.chain([folder / name], again) if not path.exists())


def _reason(error: BaseException) -> str:
    """What went wrong, on one line: the system's word where there is one, in the error or behind it."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def find_checkpoint(folder: Path, which: str = "last") -> Checkpoint:
    """The checkpoint that `last` or `best` names; of `average` the mean of the weights of those that it names.

    Raises RecordError when there is none or its files are damaged.
    """
    pointer = folder / which
    if not pointer.exists():
        hint = "; a run keeps what is averaged with trainer.average=5" if which == "average" else ""
        raise RecordError(f"checkpoint={which}: {folder} has no '{which}' checkpoint{hint}")
    path = folder
    try:
        *others, last = pointer.read_text().split() if which == "average" else [pointer.read_text().strip()]
        path = folder / last
        found = Checkpoint(path, **json.loads((path / FACTS).read_text()))
        if which != "average":
            return found
        return replace(found, validation_loss=None, averaged=tuple(folder / name for name in [*others, last]))
    except (OSError, ValueError, TypeError) as error:
        raise RecordError(f"checkpoint={which}: {path / FACTS} cannot be read: {_reason(error)}") from error


def load_weights(checkpoint: Checkpoint, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Its weights, or the mean of those that it is averaged of. Raises RecordError when a file is not whole."""
    path = checkpoint.path / WEIGHTS
    try:
        if not checkpoint.averaged:
            return load_file(path, device=str(device))
        with ExitStack() as stack:
            files = []
            for folder in checkpoint.averaged:
                path = folder / WEIGHTS
                files.append(stack.enter_context(safe_open(path, framework="pt", device=str(device))))
            return {name: _mean([file.get_tensor(name) for file in files]) for name in files[-1].keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise RecordError(f"{path} cannot be read: {_reason(error)}") from error


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    """Averaging the last checkpoints: Vaswani et al. 2017, arXiv:1706.03762, section 6.1. Summed in float64."""
    total = tensors[0].double()
    for tensor in tensors[1:]:
        total += tensor
    return (total / len(tensors)).to(tensors[0].dtype)


def weights_sha256(checkpoint: Checkpoint) -> str:
    """Of the file, by which it is known again; of an average, of those of its files."""
    found = []
    for path in checkpoint.averaged or (checkpoint.path,):
        with open(path / WEIGHTS, "rb") as file:
            found.append(hashlib.file_digest(file, "sha256").hexdigest())
    return found[0] if len(found) == 1 else hashlib.sha256("".join(found).encode()).hexdigest()


def load_training(checkpoint: Checkpoint) -> dict[str, Any]:
    """Optimizer state, generators and memory; unpickles tensors and plain containers only.

    Raises RecordError when the file is not whole.
    """
    path = checkpoint.path / TRAINING
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        whole = {name: state[name] for name in ("optimizer", "generators", "micro_rows")}
        return whole | {"memory": state.get("memory")}  # only recurrent models have one
    except Exception as error:  # torch.load raises a dozen types for a damaged file; each means the same here
        raise RecordError(f"{path} cannot be read: {_reason(error)}") from error


class LoadedRun:
    """A trained run, ready to use from Python: `.model`, `.tokenizer`, `.config`, `.generate(...)`, `.nats(text)`."""

    def __init__(self, run: Run, model: Model, tokenizers: Tokenizers, checkpoint: Checkpoint) -> None:
        self.run = run
        self.model = model
        self.tokenizers = tokenizers
        self.checkpoint = checkpoint

    @property
    def tokenizer(self) -> Tokenizer:
        """Of what it writes, and of all that it reads but sources with tokens of their own (`tokenizers.source`)."""
        return self.tokenizers.target

    @property
    def reading(self) -> Tokenizer:
        """Of a prompt."""
        return self.tokenizers.source if self.translates else self.tokenizer

    @property
    def config(self) -> dict[str, Any]:
        """The resolved config of the run, as recorded."""
        return self.run.record.config

    @property
    def context(self) -> int:
        """The context length that the run was trained at."""
        return int(self.config["context"])

    def stream(self, prompt: str, decoding: DecodingConfig | None = None, *, seed: int = 0) -> Iterator[str]:
        """Generated text piece by piece: what follows the prompt, or its translation by an encoder-decoder.

        An empty prompt is the beginning of a document. A beam search has it all at once, in the end.
        Raises UndefinedBeyondTraining, after all text that can be had, where the model has no position for the next token.
        """
        decoding = DecodingConfig() if decoding is None else decoding
        if decoding.num_beams > 1:
            short: list[int] = []
            yield self.texts([prompt], decoding, short=short.append)[0]
            if short:
                n = self.model.n_positions
                raise UndefinedBeyondTraining(f"position {n}: the model has {n} positions, from 0")
            return
        begun, encoded = self._begun([prompt])
        stop_ids = (self.tokenizer.eos_id,)
        ids = generate(self.model, begun[0], decoding, seed=seed, stop_ids=stop_ids, encoded=encoded)
        yield from Until(self.tokenizer.stream(ids), decoding.stops)

    def generate(self, prompt: str, *, seed: int = 0, **decoding: Any) -> str:
        """The continuation of `prompt` as one string. Keywords are those of `decoding.*` (HF's words)."""
        return "".join(self.stream(prompt, DecodingConfig.model_validate(decoding), seed=seed))

    def texts(
        self,
        prompts: Sequence[str],
        decoding: DecodingConfig | None = None,
        *,
        seed: int = 0,
        batch: int = 32,
        short: Callable[[int], None] = lambda _: None,
        advance: Callable[[int], None] = lambda _: None,
    ) -> list[str]:
        """The continuation of each prompt, `batch` of them side by side: prompt i as `generate` has it with seed + i.

        Where the model's positions end a text ends too, and `short` is told of which prompt; it is empty where they do not
        reach the prompt's own end.
        """
        decoding = DecodingConfig() if decoding is None else decoding
        stop_ids, stops = (self.tokenizer.eos_id,), decoding.stops
        lengths = [self.reading.count(prompt) for prompt in prompts]
        limits = [self._room(length, decoding) for length in lengths]
        order = sorted(range(len(prompts)), key=lengths.__getitem__)  # those side by side have like lengths
        read = [i for i in order if limits[i] > 0]  # a beginning of it: limits fall as lengths rise
        reach = max((len(stop.encode()) for stop in stops), default=0)  # tokens: each has a byte at least

        def is_over(new: list[int]) -> bool:
            return bool(stops) and any(stop in self.tokenizer.decode(new[-reach:]) for stop in stops)

        found = [""] * len(prompts)
        for first in range(0, len(read), batch):
            chosen = read[first : first + batch]
            begun, encoded = self._begun([prompts[i] for i in chosen])
            most = [limits[i] for i in chosen]
            if decoding.num_beams > 1:
                searched = beam_search(
                    self.model, begun, decoding, stop_ids=stop_ids, limits=most, is_over=is_over, encoded=encoded
                )
                said = [hypotheses[0].tokens for hypotheses in searched]
            else:
                said = decode(
                    self.model, begun, decoding, seeds=[seed + i for i in chosen], stop_ids=stop_ids, limits=most,
                    is_over=is_over, encoded=encoded,
                )  # fmt: skip
            for i, new in zip(chosen, said, strict=True):
                text = Until([self.tokenizer.decode(new)], stops)
                found[i] = "".join(text)
                if len(new) == limits[i] < decoding.max_new_tokens and not text.stopped:
                    short(i)
            advance(len(chosen))
        for i in order[len(read) :]:
            short(i)
            advance(1)
        return found

    def _room(self, length: int, decoding: DecodingConfig) -> int:
        """How many tokens can follow a prompt of this length, or be made of such a source; below 1: it cannot be read."""
        if not self.translates:
            return room(self.model, max(1, length), decoding)
        ends = self.model.n_positions
        return 0 if ends is not None and length + 1 > ends else room(self.model, 1, decoding)

    @property
    def translates(self) -> bool:
        """Whether a prompt is a source, of which a text of its own is made, and not a beginning."""
        return self.model.reads_source

    def _begun(self, prompts: Sequence[str]) -> tuple[list[list[int]], Any]:
        """What is gone on from, and what an encoder has made of the prompts where they are sources."""
        ids = [self.reading.encode(prompt) for prompt in prompts]
        if not self.translates:
            return [one or [self.tokenizer.bos_id] for one in ids], None
        with torch.inference_mode():
            encoded = encode(self.model, [[*one, self.reading.eos_id] for one in ids], self.reading.pad_id)
        return [[self.tokenizer.bos_id]] * len(prompts), encoded

    @torch.inference_mode()
    def nats(self, text: str, *, chunk: int = 2048) -> float:
        """-ln p(text), summed over all its tokens after the first, as one sequence scored chunk by chunk over a cache."""
        ids = torch.tensor([self.tokenizer.encode(text)], device=next(self.model.parameters()).device)
        inputs, targets = ids[:, :-1], ids[:, 1:]
        cache = self.model.new_cache()
        total = 0.0
        for start in range(0, inputs.shape[1], chunk):
            part = slice(start, start + chunk)
            hidden = self.model.hidden(inputs[:, part], cache=cache)
            total += float(self.model.nats(hidden, targets[:, part]).double().sum())
        return total


def open_run(
    run: Run,
    *,
    checkpoint: str = "last",
    device: torch.device | str = "cpu",
    attention: dict[str, Any] | None = None,
) -> LoadedRun:
    """Builds the model of a recorded run and loads its weights and its own copy of the tokenizer, or of both.

    `attention` takes the place of the recorded mechanism, where one without weights of its own is to be tried.
    """
    found = find_checkpoint(run.checkpoints, checkpoint)
    config = run.record.config
    tokenizers = load_tokenizers(run.path, apart=are_apart(config["tokenizer"]))
    if attention is not None:
        if config["attention"] == "none":
            raise IncompatibleError(f"attention: {run.id} has none (model={config['model']['name']}); leave it out")
        config = {**config, "attention": attention}
    with torch.device("meta"):
        model = build_model(
            read_parts(config),
            vocab_size=tokenizers.target.vocab_size,
            context=config["context"],
            source_vocab_size=tokenizers.source.vocab_size,
            prefix=reads_both_ways(config),
        )
        objective = OBJECTIVES.config(config.get("objective", {"name": "causal"}))
        model.task_head = OBJECTIVES.get(objective.name)(objective).head(model.config, run.record.provenance.data)
    weights = load_weights(found, device)
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise RecordError(f"{found.path / WEIGHTS} does not fit the run's config: {reason}") from error
    return LoadedRun(run, model.eval(), tokenizers, found)


def reads_both_ways(config: dict[str, Any]) -> bool:
    """Whether a run of this config was trained to read a prefix both ways."""
    return OBJECTIVES.get(config.get("objective", {"name": "causal"})["name"]).prefix


def load_run(selector: str, *, runs: str | Path | None = None, checkpoint: str = "last") -> LoadedRun:
    """`ctxlab.load`: a run by id, unique prefix, path or "last"."""
    root = Path(runs or os.environ.get("CTXLAB_RUNS") or "runs")
    return open_run(RunStore(root).resolve(selector), checkpoint=checkpoint)
