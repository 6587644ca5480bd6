"""What is recorded: documents of several splits, cut from the bundled corpus or taken from the workload."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor

from experiments.decode import workload_batches
from prefetch.errors import ConfigError
from scripts.bundled_corpus import SEPARATOR, Corpus, split_library

SPLITS = ("training", "held_out", "shifted")


@dataclass(frozen=True)
class Document:
    """A prompt, and how many tokens the model adds to it; 0 = the text alone, teacher-forced in one forward pass."""

    name: str
    split: str
    source: str  # documents of one source belong together when splits are made
    token_ids: Tensor  # [B, n] int64
    new_tokens: int


def documents_of(cfg: DictConfig, model_folder: Path) -> list[Document]:
    """The documents that `cfg.documents` describes.

    Raises:
        ConfigError: an unknown source of documents, impossible numbers, or too little text.
    """
    wanted = cfg.documents
    if wanted.source == "workload":
        batches = workload_batches(cfg, model_folder)
        return [Document(b.name, "workload", b.name, b.token_ids, cfg.workload.new_tokens) for b in batches]
    if wanted.source != "bundled":
        raise ConfigError(f"documents.source={wanted.source}: choose one of workload, bundled")
    for option, least in (("prompt_tokens", 1), ("new_tokens", 0), *((split, 0) for split in SPLITS)):
        if wanted[option] < least:
            raise ConfigError(f"documents.{option}={wanted[option]}: it must be at least {least}")
    found = []
    for split, corpus in zip(SPLITS, split_library(), strict=True):
        new_tokens = 0 if split == "training" else wanted.new_tokens
        found += cut(corpus, split, wanted[split], wanted.prompt_tokens, new_tokens)
    if not found:
        raise ConfigError("documents: all three numbers of documents are 0")
    return found


def cut(corpus: Corpus, split: str, n: int, prompt_tokens: int, new_tokens: int) -> list[Document]:
    """`n` pieces of `prompt_tokens` tokens, evenly spread over all pieces of all files; no two overlap.

    Raises:
        ConfigError: the files do not hold that many.
    """
    places = [
        (source, start)
        for source, data in corpus.files.items()
        for start in range(0, len(data) + 1 - prompt_tokens, prompt_tokens)
    ]
    if len(places) < n:
        raise ConfigError(
            f"documents.{split}={n}: its files hold {len(places)} pieces of {prompt_tokens} tokens; lower one of the two numbers"
        )
    chosen = [places[i * len(places) // n] for i in range(n)]
    return [
        Document(f"{split}/{source}@{start}", split, source, _tokens(corpus.files[source], start, prompt_tokens), new_tokens)
        for source, start in chosen
    ]


def _tokens(data: bytes, start: int, n: int) -> Tensor:
    """[1, n]: the piece as the model was trained on it, a separator before a file's first byte."""
    piece = [SEPARATOR, *data[: n - 1]] if start == 0 else list(data[start : start + n])
    return torch.tensor([piece])
