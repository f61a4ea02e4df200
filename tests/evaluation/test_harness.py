"""lm-evaluation-harness over a small model: its scores against likelihoods and answers found without it."""

from __future__ import annotations

import math
import random
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ctxlab.data.tokenizers.base import TOKENIZERS, Tokenizer
from ctxlab.data.tokenizers.byte import Byte
from ctxlab.errors import ConfigError
from ctxlab.evaluation.intervals import student_t_quantile
from ctxlab.model.generation import DecodingConfig, generate
from ctxlab.model.transformer import Transformer
from ctxlab.records.schema import Measurement
from tests.evaluation.harness_tasks import (
    CHOICES,
    PROMPTS,
    TEXTS,
    write_answers,
    write_choices,
    write_task,
    write_texts,
)
from tests.model.builders import build

pytest.importorskip("lm_eval", reason="needs the extra lm-eval")

from lm_eval.api.instance import Instance
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from ctxlab.evaluation import harness
from ctxlab.evaluation.harness import HarnessConfig, check_harness, evaluate_harness
from ctxlab.evaluation.harness_model import HarnessModel, decoding_of

CPU = torch.device("cpu")
BYTES = Byte(Byte.Config())
ALPHABET = string.ascii_lowercase + " "


class Letters(Tokenizer):
    """Lower-case letters and spaces: what an untrained model says is text."""

    def encode_lines(self, lines: Sequence[str]) -> list[list[int]]:
        return [[ALPHABET.index(letter) + 3 for letter in line] for line in lines]

    @classmethod
    def make(cls, config: Any, sample: Any) -> Tokenizer:
        return cls(config, [b"", b"", b"", *(letter.encode() for letter in ALPHABET)], pad=0, bos=1, eos=2)

    restore = make  # type: ignore[assignment]

    def files(self) -> dict[str, bytes]:
        return {}


LETTERS = Letters.make(Letters.Config(name="letters"), ())


@pytest.fixture
def own_tasks_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness's own list of tasks takes seconds to read."""
    listed = harness._listed
    monkeypatch.setattr(harness, "_listed", lambda folder, everything: listed(folder, False))


@pytest.fixture(scope="module")
def model() -> Transformer:
    return build("rope", vocab_size=BYTES.vocab_size).double()


@pytest.fixture(scope="module")
def speller() -> Transformer:
    """A model of LETTERS."""
    return build("rope", vocab_size=LETTERS.vocab_size).double()


def asked(kind: str, *arguments: Any) -> list[Instance]:
    return [Instance(kind, {}, given, 0) for given in arguments]  # type: ignore[arg-type]


def harness_model(model: Transformer, tokenizer: Tokenizer = BYTES, **options: Any) -> HarnessModel:
    defaults: dict[str, Any] = {
        "max_length": 64, "device": CPU, "precision": "fp32", "batch_tokens": 256, "seed": 1,
        "progress": lambda text, total: lambda n: None,
    }  # fmt: skip
    return HarnessModel(model, tokenizer, **defaults | options)


def evaluated(
    model: Transformer, folder: Path, *tasks: str, tokenizer: Tokenizer = BYTES, **settings: Any
) -> list[Measurement]:
    config = HarnessConfig(tasks=tasks, include_path=str(folder), **settings)
    found = evaluate_harness(model, tokenizer, config, trained_context=64, device=CPU, precision="fp32", seed=1)
    return [m for rows in found for m in rows]


def by_metric(rows: list[Measurement]) -> dict[str, Measurement]:
    return {f"{m.axes['harness']} {m.axes.get('metric')}": m for m in rows}


def ln_p(model: Transformer, context: list[int], continuation: list[int]) -> float:
    """ln p of a continuation: one forward, a softmax over all logits, a sum."""
    if not continuation:
        return 0.0
    ids = torch.tensor([context + continuation])
    with torch.no_grad():
        scores = model(ids[:, :-1]).log_softmax(-1)[0]
    return sum(scores[len(context) - 1 + i, token].item() for i, token in enumerate(continuation))


def answer(model: Transformer, prompt: str, **decoding: Any) -> str:
    """ctxlab's generation, whole."""
    ids = LETTERS.encode(prompt) or [LETTERS.bos_id]
    return LETTERS.decode(generate(model, ids, DecodingConfig(**decoding), stop_ids=(LETTERS.eos_id,)))


# The three kinds of requests


def test_likelihoods_of_continuations(model: Transformer) -> None:
    pairs = [("a b", " c"), ("a b ", "c"), ("", "hello"), ("x", ""), ("  ", "y")]
    found = harness_model(model).loglikelihood(asked("loglikelihood", *pairs))
    said = [("a b", " c"), ("a b", " c"), ("", "hello"), ("x", ""), ("", "  y")]  # spaces go to the continuation
    for (context, continuation), (value, _) in zip(said, found, strict=True):
        before = BYTES.encode(context) or [BYTES.bos_id]
        assert value == pytest.approx(ln_p(model, before, BYTES.encode(continuation)), rel=1e-9, abs=1e-12)


def test_greedy_is_what_generation_says(speller: Transformer) -> None:
    best = answer(speller, "a b", temperature=0, max_new_tokens=2)
    wrong = best[0] + ("x" if best[1] != "x" else "y")
    found = harness_model(speller, LETTERS).loglikelihood(asked("loglikelihood", ("a b", best), ("a b", wrong)))
    assert [is_greedy for _, is_greedy in found] == [True, False]


def test_a_token_that_reaches_over_the_border_is_scored() -> None:
    """`ab|c` where the tokenizer has a piece for `bc`: scored is everything from the first token that the context alone lacks."""
    kind = TOKENIZERS.get("bpe")
    tokenizer = kind.make(kind.Config(name="bpe", vocab_size=300), ["abcabcabc abc xabc abcd\n" * 50])
    model = build("rope", vocab_size=tokenizer.vocab_size).double()
    for context, continuation in (("xa", "bc abc"), ("ab", "cabc"), ("abc", " abc")):
        whole, alone = tokenizer.encode(context + continuation), tokenizer.encode(context)
        shared = 0
        while shared < min(len(whole), len(alone)) and whole[shared] == alone[shared]:
            shared += 1
        before, scored = (whole[:shared], whole[shared:]) if shared else ([tokenizer.bos_id], whole)
        ((value, _),) = harness_model(model, tokenizer).loglikelihood(
            asked("loglikelihood", (context, continuation))
        )  # fmt: skip
        assert value == pytest.approx(ln_p(model, before, scored), rel=1e-9)
        assert tokenizer.decode(before + scored) == context + continuation, "a weak test: text is lost"


@pytest.mark.parametrize("max_length", [7, 16, 64])
def test_rolling_likelihoods_are_those_of_the_harnesses_own_windows(model: Transformer, max_length: int) -> None:
    found = harness_model(model, max_length=max_length).loglikelihood_rolling(
        asked("loglikelihood_rolling", *((text,) for text in (*TEXTS, "")))
    )
    for text, value in zip((*TEXTS, ""), found, strict=True):
        windows = get_rolling_token_windows(BYTES.encode(text), BYTES.bos_id, max_length, 1)
        expected = sum(ln_p(model, *make_disjoint_window(window)) for window in windows)
        assert value == pytest.approx(expected, rel=1e-9)


def test_answers_are_ctxlabs_generation(speller: Transformer) -> None:
    given = {"until": ["0"], "max_gen_toks": 20}
    found = harness_model(speller, LETTERS).generate_until(
        asked("generate_until", *((prompt, given) for prompt in PROMPTS))
    )
    assert found == [answer(speller, prompt, temperature=0, max_new_tokens=20) for prompt in PROMPTS]
    assert len(set(found)) > 1


def test_answers_end_before_the_first_stop_string(speller: Transformer) -> None:
    whole = answer(speller, "a b", temperature=0, max_new_tokens=20)
    stops = [whole[9:11], whole[5:8], "0"]
    (found,) = harness_model(speller, LETTERS).generate_until(
        asked("generate_until", ("a b", {"until": stops, "max_gen_toks": 20}))
    )
    assert found == whole[: min(whole.index(stop) for stop in stops[:2])]
    (one,) = harness_model(speller, LETTERS).generate_until(
        asked("generate_until", ("a b", {"until": whole[3], "max_tokens": 20}))
    )
    assert one == whole[: whole.index(whole[3])]


def test_sampled_answers_differ_and_come_again(speller: Transformer) -> None:
    given = {"until": [], "max_gen_toks": 20, "do_sample": True, "temperature": 0.9, "top_p": 0.95}
    requests = asked("generate_until", *[("a b", given)] * 3)
    first, again = (harness_model(speller, LETTERS).generate_until(requests) for _ in range(2))
    assert first == again
    assert len(set(first)) == 3
    assert harness_model(speller, LETTERS, seed=9).generate_until(requests) != first


def test_a_prompt_leaves_room_for_its_answer(speller: Transformer) -> None:
    """At 16 positions: 12 new tokens leave 4 to the prompt, which keeps 8 all the same, and the answer gets the other 9."""
    lm = harness_model(speller, LETTERS, max_length=16)
    prompt, given = "the quick brown fox", {"until": [], "max_gen_toks": 4}
    (found,) = lm.generate_until(asked("generate_until", (prompt, given)))
    assert found == answer(speller, prompt[-12:], temperature=0, max_new_tokens=4)
    assert (lm.counts.requests, lm.counts.cut, lm.counts.shortened) == (1, 1, 0)
    (found,) = lm.generate_until(asked("generate_until", (prompt, given | {"max_gen_toks": 12})))
    assert found == answer(speller, prompt[-8:], temperature=0, max_new_tokens=9)
    assert (lm.counts.requests, lm.counts.cut, lm.counts.shortened) == (2, 2, 1)


def test_contexts_that_are_cut_are_counted(model: Transformer) -> None:
    lm = harness_model(model, max_length=8)
    ((value, _), _) = lm.loglikelihood(asked("loglikelihood", ("the quick brown", " fox"), ("a", "b")))
    kept = BYTES.encode("the quick brown fox")[-9:]
    assert value == pytest.approx(ln_p(model, kept[:5], kept[5:]), rel=1e-9)
    assert (lm.counts.requests, lm.counts.cut) == (2, 1)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (256, 0.0, 0, 1.0)),
        ({"do_sample": False, "temperature": 0.7}, (256, 0.0, 0, 1.0)),
        ({"temperature": 0.7, "max_new_tokens": 3}, (3, 0.7, 0, 1.0)),
        ({"do_sample": True, "top_k": 50, "top_p": 0.9}, (256, 1.0, 50, 0.9)),
        ({"do_sample": True, "temperature": 0.0}, (256, 0.0, 0, 1.0)),
        ({"max_gen_toks": 5, "max_tokens": 9, "num_beams": 1}, (5, 0.0, 0, 1.0)),
    ],
)
def test_generation_kwargs_are_our_settings(given: dict[str, Any], expected: tuple[Any, ...]) -> None:
    found, until = decoding_of(given | {"until": ["\n", ""]})
    assert (found.max_new_tokens, found.temperature, found.top_k, found.top_p) == expected
    assert until == ["\n"]


@pytest.mark.parametrize(
    ("given", "said"),
    [({"num_beams": 4}, "ask for num_beams, which"), ({"do_sample": True, "top_p": 2.0}, "ask for top_p=2.0: ")],
)
def test_what_our_decoding_does_not_have_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        decoding_of(given)


# Whole tasks


def test_multiple_choice_is_the_argmax_of_the_likelihoods(model: Transformer, tmp_path: Path) -> None:
    write_choices(tmp_path)
    rows = by_metric(evaluated(model, tmp_path, "choices"))
    right, right_per_character = [], []
    for item in CHOICES:
        context, spaces = item["question"].rstrip(), item["question"][len(item["question"].rstrip()) :]
        before = BYTES.encode(context) or [BYTES.bos_id]
        values = [ln_p(model, before, BYTES.encode(spaces + choice)) for choice in item["choices"]]
        right.append(float(np.argmax(values) == item["gold"]))
        per_character = [value / len(choice) for value, choice in zip(values, item["choices"], strict=True)]
        right_per_character.append(float(np.argmax(per_character) == item["gold"]))
    assert 0 < sum(right) < len(right), "a weak test"
    acc, acc_norm = rows["choices acc"], rows["choices acc_norm"]
    assert (acc.name, acc.value) == ("accuracy", pytest.approx(np.mean(right)))
    assert acc_norm.value == pytest.approx(np.mean(right_per_character))
    half = 1.96 * np.std(right, ddof=1) / math.sqrt(len(right))
    assert (acc.low, acc.high) == pytest.approx((np.mean(right) - half, np.mean(right) + half))
    assert (acc.n_docs, acc.protocol[:22]) == (5, "lm-evaluation-harness ")
    assert acc.axes == {"harness": "choices", "metric": "acc", "filter": "none"}
    expected = {"task_version": 1.5, "num_fewshot": 0, "higher_is_better": True, "max_length": 64, "requests": 15}
    assert expected.items() <= acc.facts.items()


def test_perplexities_are_ratios_over_documents(model: Transformer, tmp_path: Path) -> None:
    write_texts(tmp_path)
    rows = by_metric(evaluated(model, tmp_path, "texts"))
    nats = [
        -sum(
            ln_p(model, *make_disjoint_window(window))
            for window in get_rolling_token_windows(BYTES.encode(text), BYTES.bos_id, 64, 1)
        )
        for text in TEXTS
    ]
    n_bytes = [len(text.encode()) for text in TEXTS]
    per_byte = sum(nats) / sum(n_bytes)
    bits, per_word = rows["texts bits_per_byte"], rows["texts word_perplexity"]
    assert bits.value == pytest.approx(per_byte / math.log(2), rel=1e-9)
    assert rows["texts byte_perplexity"].value == pytest.approx(math.exp(per_byte), rel=1e-9)
    n_words = [len(text.split(" ")) if text != TEXTS[0] else 4 for text in TEXTS]  # re.split(r"\s+", ...), by hand
    assert per_word.value == pytest.approx(math.exp(sum(nats) / sum(n_words)), rel=1e-9)
    assert [m.normaliser for m in rows.values()] == ["word", "byte", "byte"]
    assert [m.name for m in rows.values()] == ["perplexity", "perplexity", "bits_per_byte"]
    residuals = [n - per_byte * b for n, b in zip(nats, n_bytes, strict=True)]
    error = math.sqrt(sum(r * r for r in residuals) / (3 * 2)) / (sum(n_bytes) / 3) / math.log(2)
    assert bits.high == pytest.approx(bits.value + student_t_quantile(0.975, 2) * error, rel=1e-9)


def test_exact_matches_of_answers(speller: Transformer, tmp_path: Path) -> None:
    right = [answer(speller, prompt, temperature=0, max_new_tokens=12) for prompt in PROMPTS]
    write_answers(tmp_path, [right[0], "no", right[2], right[3]])
    (row,) = evaluated(speller, tmp_path, "answers", tokenizer=LETTERS)
    assert (row.name, row.value, row.n_docs) == ("accuracy", 0.75, 4)


def test_metrics_that_we_do_not_have_are_scores(model: Transformer, tmp_path: Path) -> None:
    write_choices(
        tmp_path, metric_list=[{"metric": "brier_score", "aggregation": "brier_score", "higher_is_better": False}]
    )
    (row,) = evaluated(model, tmp_path, "choices")
    assert (row.name, row.unit, row.axes["metric"]) == ("score", "1", "brier_score")
    assert row.facts["higher_is_better"] is False
    assert 0 < row.value < 2  # type: ignore[operator]


@pytest.mark.usefixtures("own_tasks_only")
def test_examples_items_and_groups(model: Transformer, tmp_path: Path) -> None:
    write_choices(tmp_path, fewshot_split="test")
    write_choices(tmp_path, "zero", num_fewshot=0)
    write_texts(tmp_path)
    (tmp_path / "both.yaml").write_text(
        "group: both\ntask: [choices, zero]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    rows = by_metric(evaluated(model, tmp_path, "both", "choices", "texts", num_fewshot=2, limit=3, max_length="auto"))
    shots = {name: m.facts["num_fewshot"] for name, m in rows.items()}
    assert shots == {
        "choices acc": 2, "choices acc_norm": 2, "zero acc": 0, "zero acc_norm": 0, "both acc": None,
        "texts word_perplexity": 0, "texts byte_perplexity": 0, "texts bits_per_byte": 0,
    }  # fmt: skip
    assert {m.axes["limit"] for m in rows.values()} == {3}
    assert {m.axes["num_fewshot"] for m in rows.values()} == {2}
    assert [rows[name].n_docs for name in ("both acc", "choices acc", "texts bits_per_byte")] == [6, 3, 3]
    mean = (rows["choices acc"].value + rows["zero acc"].value) / 2  # type: ignore[operator]
    assert rows["both acc"].value == pytest.approx(mean)


# What goes wrong


def test_a_task_that_fails_says_why_and_the_next_is_scored(model: Transformer, tmp_path: Path) -> None:
    write_choices(tmp_path)
    write_choices(tmp_path, "gone")
    (tmp_path / "gone.json").unlink()
    write_answers(tmp_path, PROMPTS, "beams", num_beams=4)
    write_choices(tmp_path, "broken", doc_to_text="{{question | nothing}}")
    write_task(tmp_path, "odd", [{"a": 1}], output_type="nonsense")
    rows = evaluated(model, tmp_path, "gone", "beams", "broken", "odd", "choices")
    found = {m.axes["harness"]: (m.status, m.reason) for m in rows if m.value is None}
    assert {task: status for task, (status, _) in found.items()} == {
        "gone": "no_document", "beams": "failed", "broken": "failed", "odd": "failed",
    }  # fmt: skip
    assert found["gone"][1].startswith("its data are not on this machine and could not be fetched (FileNotFoundError:")
    assert found["beams"][1] == "its generation_kwargs ask for num_beams, which decoding here does not have"
    assert "nothing" in found["broken"][1]
    assert "nonsense" in found["odd"][1]
    assert [m.axes["metric"] for m in rows if m.value is not None] == ["acc", "acc_norm"]


def test_a_length_without_positions_is_undefined(tmp_path: Path) -> None:
    write_texts(tmp_path)
    learned = build("learned", context=64, vocab_size=BYTES.vocab_size)
    (row,) = evaluated(learned, tmp_path, "texts", max_length=128)
    assert (row.status, row.value) == ("undefined", None)
    assert len(evaluated(learned, tmp_path, "texts")) == 3


def test_a_model_that_fails_is_not_the_tasks_fault(
    model: Transformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(*args: Any, **more: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    write_choices(tmp_path)
    monkeypatch.setattr(model, "hidden", out_of_memory)
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        evaluated(model, tmp_path, "choices")


def test_nothing_is_printed_and_random_numbers_go_on(
    model: Transformer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bootstrapped = {"metric": "acc", "aggregation": "median", "higher_is_better": True}
    write_choices(tmp_path, metric_list=[bootstrapped])
    random.seed(5)
    np.random.seed(5)
    expected = random.Random(5).random(), np.random.RandomState(5).rand()
    (row,) = evaluated(model, tmp_path, "choices")
    assert row.facts["stderr"] > 0, "a weak test"
    assert (random.random(), np.random.rand()) == expected
    assert capfd.readouterr() == ("", "")


# What is refused before anything starts


def config(folder: Path | None, *tasks: str) -> HarnessConfig:
    return HarnessConfig(tasks=tasks, include_path="none" if folder is None else str(folder))


@pytest.mark.usefixtures("own_tasks_only")
def test_unknown_tasks_are_named_with_the_nearest(tmp_path: Path) -> None:
    write_choices(tmp_path)
    check_harness(config(tmp_path, "choices"))
    with pytest.raises(ConfigError) as raised:
        check_harness(config(tmp_path, "choises", "choices", "0000"))
    assert str(raised.value).splitlines() == [
        f"eval.lm_eval.tasks: neither the harness nor {tmp_path} has a task 'choises'; did you mean 'choices'?",
        f"eval.lm_eval.tasks: neither the harness nor {tmp_path} has a task '0000'; "
        "`lm-eval ls tasks` lists those that there are",
    ]


@pytest.mark.slow
def test_the_harnesss_own_tasks_are_known(tmp_path: Path) -> None:
    write_choices(tmp_path)
    check_harness(config(tmp_path, "choices", "arc_easy", "mmlu"))
    with pytest.raises(ConfigError, match=r"the harness has no task 'arc_eazy'; did you mean 'arc_easy'\?$"):
        check_harness(config(None, "arc_eazy"))


def test_a_folder_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"include_path: there is no folder .*missing$"):
        check_harness(config(tmp_path / "missing", "choices"))
    (tmp_path / "bad.yaml").write_text("task: bad\n  metric: [acc\n")
    with pytest.raises(ConfigError, match=r"^eval.lm_eval.include_path: .*bad.yaml:2: not valid YAML: "):
        check_harness(config(tmp_path, "bad"))
