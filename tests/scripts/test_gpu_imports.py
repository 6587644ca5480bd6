"""The GPU check imports where nothing is installed but what a CUDA machine with torch, triton and transformers has."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
WITHOUT = """
import importlib, pkgutil, sys

class Without:
    # a finder to which some packages are not installed

    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {absent} else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
import scripts.gpu
for found in pkgutil.iter_modules(scripts.gpu.__path__):
    importlib.import_module(f"scripts.gpu.{{found.name}}")
import scripts.gpu_check
print(len(list(pkgutil.iter_modules(scripts.gpu.__path__))))
"""
ABSENT = ("hydra", "hydra_plugins", "omegaconf", "antlr4", "pydantic", "pydantic_core", "wandb", "flashlib")


def test_every_module_of_it_imports_without_what_experiments_need() -> None:
    command = [sys.executable, "-c", WITHOUT.format(absent=set(ABSENT))]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) == len([path for path in (REPOSITORY / "scripts" / "gpu").glob("*.py") if path.stem != "__init__"])
