"""Routers and linear predictors as one launch, in Triton's interpreter: against transformers' own routers, and the predictors themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from predictors.base import LayerView, Prediction, Predictor
from predictors.gate_reuse import GateReuse
from prefetch.accounting import violations
from prefetch.errors import UnsupportedModelError
from prefetch.families import family_of
from prefetch.model import moe_blocks
from tests.predictors.synthetic_run import configured, make_run, show
from tests.prefetch.offloaded import PROMPTS, Setting, decode, offloaded, plain
from tests.prefetch.test_device_runtime import device_driven
from tests.prefetch.tiny_families import CHECKPOINTS
from tests.prefetch.transfers.stand_in_driver import StandInDriver

PROMPT, NEW_TOKENS = [PROMPTS[0][:, :6]], 4
FUSED = ["qwen3_next", "qwen3_5_moe_text", "gpt_oss"]


class Unasked(GateReuse):
    """Gate reuse whose heads must speak for it."""

    def linear_heads(self, layer: int) -> Any:
        plain_one = GateReuse(self.lookahead)
        plain_one.bind(self.model)
        return plain_one.linear_heads(layer)

    def predict(self, seen: LayerView) -> list[Prediction]:
        raise AssertionError("the router's launch has predicted")


def guesses(folder: Path, packs: Path, setting: Setting) -> tuple[Tensor, list[tuple[int, int, int]], list[Tensor]]:
    """Tokens, and the guesses of a run: for which step and layer, how far ahead, and their scores."""
    with offloaded(folder, packs, setting) as (model, runtime):
        tokens, _ = decode(model, PROMPT, NEW_TOKENS)
        made = runtime.recorder.guesses
    return tokens, [(g.step, g.layer, g.lookahead) for g in made], [g.scores for g in made]


@pytest.mark.parametrize("name", ["tiny_qwen3", "tiny_mixtral"])
def test_tokens_equal_unmodified_transformers(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(name)
    expected_tokens, expected_logits = decode(plain(folder), PROMPT, NEW_TOKENS)
    with offloaded(folder, tmp_path, Setting(predictor=GateReuse(), fuse_routers=True)) as (model, runtime):
        tokens, logits = decode(model, PROMPT, NEW_TOKENS)
        runtime.finish()
        record = runtime.record()
    assert torch.equal(tokens, expected_tokens)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-4)
    assert violations(record) == []
    routers = [getattr(block, family_of(model.config).router) for block in moe_blocks(model, family_of(model.config))]
    assert not any("forward" in vars(router) for router in routers), "detached, the model routes by itself again"


@pytest.mark.parametrize(("lookahead", "on_gpu"), [(1, True), (2, False)], ids=["kernels", "torch, two ahead"])
def test_heads_say_what_gate_reuse_says(lookahead: int, on_gpu: bool, tiny_qwen3: Path, tmp_path: Path) -> None:
    driver = StandInDriver(tmp_path) if on_gpu else None
    fused = Setting(predictor=Unasked(lookahead), fuse_routers=True, driver=driver)
    tokens, places, scores = guesses(tiny_qwen3, tmp_path, fused)
    own_tokens, own_places, own_scores = guesses(tiny_qwen3, tmp_path, Setting(predictor=GateReuse(lookahead)))
    assert torch.equal(tokens, own_tokens) and places == own_places and len(places) >= 4
    for mine, own in zip(scores, own_scores, strict=True):
        torch.testing.assert_close(mine, own, rtol=1e-4, atol=1e-4)


def test_bits_do_not_depend_on_what_is_predicted(tiny_qwen3: Path, tmp_path: Path) -> None:
    """The router of an arm without heads is launched in another grid."""
    logits = []
    for predictor in (None, GateReuse()):
        with offloaded(tiny_qwen3, tmp_path, Setting(predictor=predictor, fuse_routers=True)) as (model, _):
            logits.append(decode(model, PROMPT, NEW_TOKENS)[1])
    assert torch.equal(*logits)


def test_a_device_driven_step_hears_them_too(tiny_qwen3: Path, tmp_path: Path) -> None:
    expected_tokens, _ = decode(plain(tiny_qwen3), PROMPT, NEW_TOKENS)
    with device_driven(tiny_qwen3, tmp_path, Unasked(), fuse_routers=True) as (model, runtime):
        tokens, _ = decode(model, PROMPT, NEW_TOKENS)
        counts = runtime.counts()
    assert torch.equal(tokens, expected_tokens)
    assert counts["useful"] > 0


@pytest.mark.parametrize("name", ["gate_reuse", "pre_gate"])
def test_linear_heads_are_all_that_the_predictor_says(name: str) -> None:
    predictor: Predictor = configured("predictor", name)
    for view, predictions in show(predictor, make_run()):
        heads = predictor.linear_heads(view.layer)
        assert heads is not None and [head.target for head in heads] == [p.layer for p in predictions]
        for head, prediction in zip(heads, predictions, strict=True):
            torch.testing.assert_close(linear(view.hidden, head.weight, head.bias), prediction.scores, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["margin_gate", "popularity", "shuffled_gate", "none"])
def test_others_are_asked_as_ever(name: str) -> None:
    predictor: Predictor = configured("predictor", name)
    next(show(predictor, make_run()))
    assert predictor.linear_heads(0) is None


@pytest.mark.parametrize("name", FUSED)
def test_other_families_tokens_too(name: str, tmp_path: Path) -> None:
    folder = CHECKPOINTS[name](tmp_path / "model")
    expected_tokens, _ = decode(plain(folder), PROMPT, NEW_TOKENS)
    with offloaded(folder, tmp_path, Setting(n_slots=8, predictor=GateReuse(), fuse_routers=True)) as (model, runtime):
        tokens, _ = decode(model, PROMPT, NEW_TOKENS)
    assert torch.equal(tokens, expected_tokens)


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3"])
def test_routers_that_do_not_choose_are_refused(name: str, tmp_path: Path) -> None:
    folder = CHECKPOINTS[name](tmp_path / "model")
    with pytest.raises(UnsupportedModelError, match="backend.router=fused: the routers of deepseek_v"):
        with offloaded(folder, tmp_path, Setting(fuse_routers=True)):
            pass
