"""How well a model predicts text: loss, bits per byte and next-byte accuracy, teacher-forced, every byte scored once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from scripts.bundled_corpus import Corpus
from scripts.bundled_evaluation import windows_of

BATCH = 16  # windows
RESAMPLES = 2000


@dataclass(frozen=True)
class TextQuality:
    """One model on one text, window by window."""

    n_bytes: np.ndarray  # [W] scored
    nats: np.ndarray  # [W] sum of the loss
    n_right: np.ndarray  # [W] bytes that were the likeliest

    def figures(self) -> dict[str, float]:
        """Means over all bytes."""
        n_bytes, loss = int(self.n_bytes.sum()), float(self.nats.sum() / self.n_bytes.sum())
        return {
            "bytes_scored": n_bytes,
            "loss_nats": loss,
            "bits_per_byte": loss / math.log(2),
            "next_byte_accuracy": float(self.n_right.sum() / n_bytes),
        }


def relative_change(before: TextQuality, after: TextQuality, seed: int = 0) -> tuple[float, float, float]:
    """Change of bits per byte on the same windows, as a share of `before`: (value, 2.5 %, 97.5 %).

    The interval is a paired bootstrap over windows; a few windows, or windows that overlap, make it too narrow.
    """
    draws = np.random.default_rng(seed).integers(len(before.nats), size=(RESAMPLES, len(before.nats)))
    resampled = after.nats[draws].sum(1) / before.nats[draws].sum(1) - 1
    low, high = np.quantile(resampled, (0.025, 0.975))
    return float(after.nats.sum() / before.nats.sum() - 1), float(low), float(high)


Window = tuple[Tensor, int]  # token ids [n + 1], how many of the last n to score


def spread_windows(corpus: Corpus, max_bytes: int) -> list[Window]:
    """Windows of `corpus` as `scripts.bundled_evaluation` cuts them, evenly thinned out to about `max_bytes` scored bytes."""
    windows = [window for data in corpus.files.values() for window in windows_of(data)]
    every = max(1, math.ceil(sum(n for _, n in windows) / max_bytes))
    return sorted(windows[::every], key=lambda window: len(window[0]))  # equal lengths share a batch


@torch.inference_mode()
def text_quality(model: PreTrainedModel, windows: list[Window], advance: Callable[[], None] = lambda: None) -> TextQuality:
    """Score `windows`; `advance` is called after each batch of `BATCH`."""
    nats, n_right = [], []
    for first in range(0, len(windows), BATCH):
        batch = windows[first : first + BATCH]
        longest = max(len(tokens) for tokens, _ in batch)
        padded = torch.stack([F.pad(tokens, (0, longest - len(tokens))) for tokens, _ in batch])  # behind: causal, so unseen
        logits = model(input_ids=padded[:, :-1], use_cache=False).logits.float()
        for row, (tokens, n) in zip(logits, batch, strict=True):
            scored, wanted = row[len(tokens) - 1 - n : len(tokens) - 1], tokens[len(tokens) - n :]
            nats.append(float(F.cross_entropy(scored, wanted, reduction="sum")))
            n_right.append(int((scored.argmax(-1) == wanted).sum()))
        advance()
    return TextQuality(np.array([n for _, n in windows]), np.array(nats), np.array(n_right))
