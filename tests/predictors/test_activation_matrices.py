"""Activation matrices against NumPy: every matrix compared with every other from scratch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from predictors.activation_matrices import ActivationMatrices
from prefetch.errors import ConfigError
from tests.predictors.synthetic_run import N_EXPERTS, N_LAYERS, make_run, show


def similarity(present: np.ndarray, past: np.ndarray) -> float:
    """Mean cosine over the layers that `present` has seen."""
    cosines = [a @ m / np.linalg.norm(a) / np.linalg.norm(m) for a, m in zip(present, past, strict=True) if a.any()]
    return float(np.mean(cosines))


@pytest.mark.parametrize(("capacity", "matches", "batch"), [(100, 1, 1), (100, 3, 2), (3, 2, 1)])
def test_the_most_similar_past_sequences_vote(capacity: int, matches: int, batch: int) -> None:
    run, n_checked, sequence = make_run(n_sequences=7, batch=batch), 0, 0
    kept: list[np.ndarray] = []
    present = np.zeros((N_LAYERS, N_EXPERTS))
    for view, predictions in show(ActivationMatrices(2, capacity, matches), run):
        if view.sequence != sequence:
            if len(kept) == capacity:
                kept.pop(int(np.argmax([similarity(present, m) for m in kept])))
            kept.append(present)
            present, sequence = np.zeros((N_LAYERS, N_EXPERTS)), view.sequence
        np.add.at(present[view.layer], view.topk_ids.numpy().reshape(-1), 1)
        targets = [(view.layer + d) % N_LAYERS for d in (1, 2)] if kept else []
        assert [p.layer for p in predictions] == targets
        voters = sorted(kept, key=lambda m: -similarity(present, m))[:matches]
        for p in predictions:
            expected = sum(similarity(present, m) * m[p.layer] / m[p.layer].sum() for m in voters)
            torch.testing.assert_close(p.scores[0].double(), torch.as_tensor(expected), rtol=1e-4, atol=1e-6)
            n_checked += 1
    assert n_checked > 100


def test_a_sequence_seen_before_is_recognised() -> None:
    run = make_run(n_sequences=5)
    predictor = ActivationMatrices(lookahead=1, matches=1)
    for _ in show(predictor, run):
        pass
    predictor.start_sequence()
    matrices = predictor.shares[:5].clone()
    for view in (view for view in run.views if view.sequence == 2):
        predictions = predictor.predict(view)
    ranked = predictions[0].scores[0].argsort(descending=True, stable=True)
    assert torch.equal(ranked, matrices[2, 0].argsort(descending=True, stable=True))


@pytest.mark.parametrize("knob", ["capacity", "matches"])
def test_refuses_an_empty_collection(knob: str) -> None:
    with pytest.raises(ConfigError, match=rf"predictor.{knob}=0: it must be at least 1"):
        ActivationMatrices(**{knob: 0})
