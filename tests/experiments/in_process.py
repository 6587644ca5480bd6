"""A Hydra program's task run in this process: what a command line would do, without the seconds that its imports take."""

from __future__ import annotations

from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import open_dict

from experiments import config
from experiments.launch import Task

CONF = Path(__file__).resolve().parents[2] / "conf"


def run_task(program: str, task: Task, folder: Path, *overrides: str) -> None:
    """`task` with the configuration of `program`, into `folder`; what it raises is what the command would print."""
    config.register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose(program, overrides=list(overrides), return_hydra_config=True)
        HydraConfig.instance().set_config(cfg)
        with open_dict(cfg):
            del cfg["hydra"]
        task(cfg, folder)
