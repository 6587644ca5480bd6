"""The table of hot experts against counting one by one; a table that does not fit is refused."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import pytest

from predictors.hot_experts import hottest_first, load, save, token_counts
from prefetch.errors import PredictorError
from prefetch.geometry import ExpertKey
from tests.predictors.synthetic_run import N_EXPERTS, N_LAYERS, make_run

RUNS = [make_run(seed=seed) for seed in range(3)]
COUNTS = token_counts([run.trace for run in RUNS], N_LAYERS, N_EXPERTS)


def test_counts_are_those_of_a_loop_over_every_choice() -> None:
    counted = Counter(
        ExpertKey(view.layer, expert)
        for run in RUNS
        for view in run.views
        for token in view.topk_ids.tolist()
        for expert in token
    )
    assert all(COUNTS[layer, e] == counted[ExpertKey(layer, e)] for layer in range(N_LAYERS) for e in range(N_EXPERTS))


def test_ranks_by_count_then_key_and_leaves_out_what_was_never_used() -> None:
    counts = COUNTS.clone()
    counts[1, 3], counts[2, :] = 0, 7
    ranked = hottest_first(counts)
    used = [ExpertKey(layer, e) for layer in range(N_LAYERS) for e in range(N_EXPERTS) if counts[layer, e] > 0]
    assert ranked == sorted(used, key=lambda key: (-counts[key.layer, key.expert], key))


def test_a_stored_table_is_read_back(tmp_path: Path) -> None:
    save(tmp_path / "table.safetensors", COUNTS, RUNS[0].model, {"tokens": 3})
    assert load(tmp_path / "table.safetensors", RUNS[0].model).equal(COUNTS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_layers": N_LAYERS + 1}, "trained for MoE layers=4, here it is 5"),
        ({"n_experts": 16}, "trained for experts=8, here it is 16"),
        ({"top_k": 3}, "trained for top_k=2, here it is 3"),
        ({"fingerprint": "another"}, "trained for another model"),
    ],
)
def test_a_table_of_another_model_is_refused(change: dict[str, object], message: str, tmp_path: Path) -> None:
    save(tmp_path / "table.safetensors", COUNTS, RUNS[0].model, {})
    with pytest.raises(PredictorError, match=message):
        load(tmp_path / "table.safetensors", dataclasses.replace(RUNS[0].model, **change))  # type: ignore[arg-type]


def test_damage_and_absence_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "table.safetensors"
    with pytest.raises(PredictorError, match="no such predictor weights"):
        load(path, RUNS[0].model)
    save(path, COUNTS[:, :4], RUNS[0].model, {})
    with pytest.raises(PredictorError, match=r"token_counts has shape \(4, 4\), this predictor expects \(4, 8\)"):
        load(path, RUNS[0].model)
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    with pytest.raises(PredictorError, match="truncated or damaged"):
        load(path, RUNS[0].model)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(PredictorError, match="checksum differs"):
        load(path, RUNS[0].model)
