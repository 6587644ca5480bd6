"""How well a model predicts text: loss, bits per byte and next-byte accuracy, teacher-forced, every byte scored once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from scripts.bundled_corpus import Corpus
from scripts.bundled_evaluation import windows_of

BATCH = 16  # windows


@dataclass(frozen=True)
class TextQuality:
    """Figures of one model on one text."""

    bytes_scored: int
    loss_nats: float  # mean per byte
    next_byte_accuracy: float  # share of bytes that were the likeliest

    @property
    def bits_per_byte(self) -> float:
        """The loss in bits."""
        return self.loss_nats / math.log(2)


Window = tuple[Tensor, int]  # token ids [n + 1], how many of the last n to score


def spread_windows(corpus: Corpus, max_bytes: int) -> list[Window]:
    """Windows of `corpus` as `scripts.bundled_evaluation` cuts them, evenly thinned out to about `max_bytes` scored bytes."""
    windows = [window for data in corpus.files.values() for window in windows_of(data)]
    every = max(1, math.ceil(sum(n for _, n in windows) / max_bytes))
    return sorted(windows[::every], key=lambda window: len(window[0]))  # equal lengths share a batch


@torch.inference_mode()
def text_quality(model: PreTrainedModel, windows: list[Window], advance: Callable[[], None] = lambda: None) -> TextQuality:
    """Score `windows`; `advance` is called after each batch of `BATCH`."""
    nats, n_right, n_scored = 0.0, 0, 0
    for first in range(0, len(windows), BATCH):
        batch = windows[first : first + BATCH]
        longest = max(len(tokens) for tokens, _ in batch)
        padded = torch.stack([F.pad(tokens, (0, longest - len(tokens))) for tokens, _ in batch])  # behind: causal, so unseen
        logits = model(input_ids=padded[:, :-1], use_cache=False).logits.float()
        for row, (tokens, n) in zip(logits, batch, strict=True):
            scored, wanted = row[len(tokens) - 1 - n : len(tokens) - 1], tokens[len(tokens) - n :]
            nats += float(F.cross_entropy(scored, wanted, reduction="sum"))
            n_right += int((scored.argmax(-1) == wanted).sum())
            n_scored += n
        advance()
    return TextQuality(n_scored, nats / n_scored, n_right / n_scored)
