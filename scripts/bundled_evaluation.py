"""How good the bundled model is, and how its routers behave, measured on text it has not seen."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F
from transformers import Qwen3MoeForCausalLM

from scripts.bundled_corpus import SEPARATOR, Corpus

WINDOW = 512  # tokens the model sees at once
STRIDE = 256  # every byte is scored once, with at least this much context where the file has it
BATCH = 16


@dataclass(frozen=True)
class RouterStatistics:
    """One MoE layer over held-out text. Loads are relative to a balanced router, so 1 is even."""

    layer: int
    least_load: float
    greatest_load: float
    load_entropy: float  # of the experts' shares, over log E: 1 is even
    entropy_bits: float  # mean over tokens of the router's own distribution
    token_reuse: float  # share of a token's experts that the token before it used too
    gate_reuse_recall: float | None  # of its router applied one layer early, recall@k; None at layer 0


def windows_of(data: bytes) -> list[tuple[Tensor, int]]:
    """(token ids [n + 1], how many of the last n to score) covering a file, a separator before its first byte."""
    tokens = torch.tensor([SEPARATOR, *data])
    pieces, scored = [], 0
    while scored < len(data):
        end = min(len(data), WINDOW if scored == 0 else scored + STRIDE)
        start = max(0, end - WINDOW)
        pieces.append((tokens[start : end + 1], end - scored))
        scored = end
    return pieces


@torch.inference_mode()
def bits_per_byte(model: Qwen3MoeForCausalLM, corpus: Corpus) -> float:
    """Mean negative log2 probability of every byte of `corpus`, teacher-forced."""
    pieces = [piece for data in corpus.files.values() for piece in windows_of(data)]
    pieces.sort(key=lambda piece: len(piece[0]))
    nats, n_scored = 0.0, 0
    for first in track(range(0, len(pieces), BATCH), description="bits per byte"):
        batch = pieces[first : first + BATCH]
        longest = max(len(tokens) for tokens, _ in batch)
        padded = torch.stack([F.pad(tokens, (0, longest - len(tokens)), value=0) for tokens, _ in batch])
        logits = model(input_ids=padded[:, :-1], use_cache=False).logits.float()
        losses = F.cross_entropy(logits.flatten(0, 1), padded[:, 1:].flatten(), reduction="none").view(len(batch), -1)
        for row, (tokens, n) in zip(losses, batch, strict=True):
            nats += float(row[len(tokens) - 1 - n : len(tokens) - 1].sum())
            n_scored += n
    return nats / n_scored / math.log(2)


@torch.inference_mode()
def router_statistics(model: Qwen3MoeForCausalLM, corpus: Corpus, n_windows: int = 64) -> list[dict[str, float | None]]:
    """Per layer, over `n_windows` windows spread evenly over the corpus."""
    pieces = [tokens for data in corpus.files.values() for tokens, _ in windows_of(data) if len(tokens) == WINDOW + 1]
    chosen = torch.stack(pieces[:: max(1, len(pieces) // n_windows)][:n_windows])[:, :-1]
    residuals, routed = _observe(model, chosen)
    statistics = []
    for layer in range(len(routed)):
        recall = _early_recall(model, layer, residuals[layer - 1], routed[layer][1]) if layer else None
        statistics.append(asdict(_one_layer(layer, *routed[layer], recall)))
    return statistics


def _observe(model: Qwen3MoeForCausalLM, tokens: Tensor) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
    """Per layer: the residual [B, S, H] before the pre-MoE norm, and (logits [B, S, E], ids [B, S, k])."""
    residuals: list[Tensor] = []
    routed: list[tuple[Tensor, Tensor]] = []
    hooks = []
    for layer in model.model.layers:
        hooks.append(layer.post_attention_layernorm.register_forward_pre_hook(lambda _m, args: residuals.append(args[0])))
        hooks.append(
            layer.mlp.gate.register_forward_hook(
                lambda _m, _a, out: routed.append((out[0].unflatten(0, tokens.shape), out[2].unflatten(0, tokens.shape)))
            )
        )
    try:
        model(input_ids=tokens, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return residuals, routed


def _one_layer(layer: int, logits: Tensor, ids: Tensor, recall: float | None) -> RouterStatistics:
    n_experts = logits.shape[-1]
    load = torch.bincount(ids.flatten(), minlength=n_experts) / ids.numel()
    probabilities = logits.float().softmax(-1)
    reused = (ids[:, 1:, :, None] == ids[:, :-1, None, :]).any(-1).float().mean()
    return RouterStatistics(
        layer,
        least_load=float(load.min()) * n_experts,
        greatest_load=float(load.max()) * n_experts,
        load_entropy=float(torch.special.entr(load).sum()) / math.log(n_experts),
        entropy_bits=float(torch.special.entr(probabilities).sum(-1).mean()) / math.log(2),
        token_reuse=float(reused),
        gate_reuse_recall=recall,
    )


def _early_recall(model: Qwen3MoeForCausalLM, layer: int, residual_before: Tensor, ids: Tensor) -> float:
    target = model.model.layers[layer]
    logits = F.linear(target.post_attention_layernorm(residual_before), target.mlp.gate.weight)
    guessed = logits.topk(ids.shape[-1], dim=-1).indices
    return float((ids[..., :, None] == guessed[..., None, :]).any(-1).float().mean())
