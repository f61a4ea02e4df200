"""Translation in the terminal: the scores of the whole test set, and some sentences beside what was wanted."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from ctxlab.records.schema import Measurement, TaskItem
from ctxlab.report.grid import Grid
from ctxlab.report.results import cell

_SHOWN = 4  # sentences, evenly from all


def is_translation(measurements: Sequence[Measurement]) -> bool:
    """Whether there are scores of translations among these."""
    return any(m.name in ("bleu", "chrf") for m in measurements)


def show_translation(measurements: Sequence[Measurement], items: Sequence[TaskItem], console: Console) -> None:
    """One row a run: BLEU, chrF, nats per target token and their perplexity; how they were scored; a few translations."""
    names = ("bleu", "chrf", "nats_per_token", "perplexity")
    grid = Grid(["run", "BLEU", "chrF", "nats/token", "perplexity"], heading="test sentences translated")
    for run in dict.fromkeys(m.axes.get("run", "") for m in measurements):
        here = {m.name: m for m in measurements if m.axes.get("run", "") == run}
        grid.add([run or "this one", *(cell(here.get(name), interval=name != "perplexity") for name in names)])
    console.print(grid)
    for line in _notes(measurements):
        console.print(Text(line, style="dim"))
    step = max(1, len(items) // _SHOWN)
    for item in items[step // 2 :: step][:_SHOWN]:
        source, wanted = item.wanted
        console.print()
        for name, text in (("source", source), ("said", item.answer or ""), ("wanted", wanted)):
            console.print(Text(f"{name:<8}{text}", style="bold" if name == "said" else ""), soft_wrap=True)


def _notes(measurements: Sequence[Measurement]) -> list[str]:
    """What the numbers are, each once."""
    lines = []
    for m in measurements:
        if m.name == "bleu":
            short = f", of at most {m.axes['max_words']} words" if "max_words" in m.axes else ""
            beams = m.facts["num_beams"]
            lines.append(
                f"{m.split} split, {m.n_docs} pairs{short}, one reference each; {beams} beams; ± is 95%, resampled"
            )
        if m.name in ("bleu", "chrf"):
            lines.append(f"{m.name}: sacrebleu {m.protocol}")
        if m.name == "nats_per_token":
            lines.append(
                f"nats: of the {m.n_targets:,} tokens wanted, given those before, {m.protocol}; ± is 95% over pairs"
            )
    return list(dict.fromkeys(lines))
