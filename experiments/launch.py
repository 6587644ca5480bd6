"""What every Hydra entry point shares: one clear line for a user's mistake, clean interruption, sweeps that go on."""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from experiments import config as configuration
from experiments.atomic import write_json
from prefetch.errors import GatecastError

FINISHED, FAILED = "finished.json", "failure.json"
TRACEBACK = "GATECAST_TRACEBACK"  # set to 1: show where an error came from

Task = Callable[[DictConfig, Path], None]


def run(config_name: str, task: Task) -> None:
    """Compose `config_name` from the command line and run `task(cfg, output_folder)`; exits with 2 for a user's mistake.

    In a sweep (`--multirun`) a failing job does not stop the others, and a finished one is not run again: see `Sweep`.
    """
    configuration.register()
    quieten_libraries()
    task = _importable(task)

    @hydra.main(version_base="1.3", config_path=str(configuration.REPOSITORY / "conf"), config_name=config_name)
    def job(cfg: DictConfig) -> None:
        folder = Path(HydraConfig.get().runtime.output_dir)
        if HydraConfig.get().mode is RunMode.MULTIRUN:
            _run_in_sweep(cfg, folder, task)
            return
        try:
            task(cfg, folder)
        except (GatecastError, HydraException, OmegaConfBaseException) as error:  # here, before Hydra adds its own words
            _report(error)
            sys.exit(2)

    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # else Hydra prints and exits by itself, with its own words
    try:
        job()
    except KeyboardInterrupt:
        say("interrupted")
        sys.exit(130)
    except BrokenPipeError:  # whoever read the output is gone, as `head` is
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains when it ends
        sys.exit(1)
    except (HydraException, OmegaConfBaseException) as error:
        _report(error)
        sys.exit(2)


def _importable(task: Task) -> Task:
    """The same function under its module's real name: workers of a parallel sweep import it instead of unpickling `__main__`."""
    main = sys.modules["__main__"]
    if task.__module__ != "__main__" or main.__spec__ is None:
        return task
    found: Task = getattr(importlib.import_module(main.__spec__.name), task.__name__)
    return found


def quieten_libraries() -> None:
    """Libraries speak only when something is wrong."""
    for name in ("transformers", "wandb", "matplotlib", "hydra", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def say(text: str) -> None:
    """`text` on stderr as it is: rich would break a path at the terminal's width, where it can no longer be copied."""
    print(text, file=sys.stderr, flush=True)


def one_line(error: BaseException) -> str:
    """What is wrong, in one line. Hydra's messages carry lists and hints on further lines; the first ones say it."""
    cause = None if isinstance(error, GatecastError) else error.__cause__ or error.__context__
    if isinstance(error, HydraException) and isinstance(cause, GatecastError):
        return str(cause)  # a plug-in's own words about its knobs
    if isinstance(error, MissingConfigException) and error.options:
        return f"there is no {error.missing_cfg_file}; there are {', '.join(error.options)}"
    if isinstance(cause, ConfigKeyError | ConfigAttributeError) and isinstance(cause.parent_node, DictConfig):
        options = [str(name) for name in cause.parent_node if not str(name).startswith(("_", "hydra"))]
        if not options:  # by now OmegaConf has made an empty mapping of a null
            whole, _, part = str(cause.full_key).rpartition(".")
            return (
                f"{whole} is null, so {cause.full_key} cannot be set by itself: give it as a whole, '{whole}={{{part}: ...}}'"
            )
        return f"{cause.full_key} is not an option; there are {', '.join(options)}"
    texts = [str(error).strip()] + ([str(cause).strip()] if isinstance(cause, OmegaConfBaseException | HydraException) else [])
    lines = [line.strip() for text in texts for line in text.splitlines() if line.strip()]
    kept = [line for line in dict.fromkeys(lines) if not line.startswith(("full_key", "object_type", "reference_type"))]
    return "; ".join(kept[:4]) or type(error).__name__


def _report(error: BaseException) -> None:
    if os.environ.get(TRACEBACK) == "1":
        traceback.print_exception(error)
    print(f"error: {one_line(error)}", file=sys.stderr)


def _fingerprint(cfg: DictConfig) -> str:
    return hashlib.blake2b(OmegaConf.to_yaml(cfg, resolve=True, sort_keys=True).encode(), digest_size=16).hexdigest()


def _run_in_sweep(cfg: DictConfig, folder: Path, task: Task) -> None:
    """One job of a sweep: skipped if the same configuration has finished in this folder, recorded if it fails."""
    fingerprint = _fingerprint(cfg)
    if _read(folder / FINISHED).get("config") == fingerprint:
        say(f"already finished: {folder}")
        return
    (folder / FAILED).unlink(missing_ok=True)
    try:
        task(cfg, folder)
    except Exception as error:  # any failure: the other jobs of the sweep go on, and Sweep reports it at the end
        _report(error)
        write_json(folder / FAILED, {"config": fingerprint, "error": one_line(error), "type": type(error).__name__})
    else:
        write_json(folder / FINISHED, {"config": fingerprint})


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


class Sweep(Callback):
    """At the end of a sweep: name the jobs that failed in it, and exit with 1 if there are any."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        self.began_s = time.time()

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        folder = Path(config.hydra.sweep.dir)
        failed = sorted(path for path in folder.rglob(FAILED) if path.stat().st_mtime >= self.began_s)
        finished = len(list(folder.rglob(FINISHED)))
        print(f"sweep {folder}: {finished} finished, {len(failed)} failed", file=sys.stderr)
        for path in failed:
            print(f"  failed: {path.parent.relative_to(folder)}: {_read(path).get('error')}", file=sys.stderr)
        if failed:
            sys.exit(1)


class NoSweep(Callback):
    """Of a program that a sweep makes no sense of: refuses `--multirun` with `reason` before anything is written."""

    def __init__(self, reason: str):
        self.reason = reason

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        print(f"error: {self.reason}", file=sys.stderr)
        sys.exit(2)
