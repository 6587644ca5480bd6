"""Experiment tracking with wandb, which may never slow down, block or fail a run.

Offline by default: everything is written beside the other results, and `wandb sync` uploads it later. Online without a
network or a login falls back to offline with one line. Any later trouble ends tracking, not the run.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from prefetch.errors import ConfigError

log = logging.getLogger(__name__)

MODES = ("offline", "online", "disabled")
TIMEOUT_S = 10.0  # for the server to answer at the start, and for uploads to finish at the end
QUIET = {"WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}  # the latter sends wandb's own crash reports


class Tracker:
    """One run's metrics, tables and pictures.

    Args:
        mode: "offline" | "online" | "disabled".
        project: wandb's project.

    Raises:
        ConfigError: an unknown mode.
    """

    def __init__(self, mode: str = "offline", project: str = "gatecast"):
        if mode not in MODES:
            raise ConfigError(f"tracking.mode={mode!r}: it must be one of {', '.join(MODES)}")
        self.mode, self.project = mode, project
        self._run: Any = None

    def start(self, config: Mapping[str, Any], folder: Path) -> None:
        """Begin a run with plain `config`; wandb's files go to `folder`/wandb."""
        if self.mode == "disabled":
            return
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._run = self._init(self.mode, config, folder)
        except Exception as error:  # no login, no network, no service process
            self._fall_back(error, config, folder)

    def log(self, metrics: Mapping[str, float]) -> None:
        """Record numbers, as one step and in the run's summary."""
        self._guarded(lambda run: run.log(dict(metrics)))

    def log_table(self, name: str, table: pd.DataFrame) -> None:
        """Record a table."""
        self._guarded(lambda run: run.log({name: _wandb().Table(dataframe=table.astype(object).where(table.notna(), None))}))

    def log_image(self, name: str, path: Path) -> None:
        """Record a picture, a PNG."""
        self._guarded(lambda run: run.log({name: _wandb().Image(str(path))}))

    def finish(self) -> None:
        """Write or upload what is left, for at most some seconds. Safe to call twice, and without `start`."""
        self._guarded(lambda run: run.finish())
        self._run = None

    def _init(self, mode: str, config: Mapping[str, Any], folder: Path) -> Any:
        wandb = _wandb()
        settings = wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,  # provenance is in the config already
            disable_code=True,
            x_disable_stats=True,  # its sampling thread would disturb the measurement
            init_timeout=TIMEOUT_S,
            login_timeout=TIMEOUT_S,
            finish_timeout=TIMEOUT_S,
        )
        return wandb.init(project=self.project, mode=mode, dir=str(folder), config=dict(config), settings=settings)

    def _fall_back(self, problem: Exception, config: Mapping[str, Any], folder: Path) -> None:
        """Offline after online failed; not at all where that fails too. Says so in one line."""
        remedy = "this run is not tracked"
        if self.mode == "online":
            try:
                self._run = self._init("offline", config, folder)
                remedy = f"recording offline; upload later with: wandb sync {Path(self._run.dir).parent}"
            except Exception as second:
                remedy = f"nor offline ({_one_line(second)}): this run is not tracked"
        log.warning("wandb: cannot go %s (%s); %s", self.mode, _one_line(problem), remedy)

    def _guarded(self, action: Callable[[Any], None]) -> None:
        if self._run is None:
            return
        try:
            action(self._run)
        except Exception as error:  # whatever it is, it concerns the tracker alone
            self._run = None
            log.warning("wandb: tracking stopped (%s); the run goes on", _one_line(error))


def _wandb() -> Any:
    """wandb, imported when it is first needed: the import takes a second, and reads these variables."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    import wandb

    return wandb


def _one_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__
