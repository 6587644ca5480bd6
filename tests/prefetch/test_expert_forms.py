"""Experts with biases and a clamped gate (gpt-oss) in every arrangement: the CPU's path, kernels, in place, quantised."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.expert_form import ExpertForm
from kernels.quantised import QuantFormat
from predictors.gate_reuse import GateReuse
from prefetch.accounting import violations
from prefetch.cache.none import NoCache
from prefetch.cache.resident import Resident
from prefetch.model import load_whole
from prefetch.planner.cpu_fallback import CpuFallback
from prefetch.planner.top_m import TopM
from tests.prefetch.offloaded import PROMPTS, Setting, decode, offloaded, plain
from tests.prefetch.test_device_runtime import device_driven
from tests.prefetch.tiny_families import CHECKPOINTS
from tests.prefetch.transfers.stand_in_driver import StandInDriver

SETTINGS: dict[str, Callable[[], Setting]] = {
    "slru": lambda: Setting(),
    "gate reuse": lambda: Setting(predictor=GateReuse()),
    "two transients": lambda: Setting(NoCache(0), n_slots=2, staging=0, transient=2),
    "cpu": lambda: Setting(planner=CpuFallback(TopM(), link_experts=0)),
    "cpu when busy": lambda: Setting(predictor=GateReuse(), planner=CpuFallback(TopM(), link_experts=1)),
}
KERNELS: dict[str, Callable[[], Setting]] = {
    "from slots": lambda: Setting(predictor=GateReuse()),
    "zero-copy": lambda: Setting(planner=CpuFallback(TopM()), zero_copy=True),
    "the CPU helps": lambda: Setting(predictor=GateReuse(), planner=CpuFallback(TopM(), link_experts=1)),
}
SHORT = PROMPTS[0][:, :5]


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return CHECKPOINTS["gpt_oss"](tmp_path_factory.mktemp("gpt_oss"))


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("packs")


@pytest.fixture(scope="module")
def resident_logits(gpt_oss: Path, packs: Path) -> torch.Tensor:
    with offloaded(gpt_oss, packs, Setting(Resident(16), n_slots=16, staging=0, transient=0)) as (model, _):
        return decode(model)[1]


@pytest.mark.parametrize("name", SETTINGS)
def test_logits_have_the_same_bits_whatever_the_parts(
    name: str, gpt_oss: Path, packs: Path, resident_logits: torch.Tensor
) -> None:
    with offloaded(gpt_oss, packs, SETTINGS[name]()) as (model, runtime):
        _, logits = decode(model)
        runtime.finish()
        record = runtime.record()
    assert torch.equal(logits, resident_logits)
    assert violations(record) == []


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_decode_like_transformers(name: str, gpt_oss: Path, packs: Path, tmp_path: Path) -> None:
    expected_tokens, expected_logits = decode(plain(gpt_oss), [SHORT], 4)
    setting = KERNELS[name]()
    setting.driver = StandInDriver(tmp_path)
    with offloaded(gpt_oss, packs, setting) as (model, runtime):
        tokens, logits = decode(model, [SHORT], 4)
        calls = runtime.record().calls
    assert (calls["in_place"].sum() > 0) == (name != "from slots")
    assert torch.equal(tokens, expected_tokens)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-4)


def test_biases_come_to_the_cpu_once_a_layer(
    gpt_oss: Path, packs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = Setting(planner=CpuFallback(TopM(), link_experts=0), driver=StandInDriver(tmp_path))
    to, mlp, on_host = ExpertForm.to, ExpertForm.mlp, []

    def moved(form: ExpertForm, device: torch.device) -> ExpertForm:
        on_host.append(to(form, device))
        return on_host[-1]

    def computed(form: ExpertForm, *arguments: Any) -> torch.Tensor:
        assert any(form is known for known in on_host)
        return mlp(form, *arguments)

    with offloaded(gpt_oss, packs, setting) as (model, runtime):
        monkeypatch.setattr(ExpertForm, "to", moved)
        monkeypatch.setattr(ExpertForm, "mlp", computed)
        decode(model, [SHORT], 4)
        calls = runtime.record().calls
    assert (calls["in_place"] > 0).sum() > len(on_host) == runtime.geometry.n_layers


def test_the_device_driven_runtime_decodes_like_transformers(gpt_oss: Path, packs: Path) -> None:
    expected_tokens, expected_logits = decode(plain(gpt_oss), [SHORT], 4)
    with device_driven(gpt_oss, packs, GateReuse()) as (model, runtime):
        tokens, logits = decode(model, [SHORT], 4)
        assert runtime.counts()["unplaced"] == 0
    assert torch.equal(tokens, expected_tokens)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", [QuantFormat("int4", 32), QuantFormat("mxfp4", 32)], ids=str)
def test_quantised_experts_keep_their_biases(how: QuantFormat, gpt_oss: Path, packs: Path) -> None:
    """transformers' own model with its matrices rounded, which is another model than the original."""
    expected_tokens, expected_logits = decode(load_whole(gpt_oss, torch.float32, how=how), new_tokens=12)
    with offloaded(gpt_oss, packs, Setting(predictor=GateReuse(), how=how)) as (model, _):
        tokens, logits = decode(model, new_tokens=12)
    assert torch.equal(tokens, expected_tokens)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits[:, 0], decode(plain(gpt_oss), new_tokens=1)[1][:, 0], rtol=1e-3, atol=1e-3)
