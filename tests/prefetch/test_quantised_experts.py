"""Quantised experts from the pack to the token: bytes, exact values, and the tokens of the quantised model fully resident."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel, Qwen3MoeForCausalLM

from kernels.quantised import QuantFormat, Quantised, dequantise, quantise
from predictors.gate_reuse import GateReuse
from prefetch.accounting import violations
from prefetch.cache.none import NoCache
from prefetch.cache.resident import Resident
from prefetch.checkpoint import Checkpoint
from prefetch.errors import KernelInputError, PackError
from prefetch.geometry import PAGE_BYTES, ExpertKey
from prefetch.model import load_whole
from prefetch.pack import pack_format_of
from prefetch.planner.cpu_fallback import CpuFallback
from prefetch.planner.top_m import TopM
from prefetch.quantised_geometry import QuantisedGeometry
from prefetch.slots import SlotPool
from prefetch.store import ExpertStore
from tests.conftest import qwen3_config, save_random
from tests.prefetch.offloaded import PROMPTS, Setting, decode, offloaded, plain
from tests.prefetch.transfers.stand_in_driver import StandInDriver

HIDDEN, INTERMEDIATE, N_LAYERS, N_EXPERTS = 128, 64, 3, 8
FORMATS = [QuantFormat("int8", 64), QuantFormat("int4", 32), QuantFormat("fp8"), QuantFormat("mxfp4", 32)]
INT4 = FORMATS[1]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large enough that formats differ in pages, and that groups divide its sizes."""
    config = qwen3_config(hidden_size=HIDDEN, moe_intermediate_size=INTERMEDIATE, initializer_range=0.1)
    return save_random(Qwen3MoeForCausalLM, config, tmp_path_factory.mktemp("quantisable"))


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("packs")


def stored_weights(checkpoint: Path, key: ExpertKey) -> tuple[Tensor, Tensor]:
    """gate_up [2I, H] and down [H, I] as the checkpoint has them."""
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        prefix = f"model.layers.{key.layer}.mlp.experts.{key.expert}."
        gate, up, down = (file.get_tensor(f"{prefix}{name}_proj.weight") for name in ("gate", "up", "down"))
    return torch.cat([gate, up]), down


def rounded(weight: Tensor, how: QuantFormat) -> Tensor:
    return dequantise(quantise(weight, how), how)


@torch.no_grad()
def resident(checkpoint: Path, how: QuantFormat) -> PreTrainedModel:
    """transformers' own model, fully resident, every expert's weights replaced by what the format can hold of them."""
    model = plain(checkpoint)
    for layer in range(N_LAYERS):
        experts = model.model.layers[layer].mlp.experts
        for expert in range(N_EXPERTS):
            gate_up, down = stored_weights(checkpoint, ExpertKey(layer, expert))
            experts.gate_up_proj[expert] = rounded(gate_up, how)
            experts.down_proj[expert] = rounded(down, how)
    return model


@pytest.mark.parametrize("how", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pack_holds_the_nearest_codes(how: QuantFormat, dtype: torch.dtype, checkpoint: Path, packs: Path) -> None:
    store = ExpertStore.open(checkpoint, dtype, packs, how, verify=True, progress=False)
    for key in (ExpertKey(0, 0), ExpertKey(N_LAYERS - 1, N_EXPERTS - 1)):
        expected = [rounded(weight.to(dtype), how).to(dtype) for weight in stored_weights(checkpoint, key)]
        for found, wanted in zip(store.read_expert(key), expected, strict=True):
            assert found.dtype == dtype and torch.equal(found, wanted)


@pytest.mark.parametrize("how", FORMATS, ids=str)
def test_a_row_takes_the_bytes_of_its_codes_and_scales(how: QuantFormat, checkpoint: Path, packs: Path) -> None:
    store = ExpertStore.open(checkpoint, torch.float32, packs, how, progress=False)
    n_weights = 3 * HIDDEN * INTERMEDIATE
    n_scales = 2 * INTERMEDIATE + HIDDEN if how.group is None else n_weights // how.group  # one for each row, or group
    scale_bytes = {"int8": 2, "int4": 2, "fp8": 4, "mxfp4": 1}[how.kind]
    exact = n_weights * how.bits // 8 + n_scales * scale_bytes
    assert exact <= store.row_bytes < exact + PAGE_BYTES + 4 * 128
    assert store.path.stat().st_size >= store.geometry.n_total * store.row_bytes
    assert store.row_bytes < 0.31 * ExpertStore.open(checkpoint, torch.float32, packs, progress=False).row_bytes


def test_every_format_has_a_pack_of_its_own_that_names_it(checkpoint: Path, tmp_path: Path) -> None:
    stores = [ExpertStore.open(checkpoint, torch.float32, tmp_path, how, progress=False) for how in (None, *FORMATS)]
    assert set(tmp_path.iterdir()) == {store.path for store in stores} and len(set(tmp_path.iterdir())) == 5
    for store, name in zip(stores, ["float32", *(f"{how} of float32" for how in FORMATS)], strict=True):
        with safe_open(store.path, "pt") as file:
            assert file.metadata()["dtype"] == name == store.geometry.expert.format_name
            assert file.get_slice("rows").get_shape() == [N_LAYERS, N_EXPERTS, store.row_bytes]
    with safe_open(stores[2].path, "pt") as file:  # another program can find codes and scales
        where = {name: file.metadata()[name] for name in ("gate_up", "gate_up_scales", "down", "down_scales")}
        row = file.get_slice("rows")[1, 2]
    codes, scales = (json.loads(where[name].split(" at byte ")[0]) for name in ("down", "down_scales"))
    at, scales_at = (int(where[name].split(" at byte ")[1].split()[0]) for name in ("down", "down_scales"))
    down = Quantised(
        row[at : at + codes[0] * codes[1]].view(codes),
        row[scales_at : scales_at + 2 * scales[0] * scales[1]].view(torch.float16).view(scales),
    )
    expected = quantise(stored_weights(checkpoint, ExpertKey(1, 2))[1], INT4)
    assert torch.equal(down.codes, expected.codes) and torch.equal(down.scales, expected.scales)


def test_a_slot_gives_what_its_row_stands_for_now(checkpoint: Path, packs: Path) -> None:
    store = ExpertStore.open(checkpoint, torch.float32, packs, INT4, progress=False)
    pool = SlotPool(store.geometry, 2)
    for key in (ExpertKey(0, 1), ExpertKey(2, 3)):
        pool.buffer(1)[:] = store.read_row(key).numpy().data
        for found, expected in zip(pool.operands(1), store.read_expert(key), strict=True):
            assert torch.equal(found, expected.t())


SETTINGS: dict[str, Callable[[], Setting]] = {
    "resident": lambda: Setting(Resident(24), n_slots=24, staging=0, transient=0),
    "slru": lambda: Setting(),
    "gate reuse": lambda: Setting(predictor=GateReuse()),
    "two transients": lambda: Setting(NoCache(0), n_slots=2, staging=0, transient=2),
    "cpu": lambda: Setting(planner=CpuFallback(TopM(), link_experts=0)),
}


@pytest.mark.parametrize("how", FORMATS, ids=str)
def test_tokens_equal_the_quantised_model_fully_resident(how: QuantFormat, checkpoint: Path, packs: Path) -> None:
    """And so does every arrangement, to the last bit; the unquantised model says something else."""
    expected_tokens, expected_logits = decode(resident(checkpoint, how), new_tokens=12)
    bits = []
    for make in SETTINGS.values():
        setting = make()
        setting.how = how
        with offloaded(checkpoint, packs, setting) as (model, runtime):
            tokens, logits = decode(model, new_tokens=12)
            runtime.finish()
            record = runtime.record()
        assert violations(record) == []
        completed = record.transfers[record.transfers["outcome"] != "cancelled"]
        assert (completed["n_bytes"] == runtime.geometry.expert.row_bytes).all()
        assert torch.equal(tokens, expected_tokens)
        torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-4)
        bits.append(logits)
    assert all(torch.equal(logits, bits[0]) for logits in bits)
    unquantised = decode(plain(checkpoint), new_tokens=1)[1]
    assert not torch.allclose(bits[0][:, :1], unquantised, rtol=1e-4, atol=1e-4)


def test_kernels_read_the_codes_of_the_same_slots(tmp_path: Path) -> None:
    """The GPU's path with kernels in the interpreter: prefill grouped, decode by pairs, out of slots and across the link."""
    config = qwen3_config(hidden_size=32, moe_intermediate_size=32)
    checkpoint, prompt = save_random(Qwen3MoeForCausalLM, config, tmp_path / "small"), [PROMPTS[0][:, :5]]
    expected_tokens, expected_logits = decode(resident(checkpoint, INT4), prompt, 3)
    planner = CpuFallback(TopM(), link_experts=1)
    setting = Setting(predictor=GateReuse(), planner=planner, driver=StandInDriver(tmp_path), how=INT4, zero_copy=True)
    with offloaded(checkpoint, tmp_path, setting) as (model, runtime):
        tokens, logits = decode(model, prompt, 3)
        calls = runtime.record().calls
    assert calls["in_place"].sum() > 0 and calls["hits"].sum() > 0
    assert torch.equal(tokens, expected_tokens)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-4)


def test_the_whole_model_is_rounded_as_its_pack_is(checkpoint: Path) -> None:
    assert torch.equal(
        decode(load_whole(checkpoint, torch.float32, how=INT4), PROMPTS[:1], 2)[0],
        decode(resident(checkpoint, INT4), PROMPTS[:1], 2)[0],
    )
    experts = load_whole(checkpoint, torch.float32, how=INT4).model.layers[1].mlp.experts
    gate_up, down = stored_weights(checkpoint, ExpertKey(1, 2))
    assert torch.equal(experts.gate_up_proj[2], rounded(gate_up, INT4))
    assert torch.equal(experts.down_proj[2], rounded(down, INT4))


def test_a_pack_of_another_format_is_refused(checkpoint: Path, packs: Path) -> None:
    found = ExpertStore.open(checkpoint, torch.float32, packs, INT4, progress=False)
    wanted = pack_format_of(Checkpoint(checkpoint), torch.float32, QuantFormat("int8", 64))
    with pytest.raises(PackError, match="its experts are int4 per 32 of float32, int8 per 64 of float32 was asked for"):
        ExpertStore(found.path, wanted)
    with pytest.raises(PackError, match="its experts are no pack, int8 per 64 of float32 was asked for"):
        ExpertStore(checkpoint / "model.safetensors", wanted)
    with pytest.raises(PackError, match="absent.*it is missing"):
        ExpertStore(packs / "absent", wanted)


def test_sizes_that_do_not_divide_are_refused_before_anything_is_written(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(KernelInputError, match=r"64 columns do not divide into groups of 128 \(int4 per 128\)"):
        ExpertStore.open(checkpoint, torch.float32, tmp_path, QuantFormat("int4", 128), progress=False)
    assert list(tmp_path.iterdir()) == []


def test_weights_that_no_scale_can_hold_leave_no_pack(tmp_path: Path) -> None:
    config = qwen3_config(hidden_size=32, moe_intermediate_size=32, initializer_range=1e8)
    folder = save_random(Qwen3MoeForCausalLM, config, tmp_path / "large")
    with pytest.raises(KernelInputError, match="fp16 ends at 65504: use fp8 or mxfp4"):
        ExpertStore.open(folder, torch.float32, tmp_path / "packs", INT4, progress=False)
    assert list((tmp_path / "packs").iterdir()) == []
    assert isinstance(
        ExpertStore.open(folder, torch.float32, tmp_path / "packs", QuantFormat("fp8"), progress=False).geometry.expert,
        QuantisedGeometry,
    )
