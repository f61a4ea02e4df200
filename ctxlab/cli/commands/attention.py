"""`ctxlab attention`: what every head of a run attends to in a text, in the terminal, as a page and as a picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from rich.console import Console
from rich.text import Text

from ctxlab.cli.console import progress_bar
from ctxlab.cli.main import DONE
from ctxlab.data.tokenizers.base import Tokenizer
from ctxlab.data.tokenizers.shown import shown, visible, words_of
from ctxlab.data.tokenizers.sides import Tokenizers
from ctxlab.errors import ConfigError, UndefinedBeyondTraining
from ctxlab.evaluation import heads as seeing
from ctxlab.model.beam import beam_search
from ctxlab.model.generation import decode, room
from ctxlab.model.seeing import KINDS, Kind, attentions, check_asked
from ctxlab.report import attention as report
from ctxlab.report.attention_page import page
from ctxlab.report.plots import save
from ctxlab.train.checkpoint import LoadedRun, open_run
from ctxlab.train.pairs import encode
from ctxlab.train.precision import autocast, precision_of_runs, resolve_device

if TYPE_CHECKING:
    from ctxlab.cli.invocation import Invocation
    from ctxlab.config.schema import AttentionConfig

_PICTURES = (".png", ".svg")
_PLAIN = " \n\t"  # what is read of a text as it stands
_TERMINAL, _PAGE, _PICTURE = "terminal", "page", "picture"


class _Side(NamedTuple):
    """Tokens, and what they are tokens of."""

    tokenizer: Tokenizer
    ids: Sequence[int]


@dataclass(frozen=True)
class _Reading:
    """What is read: tokens, and of an encoder-decoder the source, with the token that ends what was written, if one did."""

    tokenizers: Tokenizers
    tokens: list[int]
    source: list[int] | None = None
    end: tuple[int, ...] = ()

    def of(self, kind: Kind) -> tuple[_Side, _Side]:
        """The tokens that attend and those that are attended to."""
        own = _Side(self.tokenizers.target, self.tokens)
        source = _Side(self.tokenizers.source, self.source or [])
        return {"encoder": (source, source), "self": (own, own), "cross": (own, source)}[kind]


def run(config: AttentionConfig, invocation: Invocation) -> int:
    """Draws the heads that are asked for. Raises ConfigError for what the run does not have, and for a file of another kind."""
    device = resolve_device(config.trainer.accelerator)
    loaded = open_run(invocation.store.resolve(config.run), checkpoint=config.checkpoint, device=device)
    precision = precision_of_runs(config.trainer.precision, device, [loaded.run.record.provenance.precision])
    loaded.model = loaded.model.as_ours()  # what somebody else computes cannot be looked into
    files = _files(config.file, loaded.run.id)
    kinds = _kinds(loaded, config)
    layers, heads = (None if asked == "all" else [n - 1 for n in asked] for asked in (config.layers, config.heads))
    text = _text(config)
    console = invocation.stdout_console
    try:
        with autocast(precision, device), progress_bar(invocation.stderr_console) as start:
            reading = _read(loaded, config, text)
            each = loaded.model.config.n_heads if heads is None else len(heads)
            asked = [
                kind
                for kind, layer, _ in attentions(loaded.model)
                if kind in kinds and (layers is None or layer in layers)
            ]
            n = each * len(asked)
            groups = _groups(reading, kinds, config, console.width, n)
            rows = each * sum(len(reading.of(kind)[0].ids) for kind in asked)
            advance = start(f"looking at {n} head{'' if n == 1 else 's'}", rows)
            induction = _induction(loaded, config) if "self" in kinds else None
            found, hidden, cross = seeing.see(
                loaded.model, reading.tokens, groups,
                kinds=kinds, layers=layers, heads=heads, source=reading.source, induction=induction, advance=advance,
            )  # fmt: skip
            written = (
                [] if cross is None else seeing.steps(loaded.model, hidden, cross, [*reading.tokens, *reading.end])
            )
    except UndefinedBeyondTraining as end:
        raise ConfigError(f"{_too_long(loaded, config, text)}: is too long for the run: {end}") from end
    _draw(loaded, reading, found, groups, _labelled(reading, written), files, console)
    return DONE


def _files(setting: str, run_id: str) -> list[Path]:
    if setting == "none":
        return []
    files = [
        Path(f"attention-{run_id}{end}" if setting == "auto" else setting).expanduser() for end in (".html", ".png")
    ]
    if setting != "auto":
        del files[1:]
    if files[0].suffix not in (".html", *_PICTURES):
        raise ConfigError(f"file: expected a name that ends in .html, .png or .svg, got '{setting}'")
    if not files[0].parent.is_dir():
        raise ConfigError(f"file: there is no folder {files[0].parent}")
    return files


def _kinds(loaded: LoadedRun, config: AttentionConfig) -> tuple[Kind, ...]:
    """Those that are asked for. Raises ConfigError where the run does not have them, or the layers, or the heads."""
    model = loaded.model
    if not attentions(model):
        raise ConfigError(f"run: {loaded.run.id} (model={model.config.name}) has no attention that could be seen")
    there = {kind for kind, _, _ in attentions(model)}
    kinds = tuple(kind for kind in KINDS if kind in there) if config.kind == "all" else (config.kind,)
    layers, heads = (None if asked == "all" else [n - 1 for n in asked] for asked in (config.layers, config.heads))
    check_asked(model, kinds, layers, heads, first=1)
    if config.target != "none" and not loaded.translates:
        raise ConfigError(f"target: {loaded.run.id} reads no source, so its text has no target; leave it out")
    return kinds


def _text(config: AttentionConfig) -> str:
    text = config.text
    if config.text_file != "none":
        try:
            text = Path(config.text_file).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"text_file: {config.text_file} cannot be read: {reason}") from error
    if not text:
        raise ConfigError('text: expected a text to look at, got nothing; ctxlab attention last "To be, or not to be"')
    return text


def _too_long(loaded: LoadedRun, config: AttentionConfig, text: str) -> str:
    """Which setting gave what the run has no positions for: the text, unless all of a source has some."""
    ends = loaded.model.n_positions
    if loaded.translates and ends is not None and loaded.reading.count(text) + 1 <= ends:
        return "target"
    return "text" if config.text_file == "none" else "text_file"


def _read(loaded: LoadedRun, config: AttentionConfig, text: str) -> _Reading:
    """The tokens of the text; of an encoder-decoder those of the source and of its target, given or written now."""
    tokenizer, both = loaded.tokenizer, loaded.tokenizers
    ids = loaded.reading.encode(text)
    if not loaded.translates:
        return _Reading(both, ids)
    source, begin, end = [*ids, both.source.eos_id], [tokenizer.bos_id], (tokenizer.eos_id,)
    if config.target != "none":
        return _Reading(both, [*begin, *tokenizer.encode(config.target)], source, end)
    with torch.no_grad():
        encoded = encode(loaded.model, [source], both.source.pad_id)
    model = loaded.model
    most = room(model, len(begin), config.decoding)
    decoding = config.decoding.model_copy(update={"max_new_tokens": most})
    if decoding.num_beams > 1:
        new = beam_search(model, [begin], decoding, stop_ids=end, encoded=encoded)[0][0].tokens
    else:
        new = decode(model, [begin], decoding, seeds=[config.seed], stop_ids=end, encoded=encoded)[0]
    if len(new) == most:  # it went on: the last token was written, and never read
        return _Reading(both, [*begin, *new[:-1]], source, (new[-1],))
    return _Reading(both, [*begin, *new], source, end)


def _groups(
    reading: _Reading,
    kinds: Sequence[Kind],
    config: AttentionConfig,
    width: int,
    n_maps: int,
) -> dict[str, dict[Kind, seeing.Groups]]:
    """Which part of each drawing each token belongs to: tokens or words, or where those are too many, some of them together."""
    found: dict[str, dict[Kind, seeing.Groups]] = {}
    sides = {_TERMINAL: report.side(width), _PAGE: config.cells, _PICTURE: report.picture_side(n_maps)}
    for kind in kinds:
        words = [
            words_of(side.tokenizer, side.ids) if config.words else range(len(side.ids)) for side in reading.of(kind)
        ]
        for name, side in sides.items():
            rows, columns = (seeing.parts(one, side) for one in words)
            found.setdefault(name, {})[kind] = (rows, columns)
    return found


def _induction(loaded: LoadedRun, config: AttentionConfig) -> dict[tuple[int, int], float] | None:
    """The induction scores of a decoder; None where a source or what follows would be looked at too."""
    model = loaded.model
    vocabulary = [token for token, piece in enumerate(loaded.tokenizer.pieces) if piece]
    length = min(config.induction, loaded.context // 2, len(vocabulary))
    if not length or not model.causal or loaded.translates:
        return None
    return seeing.induction_scores(model, vocabulary, length=length, seed=config.seed)


def _labelled(reading: _Reading, steps: Sequence[seeing.Step]) -> list[report.Step]:
    tokenizer = reading.tokenizers.target
    source = [shown(reading.tokenizers.source, token) for token in reading.source or ()]
    return [
        report.Step(
            read=shown(tokenizer, step.read),
            chosen=shown(tokenizer, step.chosen),
            p=step.p,
            others=[(shown(tokenizer, token), p) for token, p in step.others],
            sources=[(source[place], weight) for place, weight in step.sources],
        )
        for step in steps
    ]


def _labels(side: _Side, groups: Sequence[int]) -> list[str]:
    """What stands beside each part: its token or word, or the place of the first of several and that token."""
    tokenizer, tokens = side
    parts: list[list[int]] = [[] for _ in range(max(groups) + 1)]
    for place, group in enumerate(groups):
        parts[group].append(place)
    labels = []
    for part in parts:
        word = tokenizer.decode(tokens[place] for place in part).strip()
        first = shown(tokenizer, tokens[part[0]])
        is_word = len(part) > 1 and len(word.split()) == 1
        labels.append(visible(word) if is_word else first if len(part) == 1 else f"{part[0] + 1} {first}…")
    return labels


def _draw(
    loaded: LoadedRun,
    reading: _Reading,
    found: Sequence[seeing.Head],
    groups: Mapping[str, Mapping[Kind, seeing.Groups]],
    steps: Sequence[report.Step],
    files: Sequence[Path],
    console: Console,
) -> None:
    def drawing(name: str, say: Callable[[str], str] = str) -> tuple[list[report.Map], dict[str, report.Axes]]:
        maps = [report.Map(one.kind, one.layer + 1, one.head + 1, one.maps[name], asdict(one.summary)) for one in found]
        axes: dict[str, report.Axes] = {}
        for kind, pair in groups[name].items():
            rows, columns = (
                [say(label) for label in _labels(side, parts)]
                for side, parts in zip(reading.of(kind), pair, strict=True)
            )
            axes[kind] = report.Axes(rows, columns)
        return maps, axes

    def sayable(text: str) -> str:
        return text.encode(console.encoding, errors="replace").decode(console.encoding)

    title = f"{loaded.run.id}: what its heads attend to"
    texts = _said(reading)
    maps, axes = drawing(_TERMINAL, sayable)
    console.print(Text(title, style="bold"))
    for line in texts:
        console.print(Text(sayable(line)))
    console.print()
    console.print(report.Maps(maps, axes))
    for line in _pooled(reading, groups[_TERMINAL]):
        console.print(Text(line, style="dim"))
    console.print()
    console.print(report.heads_table(maps))
    for name in report.shown_numbers(maps):
        console.print(Text(f"{name}: {report.MEANING[name]}", style="dim"))
    if steps:
        console.print()
        console.print(report.steps_table(steps, sayable))
        console.print(Text("looks at: cross-attention of the last layer, mean over its heads", style="dim"))
    for file in files:
        if file.suffix in _PICTURES:
            save(report.figure(*drawing(_PICTURE), heading=title), file)
        else:
            maps, axes = drawing(_PAGE)
            facts = _pooled(reading, groups[_PAGE])
            file.write_text(page(maps, axes, title=title, texts=texts, facts=facts, steps=steps), encoding="utf-8")
        console.print(Text(f"drawn into {file}"))


def _said(reading: _Reading) -> list[str]:
    """What was read and, of an encoder-decoder, what was made of it; lines of it are lines, and nothing else in it acts."""
    said = []
    for name, tokenizer, tokens in (
        ("source", reading.tokenizers.source, reading.source),
        ("target" if reading.source else "text", reading.tokenizers.target, [*reading.tokens, *reading.end]),
    ):
        if tokens is not None:
            text = tokenizer.decode(tokens)
            said.append(f"{name}: {visible(text[:400], as_it_is=_PLAIN)}{'…' if len(text) > 400 else ''}")
    return said


def _pooled(reading: _Reading, groups: Mapping[Kind, seeing.Groups]) -> list[str]:
    """A line where a map's row or column is several tokens."""
    most = 1
    for pair in groups.values():
        for parts in pair:
            most = max(most, *(parts.count(part) for part in set(parts)))
    if most == 1:
        return []
    return [
        f"up to {most} tokens a row and a column, which begin with the one that is named: the mean of what they give, the sum "
        "of what they get"
    ]
