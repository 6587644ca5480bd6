"""A progress bar for work that goes through all experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from prefetch.geometry import MoEGeometry


@contextmanager
def expert_progress(task: str, geometry: MoEGeometry, show: bool) -> Iterator[Callable[[], None]]:
    """A bar on stderr in units of bytes, gone when the work is done. Call what it yields once per expert.

    Where stderr is no terminal it shows nothing.
    """
    console = Console(stderr=True)
    text = TextColumn("{task.description}")
    columns = text, BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not (show and console.is_terminal)) as bar:
        identity = bar.add_task(task, total=geometry.total_bytes)
        yield lambda: bar.advance(identity, geometry.expert.row_bytes)
