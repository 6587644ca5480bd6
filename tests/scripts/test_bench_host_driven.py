"""The benchmark of the host's part misses as often as it says, and launches nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from predictors.base import Predictor
from predictors.none import NoPredictor
from prefetch.geometry import ExpertGeometry
from scripts.bench_host_driven import QWEN3_30B, SameScores, call_times, without_launches


@pytest.mark.parametrize("predictor", [NoPredictor(), SameScores(128)], ids=["none", "same scores"])
def test_a_call_misses_as_often_as_asked(predictor: Predictor) -> None:
    small = replace(QWEN3_30B, expert=ExpertGeometry(64, 32, torch.bfloat16))
    with without_launches():
        times = [call_times(n_misses, predictor, n_tokens=4, size=small) for n_misses in (0, 1, 4)]
    assert [round(missed, 1) for _, missed in times] == [0, 1, 4]
    assert all(seconds > 0 for seconds, _ in times)
