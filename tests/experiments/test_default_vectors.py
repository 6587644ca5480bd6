"""Default vectors as a user measures them, on a small recording of the bundled model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from experiments.model_view import load_model_view
from predictors.quasi_hidden import QuasiHidden
from predictors.recording import Recording

REPOSITORY = Path(__file__).parents[2]


def run(*overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "experiments.default_vectors", "n_threads=1", *overrides],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=240, env=dict(os.environ),
    )  # fmt: skip


def test_measured_vectors_fit_the_model_and_resemble_those_that_come_with_it(small_recording: Path, tmp_path: Path) -> None:
    output = tmp_path / "vectors.safetensors"
    done = run(f"recording={small_recording}", f"output={output}", f"hydra.run.dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    view, _ = load_model_view(OmegaConf.create({"model": {"path": "models/bytes-moe", "dtype": "float32"}}))
    measured, shipped = (
        QuasiHidden(weights=str(output)),
        QuasiHidden(weights="models/bytes-moe/predictors/quasi_hidden.safetensors"),
    )
    measured.bind(view)
    shipped.bind(view)
    assert measured.vectors is not None and shipped.vectors is not None
    ids = [view.topk_ids for view in Recording(small_recording).rows(Recording(small_recording).split("training"))]
    used = [set(layer.flatten().tolist()) for layer in ids]
    assert all(measured.vectors[layer, e].any() == (e in used[layer]) for layer in range(8) for e in range(32))
    both = measured.vectors.any(dim=2)
    cosine = (measured.vectors * shipped.vectors).sum(2) / (measured.vectors.norm(dim=2) * shipped.vectors.norm(dim=2))
    assert cosine[both].median() > 0.5
    about = json.loads((tmp_path / "run" / "default_vectors.json").read_text())
    assert about["tokens"] == len(ids[0]) and about["experts_never_used"] == 256 - int(both.sum())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("max_rows=0", "max_rows=0: it must be at least 1"),
        ("split=poetry", "no document of split 'poetry'"),
        ("recording=nowhere", "nowhere: no recording.json in it"),
    ],
)
def test_a_mistake_is_one_clear_line(override: str, message: str, small_recording: Path, tmp_path: Path) -> None:
    done = run(f"recording={small_recording}", f"hydra.run.dir={tmp_path}", override)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.glob("*.safetensors"))
