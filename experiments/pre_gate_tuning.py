"""Fine-tuning a model whose experts are selected by pre-gates, on the training text of the bundled corpus.

The loss is the model's own: next-byte cross-entropy plus the load-balancing term it was trained with. With `tune: heads` nothing
but the heads moves; with `all`, every parameter does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from prefetch.errors import ConfigError
from scripts.train_bundled_model import AUX_COEFFICIENT, RouterTap

HEADS, ALL = TUNED = ("heads", "all")
WARMUP_SHARE = 0.05  # of the steps; then the rate falls to zero along a cosine


@dataclass
class TuningOptions:
    """How to fine-tune. Defaults are those of `conf/pre_gate.yaml`."""

    steps: int = 150
    batch: int = 16  # windows in a step
    window: int = 512  # tokens
    learning_rate: float = 2e-3
    seed: int = 0


def tune(
    model: PreTrainedModel,
    heads: list[nn.Parameter],
    what: str,
    tokens: Tensor,
    options: TuningOptions,
    report: Callable[[dict[str, float]], None] = lambda figures: None,
) -> list[float]:
    """Fine-tune `model` in place; returns the cross-entropy of each step, in nats. To be saved afterwards, not to be run.

    Args:
        heads: the parameters that route the layers selected for.
        what: "heads" | "all".
        tokens: [N] int64, the training text.
        report: called after each step with its figures.

    Raises:
        ConfigError: the text is shorter than a window, or the loss became NaN.
    """
    if len(tokens) <= options.window:
        raise ConfigError(f"tuning.window={options.window}: the training text has {len(tokens)} tokens only")
    parameters = heads if what == HEADS else list(model.parameters())
    model.requires_grad_(False).train()
    for parameter in parameters:
        parameter.requires_grad_(True)
    model.set_experts_implementation("sorted_training")
    tap = RouterTap(model)
    optimiser = torch.optim.AdamW(parameters, lr=options.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: learning_rate_share(step, options.steps))
    random = torch.Generator().manual_seed(options.seed)
    losses = []
    for step in range(1, options.steps + 1):
        loss, balance = _losses(model, tap, random_windows(tokens, options, random))
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            raise ConfigError(f"fine-tuning diverged at step {step} (loss {losses[-1]}); lower tuning.learning_rate")
        (loss + AUX_COEFFICIENT * balance).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad(set_to_none=True)
        report({"step": step, "bits_per_byte": losses[-1] / math.log(2), "balance": float(balance.detach())})
    return losses


def _losses(model: PreTrainedModel, tap: RouterTap, windows: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy in nats, and the balancing loss, of windows [batch, window + 1]."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=windows[:, :-1], use_cache=False).logits.float()
    return cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()), tap.balancing_loss()


def learning_rate_share(step: int, n_steps: int) -> float:
    """Share of the peak rate at `step`: up in a line, down to zero along half a cosine."""
    warmup = max(1, round(WARMUP_SHARE * n_steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, n_steps - warmup)))


def random_windows(tokens: Tensor, options: TuningOptions, random: torch.Generator) -> Tensor:
    """[batch, window + 1] pieces of `tokens` from anywhere."""
    starts = torch.randint(len(tokens) - options.window, (options.batch,), generator=random)
    return tokens[starts[:, None] + torch.arange(options.window + 1)]
