"""Every planner in conf/planner, found by itself, keeps the promises of `prefetch/planner/base.py`."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from omegaconf import OmegaConf

from predictors.base import Prediction
from prefetch.geometry import ExpertGeometry, ExpertKey, MoEGeometry
from prefetch.planner.base import FastTierView, Planner
from tests.predictors.synthetic_run import CONF, configured

NAMES = sorted(path.stem for path in (CONF / "planner").glob("*.yaml"))
GEOMETRY = MoEGeometry(4, 8, 2, ExpertGeometry(32, 16, torch.float32))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("free_slots", [0, 3, 100])
def test_plans_within_the_free_slots_and_only_what_is_absent(name: str, free_slots: int) -> None:
    planner = configured("planner", name)
    assert isinstance(planner, Planner)
    planner.bind(GEOMETRY)
    random = torch.Generator().manual_seed(0)
    predictions = [Prediction(layer, torch.rand(n_tokens, 8, generator=random)) for layer, n_tokens in ((2, 5), (3, 1))]
    on_board = {ExpertKey(2, 0), ExpertKey(3, 1)}
    tier = FastTierView(on_board.__contains__, free_slots, queued_bytes=0)

    plan = planner.plan(predictions, tier)

    assert len(set(plan)) == len(plan) <= free_slots
    assert not on_board.intersection(plan)
    assert planner.plan([], tier) == []
    missing = [ExpertKey(1, 4), ExpertKey(1, 2)]
    assert set(planner.leave_in_place(missing, tier)) <= set(missing)


@pytest.mark.parametrize("name", NAMES)
def test_yaml_and_dataclass_agree_on_the_knobs_and_their_defaults(name: str) -> None:
    knobs = dict(OmegaConf.load(CONF / "planner" / f"{name}.yaml"))
    written = {knob: value for knob, value in knobs.items() if knob not in ("_target_", "defaults")}
    fields = dataclasses.fields(configured("planner", name))
    assert written == {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}
