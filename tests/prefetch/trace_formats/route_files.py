"""Small files in the layout of BigMoeOnEdge's route traces: its order of rows, and no rows where that engine has none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

N_EXPERTS, TOP_K = 16, 3
LAYERS = (2, 3, 4)  # of the engine; those before are dense
EXPERT_BYTES = (1000, 1000, 1600)
COLUMNS = "turn,phase,step,layer,slot,expert,weight,residency,expert_bytes"


class Turn(NamedTuple):
    """A turn of a chat: a prompt of so many tokens, then so many decoded."""

    prompt: int
    decoded: int


def routing(turns: Sequence[Turn], seed: int = 0) -> np.ndarray:
    """int64 [N, L, k]: random experts; a prompt's tokens have its final token's in the last layer."""
    random = np.random.default_rng(seed)
    n_tokens = sum(turn.prompt + turn.decoded for turn in turns)
    ids = random.random((n_tokens, len(LAYERS), N_EXPERTS)).argsort(axis=-1)[..., :TOP_K]
    first = 0
    for turn in turns:
        ids[first : first + turn.prompt, -1] = ids[first + turn.prompt - 1, -1]
        first += turn.prompt + turn.decoded
    return ids


def weight(token: int, layer: int, slot: int) -> str:
    """A weight that tells its place."""
    return f"{(token + 1) / 1000 + layer / 100 + (TOP_K - slot) / 10:.6g}"


def preamble() -> str:
    """The comment lines and the columns' names."""
    lines = [
        "# route_trace v1",
        f"# model=/data/my models/tiny moe-Q4.gguf arch=tiny n_layer=5 n_expert={N_EXPERTS} n_expert_used={TOP_K}",
    ]
    expert_bytes = dict(zip(LAYERS, EXPERT_BYTES, strict=True))
    lines += [f"# layer={layer} expert_bytes={expert_bytes.get(layer, 0)} dense_bytes=7" for layer in range(5)]
    return "\n".join([*lines, COLUMNS, ""])


def rows(turns: Sequence[Turn], ids: np.ndarray) -> Iterator[str]:
    """The prompt layer by layer, then decoded tokens one by one; positions go on from turn to turn."""
    first = 0
    for number, turn in enumerate(turns):
        decoding = first + turn.prompt
        for layer in range(len(LAYERS)):
            last = layer == len(LAYERS) - 1
            for token in range(decoding - 1 if last else first, decoding):
                yield from _cell(number, 0, token, layer, ids[token, layer])
        for token in range(decoding, decoding + turn.decoded):
            for layer in range(len(LAYERS)):
                yield from _cell(number, 1, token, layer, ids[token, layer])
        first = decoding + turn.decoded


def _cell(turn: int, phase: int, token: int, layer: int, experts: np.ndarray) -> Iterator[str]:
    for slot, expert in enumerate(experts.tolist()):
        yield f"{turn},{phase},{token},{LAYERS[layer]},{slot},{expert},{weight(token, layer, slot)},0,{EXPERT_BYTES[layer]}\n"
