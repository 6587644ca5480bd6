"""Decoding, and proof that two ways of running a model say the same."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from experiments.workload import Batch

if TYPE_CHECKING:  # `scripts.gpu_check` decodes where there is no hydra
    from omegaconf import DictConfig


@dataclass
class Generation:
    """What one batch generated. `digests` identify the exact bits of every step's logits."""

    tokens: Tensor  # [B, new_tokens] int64
    digests: list[str]  # per step, of the logits [B, V]
    # Per step [B, 2], the two largest scores: logits, with noise where tokens are drawn.
    top_values: list[Tensor] = field(default_factory=list)
    top_ids: list[Tensor] = field(default_factory=list)  # per step [B, 2], their tokens


@dataclass(frozen=True)
class Divergence:
    """The first step where a generation leaves the reference: how close the two candidates were there."""

    batch: int
    row: int
    step: int
    margin: float  # difference of the reference's two largest scores
    rounding: float  # what the two summation orders may differ by there: the logits' own rounding unit times their count


@torch.inference_mode()
def generate(model: PreTrainedModel, prompt: Tensor, new_tokens: int, *, temperature: float = 0.0, seed: int = 0) -> Generation:
    """Decode `new_tokens` tokens after `prompt` [B, n], never stopping early.

    Args:
        temperature: 0 takes the likeliest token. Above 0 tokens are drawn from softmax(logits / temperature) by the Gumbel-max
            rule (argmax of logits / temperature + Gumbel noise), so that a draw depends on the logits and on `seed` alone
            and a near tie can be told from a wrong result, as in greedy decoding.
        seed: of the noise.
    """
    cache = DynamicCache(config=model.config)
    noise = torch.Generator().manual_seed(seed)
    token_ids, tokens = prompt, []
    generation = Generation(torch.empty(0), [])
    for _ in range(new_tokens):
        input_ids = token_ids.to(model.device)
        logits = model(input_ids=input_ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1].cpu()
        scores = logits.float()
        if temperature > 0:
            scores = scores / temperature - torch.empty_like(scores).exponential_(generator=noise).log()
        token_ids = scores.argmax(-1, keepdim=True)
        tokens.append(token_ids)
        generation.digests.append(hashlib.blake2b(logits.contiguous().view(torch.uint8).numpy(), digest_size=12).hexdigest())
        top = scores.topk(2, dim=-1)
        generation.top_values.append(top.values)
        generation.top_ids.append(top.indices)
    generation.tokens = torch.cat(tokens, dim=1)
    return generation


def generate_all(model: PreTrainedModel, batches: list[Batch], workload: DictConfig, seed: int) -> Iterator[Generation]:
    """What `model` says after each batch, as `workload` describes; each batch has noise of its own."""
    for index, batch in enumerate(batches):
        draws = {"temperature": workload.temperature, "seed": seed * len(batches) + index}
        yield generate(model, batch.token_ids, workload.new_tokens, **draws)


def same_bits(one: list[Generation], other: list[Generation]) -> bool:
    """All logits of all steps are bit-identical."""
    return [g.digests for g in one] == [g.digests for g in other]


def divergences(reference: list[Generation], other: list[Generation], epsilon: float) -> list[Divergence]:
    """Where `other` first leaves `reference`, per sequence, with the reference's margin between its two best tokens.

    Args:
        epsilon: rounding unit of the model's dtype. The two may differ by a few of those, scaled by the logits' size; a
            larger margin at a divergence means a wrong result, not rounding.
    """
    found = []
    for batch, (ours, theirs) in enumerate(zip(other, reference, strict=True)):
        for row in range(len(ours.tokens)):
            differs = (ours.tokens[row] != theirs.tokens[row]).nonzero()
            if len(differs):
                step = int(differs[0])
                values = theirs.top_values[step][row]
                rounding = 8 * epsilon * float(values.abs().max())
                found.append(Divergence(batch, row, step, float(values[0] - values[1]), rounding))
    return found
