"""Experts that a checkpoint ships in mxfp4: against transformers' own conversion, and without rounding into packs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from kernels.quantised import QuantFormat, dequantise, quantise
from prefetch.checkpoint import Checkpoint
from prefetch.errors import CheckpointError
from prefetch.expert_tensors import from_mxfp4
from prefetch.geometry import ExpertKey
from prefetch.model import load_whole
from prefetch.store import ExpertStore
from tests.prefetch.offloaded import Setting, decode, offloaded
from tests.prefetch.tiny_families import CHECKPOINTS, rewritten

MXFP4 = QuantFormat("mxfp4", 32)


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return CHECKPOINTS["gpt_oss_mxfp4"](tmp_path_factory.mktemp("gpt_oss_mxfp4"))


def converted(folder: Path, layer: int, name: str) -> Tensor:
    """[E, rows, columns] bfloat16, by transformers."""
    tensors = load_file(folder / "model.safetensors")
    name = f"model.layers.{layer}.mlp.experts.{name}"
    return convert_moe_packed_tensors(tensors[name + "_blocks"], tensors[name + "_scales"]).mT


@pytest.mark.parametrize("how", [None, MXFP4], ids=["bfloat16", "mxfp4"])
def test_packs_hold_the_shipped_numbers(how: QuantFormat | None, gpt_oss: Path, tmp_path: Path) -> None:
    store = ExpertStore.open(gpt_oss, torch.bfloat16, tmp_path, how, progress=False)
    for layer in range(2):
        gate_up, down = converted(gpt_oss, layer, "gate_up_proj"), converted(gpt_oss, layer, "down_proj")
        for expert in range(8):
            found = store.read_expert(ExpertKey(layer, expert))
            assert torch.equal(found[0], torch.cat([gate_up[expert, 0::2], gate_up[expert, 1::2]]))
            assert torch.equal(found[1], down[expert])


@given(seed=st.integers(0, 999), largest=st.integers(0, 7), scale=st.integers(3, 250))
def test_codes_are_found_again_whatever_the_shipped_scale(seed: int, largest: int, scale: int) -> None:
    """A group that leaves its scale's upper half empty gets a smaller scale and the same numbers."""
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(largest + 1, (4, 3, 32), generator=random) + 8 * torch.randint(2, (4, 3, 32), generator=random)
    blocks = (codes[..., 0::2] | codes[..., 1::2] << 4).byte()
    weights = from_mxfp4(blocks, torch.full((4, 3), scale, dtype=torch.uint8))
    assert torch.equal(dequantise(quantise(weights, MXFP4), MXFP4), weights)
    assert torch.equal(weights.bfloat16().float(), weights)


def test_a_pack_in_mxfp4_decodes_the_shipped_model(gpt_oss: Path, tmp_path: Path) -> None:
    expected_tokens, expected_logits = decode(load_whole(gpt_oss, torch.float32), new_tokens=12)
    with offloaded(gpt_oss, tmp_path, Setting(how=MXFP4)) as (model, _):
        tokens, logits = decode(model, new_tokens=12)
    assert torch.equal(tokens, expected_tokens)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-4)


def test_damaged_blocks_are_named(tmp_path: Path) -> None:
    folder, name = CHECKPOINTS["gpt_oss_mxfp4"](tmp_path / "torn"), "model.layers.1.mlp.experts.down_proj_scales"
    rewritten(folder, lambda tensors: {n: t for n, t in tensors.items() if n != name})
    with pytest.raises(CheckpointError, match=f"no shard holds the tensor {name}"):
        ExpertStore.open(folder, torch.bfloat16, tmp_path / "packs", progress=False)
    rewritten(folder, lambda tensors: tensors | {name: torch.zeros(8, 32, 2)})
    with pytest.raises(CheckpointError, match=f"{name} has dtype F32, not one of U8"):
        ExpertStore.open(folder, torch.bfloat16, tmp_path / "packs", progress=False)


def test_bytes_are_no_weights(gpt_oss: Path) -> None:
    with pytest.raises(CheckpointError, match="has dtype U8, not one of F64"):
        Checkpoint(gpt_oss).read("model.layers.0.mlp.experts.down_proj_scales", (8, 32, 2))
