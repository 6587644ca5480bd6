"""A checkpoint's own multi-token-prediction head: against its equations written out, and as the draft of a live run."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from predictors.base import AttentionView, LayerView, ModelView, Prediction, Predictor
from predictors.draft import Draft
from predictors.fitting import FitOptions, fit
from prefetch.accounting import violations
from prefetch.errors import CheckpointError
from prefetch.model import load_offloaded
from tests.prefetch.offloaded import Setting, decode, offloaded, plain
from tests.prefetch.tiny_families import CHECKPOINTS, rewritten, with_mtp_head

N_LAYERS, N_EXPERTS, HIDDEN, HEADS, HEAD_SIZE = 4, 8, 32, 2, 16


@pytest.fixture(scope="module", params=["qwen3_5_moe", "qwen3_5_moe_text", "qwen3_next"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fused experts in a multimodal checkpoint, and one expert at a time in text models."""
    return with_mtp_head(CHECKPOINTS[request.param](tmp_path_factory.mktemp(request.param)))


def seen(n: int) -> AttentionView:
    random = torch.Generator().manual_seed(3)
    final, ids = torch.randn(n, HIDDEN, generator=random), torch.randint(64, (n,), generator=random)
    return AttentionView(0, 1, 0, torch.zeros(n, HIDDEN), ids, final)


def by_hand(folder: Path, view: AttentionView) -> Tensor:
    """The head's state [T, H] in float64, token by token, from the checkpoint's tensors alone."""
    tensors = {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}
    embedding = next(tensor for name, tensor in tensors.items() if name.endswith("embed_tokens.weight"))
    mtp = {name.removeprefix("mtp."): tensor for name, tensor in tensors.items() if name.startswith("mtp.")}
    layer = {name.removeprefix("layers.0."): tensor for name, tensor in mtp.items()}

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean() + 1e-6).sqrt() * (1 + weight)

    def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return down @ (torch.nn.functional.silu(gate @ x) * (up @ x))

    def expert(index: int) -> tuple[Tensor, Tensor, Tensor]:
        if "mlp.experts.gate_up_proj" in layer:
            gate_up = layer["mlp.experts.gate_up_proj"][index]
            return gate_up[:16], gate_up[16:], layer["mlp.experts.down_proj"][index]
        return tuple(layer[f"mlp.experts.{index}.{part}_proj.weight"] for part in ("gate", "up", "down"))

    def one(token_id: int, final: Tensor) -> Tensor:
        token = norm(embedding[token_id], mtp["pre_fc_norm_embedding.weight"])
        x = mtp["fc.weight"] @ torch.cat([token, norm(final, mtp["pre_fc_norm_hidden.weight"])])
        read = norm(x, layer["input_layernorm.weight"])
        value = layer["self_attn.v_proj.weight"] @ read  # of the one key-value head; a token alone attends to itself
        gate = (layer["self_attn.q_proj.weight"] @ read).view(HEADS, 2, HEAD_SIZE)[:, 1].flatten()
        x = x + layer["self_attn.o_proj.weight"] @ (value.repeat(HEADS) * gate.sigmoid())
        read = norm(x, layer["post_attention_layernorm.weight"])
        chosen = (layer["mlp.gate.weight"] @ read).softmax(0).topk(2)
        for share, index in zip(chosen.values / chosen.values.sum(), chosen.indices.tolist(), strict=True):
            x = x + share * swiglu(read, *expert(index))
        shared = swiglu(read, *(layer[f"mlp.shared_expert.{part}_proj.weight"] for part in ("gate", "up", "down")))
        x = x + (layer["mlp.shared_expert_gate.weight"] @ read).sigmoid() * shared
        return norm(x, mtp["norm.weight"])

    assert view.previous_final is not None
    return torch.stack([one(int(i), final.double()) for i, final in zip(view.token_ids, view.previous_final, strict=True)])


def test_the_head_is_its_equations(folder: Path) -> None:
    head = load_offloaded(folder, torch.float32).draft_head
    state = head(seen(9))
    torch.testing.assert_close(state.double(), by_hand(folder, seen(9)), rtol=1e-4, atol=1e-5)


def test_a_token_is_answered_alone_or_in_a_batch(folder: Path) -> None:
    head, view = load_offloaded(folder, torch.float32).draft_head, seen(9)
    assert view.previous_final is not None
    for row in range(9):
        one = dataclasses.replace(
            view, token_ids=view.token_ids[row : row + 1], previous_final=view.previous_final[row : row + 1]
        )
        torch.testing.assert_close(head(one)[0], head(view)[row], rtol=1e-5, atol=1e-5)


def test_in_bfloat16_it_is_the_same_but_for_rounding(folder: Path) -> None:
    state = load_offloaded(folder, torch.bfloat16).draft_head(seen(64))
    assert state.dtype == torch.bfloat16
    error = (state.double() - by_hand(folder, seen(64))).norm(dim=1) / by_hand(folder, seen(64)).norm(dim=1)
    assert error.median() < 0.03  # where rounding flips an expert, a row differs by more


def test_nothing_of_it_is_read_before_it_is_asked(folder: Path) -> None:
    model = load_offloaded(folder, torch.float32)
    assert all(tensor.is_meta for tensor in model.draft_head.empty.state_dict().values())
    assert not any("mtp" in name or "draft" in name for name in model.state_dict())


def test_a_checkpoint_without_one_has_none(tiny_qwen3: Path) -> None:
    assert load_offloaded(tiny_qwen3, torch.float32).draft_head is None


def test_one_that_lacks_a_tensor_is_refused(tmp_path: Path) -> None:
    folder = with_mtp_head(CHECKPOINTS["qwen3_5_moe_text"](tmp_path / "torn"))
    rewritten(folder, lambda tensors: {n: t for n, t in tensors.items() if n != "mtp.layers.0.self_attn.o_proj.weight"})
    with pytest.raises(CheckpointError, match=r"its draft head lacks mtp\.layers\.0\.self_attn\.o_proj\.weight"):
        load_offloaded(folder, torch.float32)


@dataclass
class Noting(Predictor):
    """Predicts nothing, and keeps what it is shown of decoding."""

    views: list[list[LayerView]] = field(default_factory=lambda: [[] for _ in range(N_LAYERS)])
    needs_residual = needs_pre_attention = needs_previous_final = True

    def predict(self, seen: LayerView) -> list[Prediction]:
        if seen.step > 0:
            self.views[seen.layer].append(seen)
        return []

    def joined(self) -> list[LayerView]:
        """One view per layer of all tokens."""
        tensors = ("hidden", "residual", "topk_ids", "topk_weights", "token_ids", "pre_attention", "previous_final")
        return [
            dataclasses.replace(views[0], **{name: torch.cat([getattr(view, name) for view in views]) for name in tensors})
            for views in self.views
        ]


def test_a_draft_out_of_it_is_trained_and_named_live(folder: Path, tmp_path: Path) -> None:
    noting = Noting()
    with offloaded(folder, tmp_path, Setting(predictor=noting)) as (model, runtime):
        decode(model)
        view: ModelView = runtime.model
    draft = Draft()
    found = fit(draft, view, noting.joined(), noting.joined(), FitOptions(epochs=60, batch_rows=16, learning_rate=1e-2))
    assert draft.n_parameters() == HIDDEN + N_LAYERS * N_EXPERTS * (HIDDEN + 1)  # the map alone
    assert max(found.recalls) > 0.6  # of the tokens it was trained on; chance is a quarter
    expected_tokens, _ = decode(plain(folder))
    with offloaded(folder, tmp_path, Setting(predictor=draft)) as (model, runtime):
        tokens, _ = decode(model)
        runtime.finish()
        record = runtime.record()
    assert torch.equal(tokens, expected_tokens)
    assert violations(record) == []
    assert (record.transfers["kind"] == "prefetch").any()
