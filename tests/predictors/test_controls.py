"""Controls say what they must: nothing (random guess), everything (own gate), what any token would (shuffled gate)."""

from __future__ import annotations

import math

import pytest
import torch

from predictors.base import LayerView
from predictors.own_gate import OwnGate
from predictors.random_guess import RandomGuess
from predictors.shuffled_gate import ShuffledGate
from prefetch.errors import ConfigError
from tests.predictors.synthetic_run import DECODED, HIDDEN, N_EXPERTS, N_LAYERS, TOP_K, make_run, show


@pytest.mark.parametrize("seed", [0, 1])
def test_random_guesses_find_as_many_as_chance_would(seed: int) -> None:
    run, found, wanted = make_run(n_sequences=40, seed=seed), 0, 0
    true_ids = {(view.sequence, view.step, view.layer): view.topk_ids for view in run.views}
    for view, predictions in show(RandomGuess(lookahead=2, seed=seed), run):
        for p in predictions:
            true = true_ids.get((view.sequence, view.step + (p.layer <= view.layer), p.layer))
            if true is not None and len(p.scores) == len(true):
                guessed = p.scores.topk(TOP_K).indices
                found += int((guessed[:, :, None] == true[:, None, :]).sum())
                wanted += true.numel()
    chance = TOP_K / N_EXPERTS
    assert wanted > 1000
    assert abs(found / wanted - chance) < 5 * math.sqrt(chance * (1 - chance) / wanted)


def test_random_guesses_differ_between_tokens_layers_and_seeds() -> None:
    run = make_run()
    scores = [p.scores for _, predictions in show(RandomGuess(), run) for p in predictions]
    rows = torch.cat(scores)
    assert len(rows.unique(dim=0)) == len(rows)
    others = [p.scores for _, predictions in show(RandomGuess(seed=1), run) for p in predictions]
    assert not any(map(torch.equal, scores, others))


@pytest.mark.parametrize("lookahead", [1, 3])
def test_own_gate_names_exactly_what_the_routers_select(lookahead: int) -> None:
    run, n_checked = make_run(batch=2), 0
    true_ids = {(view.sequence, view.step, view.layer): view.topk_ids for view in run.views}
    for view, predictions in show(OwnGate(lookahead), run):
        for p in predictions:
            assert torch.equal(p.scores.topk(TOP_K).indices, true_ids[view.sequence, view.step, p.layer])
            n_checked += 1
    assert n_checked == 2 * (1 + DECODED) * (N_LAYERS - lookahead)


@pytest.mark.parametrize(("rounding", "n_bits"), [("bfloat16", 8), ("float16", 11)])
def test_rounding_moves_the_own_gate_as_far_as_the_bits_of_the_type_allow(rounding: str, n_bits: int) -> None:
    run = make_run()
    for (view, [*exact]), (_, [*rounded]) in zip(show(OwnGate(), run), show(OwnGate(rounding=rounding), run), strict=True):
        for p, q in zip(exact, rounded, strict=True):
            residual = next(
                v.residual for v in run.views if (v.sequence, v.step, v.layer) == (view.sequence, view.step, p.layer)
            )
            assert residual is not None
            exponent = residual.double().abs().log2().floor()
            step = torch.exp2(exponent - n_bits + 1)  # of the type, at each number's size
            nearest = (residual.double() / step).round() * step  # ties to even, as in IEEE 754
            hidden = nearest / nearest.square().mean(-1, keepdim=True).sqrt()
            expected = run.model.router_logits[p.layer](hidden.float())
            torch.testing.assert_close(q.scores, expected, rtol=1e-4, atol=1e-4)
            assert not torch.allclose(p.scores, q.scores, rtol=1e-6, atol=1e-6)


def test_own_gate_says_that_a_live_run_has_no_states_from_the_future() -> None:
    with pytest.raises(ConfigError, match=r"only a recording has them; judge it with python -m experiments.accuracy"):
        OwnGate().bind(make_run().model)


def test_own_gate_refuses_an_unknown_rounding() -> None:
    with pytest.raises(ConfigError, match=r"predictor.rounding=int8: choose one of none, bfloat16, float16"):
        OwnGate(rounding="int8")


def test_shuffled_gate_is_gate_reuse_for_some_earlier_token() -> None:
    run, n_checked = make_run(batch=3), 0
    earlier: dict[int, list[torch.Tensor]] = {layer: [] for layer in range(N_LAYERS)}
    for view, predictions in show(ShuffledGate(reservoir=1000), run):
        for p in predictions:
            possible = torch.stack([run.model.router_logits[p.layer](state) for state in earlier[view.layer]])  # [N, E]
            distance = (p.scores[:, None, :] - possible[None, :, :]).abs().amax(-1)  # [T, N]
            assert bool((distance.amin(1) < 1e-4).all())
            n_checked += 1
        assert view.residual is not None
        earlier[view.layer] += list(view.residual / view.residual.square().mean(-1, keepdim=True).sqrt())
    assert n_checked == (2 * (1 + DECODED) - 1) * (N_LAYERS - 1)


def test_shuffled_gate_keeps_a_uniform_sample_of_earlier_tokens() -> None:
    predictor, model, n_passes = ShuffledGate(reservoir=20), make_run().model, 50
    predictor.bind(model)
    counts = torch.zeros(n_passes)
    for repeat in range(30):
        predictor.seed = repeat
        predictor.bind(model)
        for n in range(n_passes):
            residual = torch.full((1, HIDDEN), float(n))
            no_ids = torch.zeros(1, TOP_K, dtype=torch.long)
            predictor.predict(LayerView(0, n, 0, residual, residual, no_ids, torch.zeros(1, TOP_K), no_ids[:, 0]))
        kept = predictor.kept[0]
        assert kept is not None
        ages = kept[:, 0].long()
        assert len(ages.unique()) == len(ages) == 20
        counts[ages] += 1
    first_half = float(counts[: n_passes // 2].sum() / counts.sum())
    assert abs(first_half - 0.5) < 5 * math.sqrt(0.25 / (30 * 20))


def test_shuffled_gate_refuses_an_empty_reservoir() -> None:
    with pytest.raises(ConfigError, match=r"predictor.reservoir=0: it must be at least 1"):
        ShuffledGate(reservoir=0)
