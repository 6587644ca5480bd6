"""Turn routing that others have published into a trace of this project, to be replayed and analysed like one of its own.

    python -m experiments.import_trace format=gpt_oss_fingerprints file=FOLDER/mmlu_dev.npz hydra.run.dir=outputs/gpt-oss
    python -m experiments.import_trace format=big_moe_on_edge file=FOLDER/qwen.route.csv

Writes `trace.safetensors`. Formats, and how to add one: docs/traces.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hydra.core.config_store import ConfigStore
from hydra.utils import instantiate
from omegaconf import DictConfig

from experiments import launch
from experiments.config import check_knobs
from predictors.recording import TRACE
from prefetch.errors import ConfigError, TraceError
from prefetch.trace_formats.base import TraceFormat


@dataclass
class ImportTraceConfig:
    """Options of `python -m experiments.import_trace`."""

    format: Any = None
    file: str = ""


def main() -> None:
    ConfigStore.instance().store(name="import_trace_schema", node=ImportTraceConfig)
    launch.run("import_trace", import_trace)


def import_trace(cfg: DictConfig, folder: Path) -> None:
    """Read `cfg.file` in the format `cfg.format`, and write its routing to `folder`."""
    check_knobs("format", cfg.format)
    source = Path(cfg.file)
    if not cfg.file or not source.exists():
        raise ConfigError(f"file={cfg.file}: no such file; name the dump to read")
    reader = instantiate(cfg.format)
    if not isinstance(reader, TraceFormat):
        raise ConfigError(f"format._target_={cfg.format._target_} is not a TraceFormat (prefetch/trace_formats/base.py)")
    trace, path = reader.read(source), folder / TRACE
    try:
        trace.save(path)
    except OSError as error:
        raise TraceError(f"{path}: the trace could not be written ({error}); is the disk full?") from error
    launch.say(
        f"{len(np.unique(trace.sequence))} sequences, {trace.n_tokens} tokens, {trace.n_layers} layers, {trace.n_experts} experts, "
        f"top-{trace.top_k}: {path}"
    )


if __name__ == "__main__":
    main()
