"""A progress bar for anything that may take longer than two seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

Item = TypeVar("Item")


@contextmanager
def progress_bar(what: str, total: int) -> Iterator[Callable[[], None]]:
    """Show `what` on stderr, where that is a terminal, while the block runs; call the result once per step."""
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        yield lambda: progress.advance(task)


def with_progress(what: str, items: Sequence[Item]) -> Iterator[Item]:
    """The `items`, while a bar on `what` shows how many have been dealt with."""
    with progress_bar(what, len(items)) as advance:
        for item in items:
            yield item
            advance()
