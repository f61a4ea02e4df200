"""Adapters: what is trained and what stays, merged and apart, on disk and on the way back."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ctxlab.config.overrides import split
from ctxlab.config.prepare import prepare
from ctxlab.data.tokenizers.byte import Byte
from ctxlab.data.tokenizers.sides import Tokenizers
from ctxlab.errors import ConfigError, RecordError
from ctxlab.train import lora
from ctxlab.train.initial import Initial
from ctxlab.train.settings import LoraConfig
from tests.model.builders import build, tokens
from tests.train.builders import Trained, command, dataset, last_files, line, settings, the_run, train

pytest.importorskip("peft")

BYTES = Byte(Byte.Config())
TARGETS = ("query", "value", "down")
ADAPTED = [f"blocks.{layer}.{name}.weight" for layer in (0, 1) for name in ("attention.query", "attention.value",
                                                                              "feed_forward.down")]  # fmt: skip


def config(**trainer: Any) -> Any:
    chosen = {"r": 2, "alpha": 6.0, "dropout": 0.1, "targets": TARGETS}
    return settings(**{"max_steps": 4, "lora": chosen, "optimizer": {"learning_rate": 0.05}, **trainer})


@pytest.fixture
def base(tmp_path: Path) -> Trained:
    return train(tmp_path, dataset(tmp_path), settings(max_steps=2), "base")


def on(base: Trained, sha256: str = "abc") -> Initial:
    return Initial(base.weights, "rope", Tokenizers.joint(BYTES), sha256=sha256)


def test_nothing_changes_before_the_first_step_and_merged_is_apart() -> None:
    model, plain, ids = build(), build(), tokens(2, 20)
    lora.adapt(model, LoraConfig(r=3, alpha=6.0, targets=TARGETS))
    assert torch.equal(model(ids), plain(ids))
    assert {name.rpartition(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad} == {
        name.removesuffix(".weight") for name in ADAPTED
    }
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.normal_(std=0.2)
    apart = model(ids)
    assert (apart - plain(ids)).abs().max() > 0.1
    again = build(seed=4)
    again.load_state_dict(lora.plain_weights(model))
    torch.testing.assert_close(again(ids), apart, atol=1e-5, rtol=1e-5)
    lora.merge(model)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(model(ids), again(ids))


@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_adapters_alone_learn_and_what_is_saved_is_whole(tmp_path: Path, base: Trained, optim: str) -> None:
    """A matrix on disk is W + (alpha / r) B A of the adapters beside it; every other weight is the run's, to the bit."""
    done = train(tmp_path, dataset(tmp_path), config(optim=optim), "child", initial=on(base))
    folder = done.folder / (done.folder / "last").read_text().strip()
    weights, adapters = load_file(folder / "weights.safetensors"), load_file(folder / "adapters.safetensors")
    assert weights.keys() == base.weights.keys()
    for name, weight in weights.items():
        if name not in ADAPTED:
            assert torch.equal(weight, base.weights[name]), name
            continue
        owner = name.removesuffix(".weight")
        a, b = (adapters[f"{owner}.lora_{part}.default.weight"].double() for part in "AB")
        assert (a.shape[0], b.shape[1]) == (2, 2)
        torch.testing.assert_close(weight.double(), base.weights[name].double() + 3.0 * b @ a, atol=1e-6, rtol=0)
        assert (weight - base.weights[name]).abs().max() > 1e-4
    assert len(adapters) == 2 * len(ADAPTED)
    assert all(
        torch.equal(weight, done.weights[name]) for name, weight in weights.items()
    )  # what is evaluated in the end
    assert done.outcome.resolved["trained_parameters"] == sum(tensor.numel() for tensor in adapters.values())


def test_it_goes_on_to_the_last_bit(tmp_path: Path, base: Trained) -> None:
    data = dataset(tmp_path)
    how = {"optimizer": {"learning_rate": 0.05, "schedule": "constant"}}
    whole = train(tmp_path, data, config(**how), "whole", initial=on(base))
    train(tmp_path, data, config(max_steps=2, **how), "parts", initial=on(base))
    parts = train(tmp_path, data, config(**how), "parts", initial=on(base), resume=True)
    assert all(torch.equal(weight, parts.weights[name]) for name, weight in whole.weights.items())
    assert [row["loss"] for row in parts.rows.of("train")] == [row["loss"] for row in whole.rows.of("train")][2:]
    with pytest.raises(
        RecordError, match=r"resume: the adapters in .* \(sha256 abc\) that are not the last .* \(now xyz\)"
    ):
        train(tmp_path, data, config(max_steps=6, **how), "parts", initial=on(base, "xyz"), resume=True)


def test_what_cannot_be_adapted_is_refused(tmp_path: Path, base: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"trainer.lora.targets: no matrix is called 'querry'; did you mean 'query'"):
        lora.adapt(build(), LoraConfig(r=2, targets=("querry",)))
    with pytest.raises(ConfigError, match=r"trainer.lora.targets: no matrix is called 'head'"):
        lora.adapt(build(tie_embeddings=False), LoraConfig(r=2, targets=("head",)))
    said = r"trainer.lora.r: adapters alone are trained, and position.weight \(32 x 16\) would stay as drawn"
    with pytest.raises(ConfigError, match=said):
        train(tmp_path, dataset(tmp_path), config(position="learned"), "learned", initial=on(base))
    (cell,) = prepare(split("train", ["model=nano", "trainer.lora.r=4"])).cells
    assert cell.skipped == "trainer.lora.r: adapters are trained on the weights of another run; add init=RUN"
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"^trainer.lora.r: needs peft; pip install 'ctxlab\[lora\]'$"):
        lora.check_installed()


def test_a_child_is_whole_without_its_parent_but_for_a_resume(tmp_path: Path) -> None:
    assert command(tmp_path, *line(tmp_path, "trainer.max_steps=2", name="parent")).code == 0
    parent = the_run(tmp_path, "parent")
    words = (
        f"init={parent.id}",
        "trainer.lora.r=2",
        "trainer.max_steps=4",
        "trainer.checkpoint_every=1",
        "optim=adamw",
    )
    own = [word for word in line(tmp_path, *words, name="child") if not word.startswith(("model", "tokenizer"))]
    command(tmp_path, *own, at_step=2)
    child = the_run(tmp_path, "child")
    assert child.record.parent == parent.id
    shutil.move(parent.path, tmp_path / "elsewhere")
    shown = command(tmp_path, "generate", child.id, "to be", "decoding.max_new_tokens=3")
    assert shown.code == 0, shown.stderr
    refused = command(tmp_path, "train", f"resume={child.id}")
    assert refused.code == 2
    assert f"resume: {child.id} trains adapters on the weights of {parent.id}, which cannot be read" in refused.stderr
    shutil.move(tmp_path / "elsewhere", parent.path)
    assert command(tmp_path, "train", f"resume={child.id}").code == 0
    assert the_run(tmp_path, "child").record.status == "done"
    assert (last_files(child) / "adapters.safetensors").exists()
