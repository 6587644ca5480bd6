"""Checkpoints that ship pre-gates: hints change nothing, routing changes exactly what it says, and both survive being offloaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import Qwen3MoeForCausalLM

from predictors.shipped_pre_gate import ShippedPreGate
from prefetch.checkpoint import Checkpoint
from prefetch.errors import CheckpointError, ConfigError
from prefetch.model import load_offloaded, load_whole
from prefetch.pre_gate import HINT, ROUTE, SHARD, PreGates, add_pre_gates, read_pre_gates
from tests.conftest import qwen3_config, save_random
from tests.prefetch.offloaded import PROMPTS, Setting, decode, offloaded, plain
from tests.prefetch.tiny_families import CHECKPOINTS

N_LAYERS, N_EXPERTS, TOP_K, HIDDEN = 3, 8, 2, 32


def heads(level: int, seed: int = 5) -> tuple[torch.Tensor, ...]:
    random = torch.Generator().manual_seed(seed)
    return tuple(0.5 * torch.randn(N_EXPERTS, HIDDEN, generator=random) for _ in range(N_LAYERS - level))


@pytest.fixture
def gated(tiny_qwen3: Path, tmp_path: Path) -> Callable[[int, str], Path]:
    def make(level: int, mode: str) -> Path:
        folder = shutil.copytree(tiny_qwen3, tmp_path / f"{mode}{level}")
        add_pre_gates(folder, PreGates(level, mode, heads(level)))
        return folder

    return make


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return save_random(Qwen3MoeForCausalLM, qwen3_config(), tmp_path / "sharded", max_shard_size="50KB")


def routed_by_hand(folder: Path, level: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Logits of the pre-gated model, written out again: every MoE block in terms of its tensors."""
    model, weights, inputs = plain(folder), heads(level), {}

    def block(layer: int) -> Callable:
        mlp = model.model.layers[layer].mlp

        def forward(hidden: torch.Tensor) -> torch.Tensor:
            x = hidden.reshape(-1, HIDDEN)
            inputs[layer] = x
            logits = x @ mlp.gate.weight.T if layer < level else inputs[layer - level] @ weights[layer - level].T
            top = logits.softmax(-1).topk(TOP_K)
            share = top.values / top.values.sum(-1, keepdim=True)
            out = torch.zeros_like(x)
            for rank in range(TOP_K):
                for row, expert in enumerate(top.indices[:, rank].tolist()):
                    gate, up = (mlp.experts.gate_up_proj[expert] @ x[row]).chunk(2)
                    out[row] += share[row, rank] * (mlp.experts.down_proj[expert] @ (F.silu(gate) * up))
            return out.view_as(hidden)

        return forward

    for layer in range(N_LAYERS):
        model.model.layers[layer].mlp.forward = block(layer)
    return lambda ids: model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("level", [1, 2])
@torch.inference_mode()
def test_heads_route_as_the_method_says(level: int, gated: Callable[[int, str], Path]) -> None:
    folder = gated(level, ROUTE)
    expected, model = routed_by_hand(folder, level), load_whole(folder, torch.float32)
    own = plain(folder)
    for prompt in PROMPTS:
        logits = model(input_ids=prompt, use_cache=False).logits
        torch.testing.assert_close(logits, expected(prompt), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(logits, own(input_ids=prompt, use_cache=False).logits, atol=1e-2)


@pytest.mark.parametrize("level", [1, 2])
def test_routed_live_every_prefetch_is_right(level: int, gated: Callable[[int, str], Path], tmp_path: Path) -> None:
    folder = gated(level, ROUTE)
    expected = decode(load_whole(folder, torch.float32))
    with offloaded(folder, tmp_path / "pack", Setting(predictor=ShippedPreGate(), n_slots=12, staging=4)) as (model, runtime):
        tokens, logits = decode(model)
        runtime.finish()
        record = runtime.record()
    assert torch.equal(tokens, expected[0])
    torch.testing.assert_close(logits, expected[1], rtol=1e-4, atol=1e-4)
    trace = runtime.recorder.trace({})
    for layer in range(level, N_LAYERS):
        guessed, chosen = trace.guesses[level][:, layer], trace.topk_ids[:, layer]
        assert (guessed[:, :TOP_K] == chosen).all()
    prefetches = record.transfers[record.transfers["kind"] == "prefetch"]
    assert set(prefetches["outcome"]) <= {"useful", "demand"}  # demand: right too, but needed before the link began it
    assert (prefetches["outcome"] == "useful").any()


def test_a_multimodal_checkpoint_can_ship_them_too(tmp_path: Path) -> None:
    folder = CHECKPOINTS["qwen3_5_moe"](tmp_path / "multimodal")
    add_pre_gates(folder, PreGates(1, HINT, heads(0)))
    found = load_offloaded(folder, torch.float32).pre_gates
    assert (found.level, found.mode) == (1, HINT) and len(found.heads) == 3
    assert all(torch.equal(head, given) for head, given in zip(found.heads, heads(0), strict=True))


def test_hints_leave_every_token_alone_and_are_used(gated: Callable[[int, str], Path], tmp_path: Path) -> None:
    folder = gated(1, HINT)
    with offloaded(folder, tmp_path / "pack", Setting()) as (model, _):
        without = decode(model)
    with offloaded(folder, tmp_path / "pack", Setting(predictor=ShippedPreGate())) as (model, runtime):
        tokens, logits = decode(model)
        trace = runtime.recorder.trace({})
    assert torch.equal(logits, without[1]) and torch.equal(tokens, decode(plain(folder))[0])
    assert trace.guesses[1].shape[0] == trace.n_tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_added_is_what_is_read_in_one_file_and_in_shards(
    sharded: Path, tiny_qwen3: Path, tmp_path: Path, dtype
) -> None:
    single = shutil.copytree(tiny_qwen3, tmp_path / "single")
    for folder in (single, sharded):
        before = {name: tensor for shard in folder.glob("*.safetensors") for name, tensor in load_file(shard).items()}
        given = tuple(head.to(dtype) for head in heads(2))
        add_pre_gates(folder, PreGates(2, HINT, given))
        found = read_pre_gates(Checkpoint(folder))
        assert found is not None and (found.level, found.mode, len(found.heads)) == (2, HINT, 1)
        assert all(map(torch.equal, found.heads, given))
        whole = load_whole(folder, torch.float32).state_dict()
        loaded = load_file(folder / SHARD)
        assert set(loaded) == {"model.layers.0.mlp.pre_gate.weight"}
        gates = [name for name in before if name.endswith("gate.weight") and ".experts." not in name]
        assert gates and all(torch.equal(whole[name], before[name]) for name in gates)
        with pytest.raises(CheckpointError, match="has pre-gates already"):
            add_pre_gates(folder, PreGates(2, HINT, given))


def edit_config(folder: Path, **options: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    config = {name: value for name, value in (config | options).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))


def edit_heads(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    tensors = change(load_file(folder / SHARD))
    save_file(tensors, folder / SHARD)


FIRST, SECOND = (f"model.layers.{layer}.mlp.pre_gate.weight" for layer in range(2))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: edit_config(f, pre_gate_level=0), "pre_gate_level is 0; it must be a whole number from 1 to 2"),
        (lambda f: edit_config(f, pre_gate_level=3), "pre_gate_level is 3"),
        (lambda f: edit_config(f, pre_gate_level="1"), "pre_gate_level is '1'"),
        (lambda f: edit_config(f, pre_gate_level=2), f"{SECOND} selects for a layer past the last at pre_gate_level 2"),
        (lambda f: edit_config(f, pre_gate_level=None), "pre_gate_level is None"),
        (lambda f: edit_config(f, pre_gate_mode="guess"), "pre_gate_mode is 'guess'; it must be one of hint, route"),
        (lambda f: edit_config(f, pre_gate_mode=None), "pre_gate_mode is None"),
        (lambda f: edit_config(f, pre_gate_level=None, pre_gate_mode=None), f"lacks pre_gate_level and .*{FIRST}"),
        (lambda f: edit_heads(f, lambda t: {FIRST: t[FIRST]}), f"no shard holds the tensor {SECOND}"),
        (lambda f: edit_heads(f, lambda t: t | {SECOND: torch.zeros(8, 31)}), r"has shape \[8, 31\]; config.json asks for \[8, 32\]"),
        (lambda f: edit_heads(f, lambda t: t | {FIRST: torch.full((8, 32), torch.nan)}), f"{FIRST} holds numbers that are not finite"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(damage: Callable[[Path], None], said: str, gated: Callable[[int, str], Path]) -> None:
    folder = gated(1, HINT)
    damage(folder)
    with pytest.raises(CheckpointError, match=said):
        load_offloaded(folder, torch.float32)


def test_a_checkpoint_without_pre_gates_has_none_and_the_predictor_says_so(tiny_qwen3: Path, tmp_path: Path) -> None:
    assert read_pre_gates(Checkpoint(tiny_qwen3)) is None
    with pytest.raises(ConfigError, match="ships no pre_gate weights"):
        with offloaded(tiny_qwen3, tmp_path, Setting(predictor=ShippedPreGate())):
            pass
