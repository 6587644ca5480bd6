"""What is decoded: prompts, cut into batches of equal length."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer

from prefetch.errors import ConfigError


@dataclass(frozen=True)
class Batch:
    """Prompts decoded together. All have the same length, so that no padding token is ever routed."""

    name: str
    token_ids: Tensor  # [B, n] int64


def load_batches(
    model_folder: Path, *, prompts: Path | None, text: Path | None, n_prompts: int, batch_size: int, max_prompt_tokens: int
) -> list[Batch]:
    """The workload's batches.

    Args:
        model_folder: whose tokenizer encodes the prompts.
        prompts: a JSON-lines file with a "text" per line; used unless `text` is given.
        text: any text file; it is cut into `n_prompts` evenly spaced pieces of `max_prompt_tokens` tokens.
        n_prompts: prompts in all, a multiple of `batch_size`.
        batch_size: prompts decoded together; a batch is cut to its shortest prompt.
        max_prompt_tokens: longer prompts lose their beginning.

    Raises:
        ConfigError: a file is missing or has too few prompts, or `n_prompts` is not a multiple of `batch_size`.
    """
    if n_prompts % batch_size:
        raise ConfigError(f"workload.n_prompts={n_prompts} must be a multiple of workload.batch_size={batch_size}")
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    if text is not None:
        encoded = _pieces(tokenizer(_read(text)).input_ids, text, n_prompts, max_prompt_tokens)
    else:
        encoded = [tokenizer(prompt).input_ids[-max_prompt_tokens:] for prompt in _read_prompts(prompts, n_prompts)]
    return [_batch(encoded[i : i + batch_size], i // batch_size) for i in range(0, n_prompts, batch_size)]


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as text: {error}") from error


def _read_prompts(path: Path | None, n_prompts: int) -> list[str]:
    if path is None:
        raise ConfigError("workload.prompts is not set: name a JSON-lines file with a 'text' per line, or set workload.text")
    try:
        prompts = [json.loads(line)["text"] for line in _read(path).splitlines() if line.strip()]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: every line must be a JSON object with a 'text' ({error})") from error
    if len(prompts) < n_prompts:
        raise ConfigError(f"{path} has {len(prompts)} prompts, workload.n_prompts asks for {n_prompts}")
    return [prompts[i * len(prompts) // n_prompts] for i in range(n_prompts)]  # spread over the file, over its domains too


def _pieces(token_ids: list[int], path: Path, n_prompts: int, length: int) -> list[list[int]]:
    if len(token_ids) < n_prompts * length:
        raise ConfigError(
            f"{path} has {len(token_ids)} tokens; {n_prompts} prompts of {length} need {n_prompts * length}: lower workload.n_prompts "
            "or workload.max_prompt_tokens"
        )
    starts = [i * (len(token_ids) - length) // max(1, n_prompts - 1) for i in range(n_prompts)]
    return [token_ids[start : start + length] for start in starts]


def _batch(encoded: list[list[int]], index: int) -> Batch:
    shortest = min(len(ids) for ids in encoded)
    if shortest == 0:
        raise ConfigError(f"a prompt of batch {index} is empty")
    return Batch(f"batch {index}", torch.tensor([ids[-shortest:] for ids in encoded]))
