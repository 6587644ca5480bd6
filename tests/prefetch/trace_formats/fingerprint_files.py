"""Small files in the layout of packed gpt-oss fingerprints."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

TEXTS = (["<|channel|>", "a", "\u2028", "a"], ["x", "x", "x"], ["a", "b", "\ufffd", "\ufffd", "c"])
LOOPS = (False, True, False)


def make_arrays(lengths: Sequence[int], seed: int = 0) -> dict[str, np.ndarray]:
    """Random routing of sequences of `lengths` tokens."""
    random = np.random.default_rng(seed)
    ids = random.random((sum(lengths), 24, 32)).argsort(axis=-1)[..., :4].astype(np.uint8)
    probs = np.sort(random.dirichlet(np.ones(4), ids.shape[:2]), axis=-1)[..., ::-1].astype(np.float16)
    return {"ids": ids, "probs": probs, "offsets": np.cumsum([0, *lengths]).astype(np.int64)}


def write(
    folder: Path, texts: Sequence[list[str]] = TEXTS, loops: Sequence[bool] = LOOPS, **changed: Any
) -> tuple[Path, dict[str, np.ndarray]]:
    """Write small.npz and small.meta.jsonl into `folder`; `changed` replaces arrays, or drops those that are None."""
    arrays = make_arrays([len(text) for text in texts]) | changed
    arrays = {name: array for name, array in arrays.items() if array is not None}
    np.savez_compressed(folder / "small.npz", **arrays)
    lines = [
        json.dumps({"tokens": text, "repetition": loop}, ensure_ascii=False) for text, loop in zip(texts, loops, strict=True)
    ]
    (folder / "small.meta.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return folder / "small.npz", arrays
