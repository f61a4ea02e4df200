"""The one pair of consoles: results to stdout, progress and logs to stderr; plain when piped or under NO_COLOR."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

PLAIN_WIDTH = 120  # columns where there is no terminal to ask


@functools.cache
def stdout() -> Console:
    """Where results go."""
    return _console(stderr=False)


@functools.cache
def stderr() -> Console:
    """Where progress, warnings and errors go."""
    return _console(stderr=True)


def error(message: str) -> None:
    """`error: ...` on stderr, further lines indented under it; wrapped by the terminal only, so it can be copied."""
    first, *rest = message.splitlines() or [""]
    console = stderr()
    console.print(Text("error: ", style="bold red") + Text(first), soft_wrap=True)
    for line in rest:
        console.print(Text(f"       {line}"), soft_wrap=True)


@contextmanager
def progress_bar(console: Console) -> Iterator[Callable[[str, int], Callable[[int], None]]]:
    """Yields `start(text, total) -> advance(n)`: a bar a start, or a line of text where there is no terminal."""
    if not console.is_terminal:

        def announce(text: str, total: int) -> Callable[[int], None]:
            console.print(Text(text), soft_wrap=True)
            return lambda _: None

        yield announce
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bars:

        def start(text: str, total: int) -> Callable[[int], None]:
            task = bars.add_task(text, total=total)
            return lambda n: bars.advance(task, n)

        yield start


def _console(*, stderr: bool) -> Console:
    console = Console(stderr=stderr, highlight=False)
    if not console.is_terminal:
        return Console(stderr=stderr, highlight=False, width=PLAIN_WIDTH, color_system=None)
    return console
