"""Offloaded decoding at toy sizes: kernels in the interpreter, copies through the stand-in driver, everything else as on a GPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from kernels.launch import Launch, recorded_launches
from kernels.quantised import QuantFormat
from prefetch.cache.lru import Lru
from prefetch.cache.replay import replay_hits
from prefetch.errors import CapacityError
from prefetch.geometry import ExpertKey
from scripts.gpu import decode_scene
from scripts.gpu.decode_model import DECODE_SHAPES, DecodeModel, DecodeShape
from scripts.gpu.decode_scene import Machine, Scene, Setting
from scripts.gpu.generated_routing import RoutingStatistics, generated_routing, guesses_of
from scripts.gpu.offloaded_decode import decode_speeds, rehearse_decode
from scripts.gpu.shapes import MoEShape
from tests.kernels.interpreter_bf16 import repair
from tests.prefetch.transfers.stand_in_driver import COMPUTE_STREAM, StandInDriver
from tests.scripts.launched_programs import programs

TOY = DecodeShape(
    MoEShape("toy", hidden=64, n_experts=8, top_k=2, intermediate=32, n_layers=2),
    n_heads=2, n_kv_heads=1, head_dim=16, vocabulary=40, attention_every=2, state_heads=2, shared_intermediate=16,
)  # fmt: skip


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(torch.device("cpu"), lambda: StandInDriver(tmp_path), lambda: COMPUTE_STREAM, lambda: None)


def toy(how: QuantFormat | None, n_slots: int) -> Setting:
    knobs = {"n_context": 16, "n_tokens": 3, "n_warmup": 1, "n_repeats": 1, "dtype": torch.float32, "reserve_bytes": 0}
    row_bytes = Setting(TOY, how, 0, **knobs).geometry.expert.row_bytes
    model_bytes = DecodeModel(TOY, 16, torch.float32, torch.device("meta")).n_bytes
    return Setting(TOY, how, n_slots * row_bytes + model_bytes, **knobs)


@pytest.mark.parametrize("how", [None, QuantFormat("int4", 32)], ids=str)
def test_all_arms_decode_the_same_tokens_and_count_alike(
    how: QuantFormat | None, machine: Machine, monkeypatch: pytest.MonkeyPatch, launched: list[Launch]
) -> None:
    repair()
    monkeypatch.setattr(decode_scene, "N_DISTINCT", 12)
    monkeypatch.setattr(decode_scene, "N_PACKED", 4)
    found = {(speed.driven_by, speed.arm): speed for speed in decode_speeds(machine, toy(how, 12))}
    assert set(found) == {(by, arm) for by in ("device", "host") for arm in ("slru", "lru", "gate_reuse", "oracle")} | {
        ("nobody", "resident")
    }
    assert all(speed.skipped is None and speed.lowest <= speed.tokens_per_s <= speed.highest for speed in found.values())
    assert {speed.experts for speed in found.values()} == {"float32" if how is None else str(how)}
    assert {speed.n_slots for (by, _), speed in found.items() if by != "nobody"} == {12}
    for policy in ("slru", "lru"):  # the same, on the device and on the host
        assert found["device", policy].hit_rate == found["host", policy].hit_rate
        assert found["device", policy].moved_bytes_per_token == found["host", policy].moved_bytes_per_token
    best = found["device", "oracle"].policy
    assert found["device", best].hit_rate == max(found["device", policy].hit_rate for policy in ("slru", "lru"))
    assert found["device", "oracle"].hit_rate > found["device", best].hit_rate
    assert all(speed.agrees and speed.n_repeats == 1 for speed in found.values())
    assert found["nobody", "resident"].hit_rate == 1.0 and found["nobody", "resident"].moved_bytes_per_token == 0
    assert all(speed.stall_s_per_token is not None for speed in found.values())
    with recorded_launches() as rehearsed:
        rehearse_decode(toy(how, 12))
    assert programs(launched) <= programs(rehearsed)


def test_a_capture_that_fails_takes_no_host_driven_arm_along(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: Machine, step: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(decode_scene, "N_DISTINCT", 12)
    monkeypatch.setattr(decode_scene, "N_PACKED", 4)
    monkeypatch.setattr(Machine, "captured", refused)
    found = list(decode_speeds(machine, toy(None, 12)))
    by_driver = {by: [speed for speed in found if speed.driven_by == by] for by in ("nobody", "device", "host")}
    assert [len(speeds) for speeds in by_driver.values()] == [1, 4, 4]
    said = "RuntimeError: operation not permitted when stream is capturing"
    assert all(speed.skipped == said and speed.tokens_per_s is None for by in ("nobody", "device") for speed in by_driver[by])
    assert all(speed.skipped is None and speed.tokens_per_s for speed in by_driver["host"])


def test_a_card_that_is_too_small_is_refused(machine: Machine) -> None:
    with pytest.raises(CapacityError, match="leave 3 slots beside the model"):
        Scene.make(machine, toy(None, 3)).n_slots()


def test_real_shapes_have_the_models_bytes() -> None:
    gb = {shape.moe.name: Setting(shape, None, 0).geometry.total_bytes / 1e9 for shape in DECODE_SHAPES}
    assert gb["Qwen3-30B-A3B"] == pytest.approx(58.0, abs=0.1) and gb["Qwen3.6-35B-A3B"] == pytest.approx(64.4, abs=0.1)
    hybrid = DECODE_SHAPES[1]
    assert sum(hybrid.attends(layer) for layer in range(hybrid.moe.n_layers)) == 10


def test_generated_routing_has_the_stated_statistics() -> None:
    routing = generated_routing(400, 1, 128, 8, RoutingStatistics(), seed=0)[:, 0]
    overlap = np.mean([len(set(now) & set(before)) / 8 for before, now in zip(routing, routing[1:], strict=False)])
    assert overlap == pytest.approx(0.48, abs=0.03)
    assert all(len(set(ids)) == 8 and ids.min() >= 0 and ids.max() < 128 for ids in routing)
    events = [[ExpertKey(0, int(expert)) for expert in ids] for ids in routing]
    assert replay_hits(Lru(51), events).hits / (400 * 8) == pytest.approx(0.88, abs=0.03)


@pytest.mark.parametrize("recall", [0.0, 0.734, 1.0])
def test_guesses_are_right_as_often_as_stated(recall: float) -> None:
    routing = generated_routing(200, 3, 32, 4, RoutingStatistics(), seed=0)
    guesses = guesses_of(routing, 32, recall, RoutingStatistics(), seed=1)
    right = [set(a) & set(b) for a, b in zip(routing.reshape(-1, 4), guesses.reshape(-1, 4), strict=True)]
    assert all(len(set(ids)) == 4 for ids in guesses.reshape(-1, 4))
    assert np.mean([len(found) / 4 for found in right]) == pytest.approx(recall, abs=0.03)
