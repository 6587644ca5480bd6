"""A small recording of the bundled model, made once, as a user makes one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
SIZES = [
    "documents.training=6",
    "documents.held_out=3",
    "documents.shifted=2",
    "documents.prompt_tokens=40",
    "documents.new_tokens=6",
]


@pytest.fixture(scope="session")
def small_recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """6 documents of 40 tokens to train on, 3 held out and 2 of a shifted domain that also decode 5 tokens."""
    folder = tmp_path_factory.mktemp("recording")
    command = [sys.executable, "-m", "experiments.collect", "documents=bundled", *SIZES, "collect.hidden_states=true"]
    done = subprocess.run([*command, f"hydra.run.dir={folder}"], cwd=REPOSITORY, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return folder
