"""Route traces of Helldez/BigMoeOnEdge, an engine that streams experts from a phone's flash (`--route-trace`, version 1).

A CSV file with a row for each token, layer and rank, behind comment lines that give the model, its number of experts, and the bytes
of an expert in each layer. Columns are found by name, since the format appends new ones. Dense layers have no rows; the layers
that have are numbered from 0. A turn becomes a sequence; its prefill is one forward pass, then each token decodes in its own.

That engine's last layer routes only the final token of a prompt (only its logits are needed), so the prompt's other tokens have no
rows there. They get the final token's experts: the layer then needs the same experts in the same order as in the recorded run, and a
cache sees no difference, but counts over tokens do. Token ids were not recorded and are all 0.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import numpy as np
import pandas as pd

from prefetch.errors import TraceError
from prefetch.trace import RoutingTrace
from prefetch.trace_formats.base import TraceFormat

VERSION = "# route_trace v1"
MODEL_LINE = re.compile(r"# model=(?P<model>.*) arch=\S+ n_layer=\d+ n_expert=(?P<n_experts>\d+) n_expert_used=(?P<top_k>\d+)")
LAYER_LINE = re.compile(r"# layer=(\d+) expert_bytes=(\d+)")
INTEGERS = ("turn", "phase", "step", "layer", "slot", "expert", "residency", "expert_bytes")
DTYPES = dict.fromkeys(INTEGERS, np.int64) | {"weight": np.float64}  # the last two integers are read to notice a row cut off
PREFILL, DECODE = 0, 1
METADATA = {
    "licence": "Apache-2.0 for the traces published there",
    "token_ids": "not recorded: all 0",
    "prefill": "tokens of a prompt without rows in the last layer have the experts of its final token there",
}


@dataclass
class Preamble:
    """What the comment lines say."""

    model: str
    n_experts: int
    top_k: int
    expert_bytes: dict[int, int]  # of each MoE layer, by the engine's layer index, ascending


@dataclass
class Tokens:
    """The N tokens of a file, in order of (turn, position)."""

    turn: np.ndarray  # int64 [N]
    position: np.ndarray  # int64 [N], in the context
    phase: np.ndarray  # int64 [N], PREFILL or DECODE
    of_row: np.ndarray  # int64 [rows of the file], the token of each

    def __post_init__(self) -> None:
        _, self.starts, self.sequence = np.unique(self.turn, return_index=True, return_inverse=True)  # int64 [S], [N]
        self.n_prompt = np.bincount(self.sequence[self.phase == PREFILL], minlength=len(self.starts))  # int64 [S]

    @property
    def out_of_order(self) -> np.ndarray:
        """bool [N]: tokens that break the order of a turn, first its prompt (of one token at least), then what it decodes."""
        place = np.arange(len(self.turn)) - self.starts[self.sequence]
        return (self.phase == DECODE) != (place >= np.maximum(self.n_prompt, 1)[self.sequence])

    @property
    def step(self) -> np.ndarray:
        """int64 [N], forward pass of the sequence: 0 is the prefill."""
        decoded = np.cumsum(self.phase == DECODE)
        return decoded - decoded[self.starts][self.sequence]

    @property
    def final_of_prompt(self) -> np.ndarray:
        """int64 [N]: for each token, the last one of its turn's prompt."""
        return (self.starts + self.n_prompt - 1)[self.sequence]


class BigMoeOnEdge(TraceFormat):
    """It has no knobs: the file says how many experts there are."""

    def read(self, path: Path) -> RoutingTrace:
        """The routing in `path`, a CSV file. Raises TraceError."""
        preamble, rows = _preamble(path), _rows(path)
        problem = _row_problem(rows, preamble)
        if problem:
            raise TraceError(f"{path}: {problem}")
        tokens = _tokens(path, rows)
        layers = np.array(list(preamble.expert_bytes))
        place = (tokens.of_row, np.searchsorted(layers, rows["layer"]), rows["slot"].to_numpy())
        topk_ids = np.full((len(tokens.turn), len(layers), preamble.top_k), -1)
        topk_ids[place] = rows["expert"]
        weights = np.zeros(topk_ids.shape, np.float32)
        weights[place] = rows["weight"].fillna(1 / preamble.top_k)
        _complete(path, topk_ids, weights, tokens, layers)
        return RoutingTrace(
            sequence=tokens.sequence.astype(np.int32),
            step=tokens.step.astype(np.int32),
            phase=tokens.phase.astype(np.uint8),
            token_ids=np.zeros(len(tokens.turn), np.int32),
            topk_ids=topk_ids.astype(np.uint16),
            topk_weights=weights,
            n_experts=preamble.n_experts,
            metadata=METADATA | _provenance(path, preamble) | _weights_note(rows),
        )


def _preamble(path: Path) -> Preamble:
    try:
        with path.open(encoding="utf-8") as file:
            comments = list(takewhile(lambda line: line.startswith("#"), file))
    except (OSError, ValueError) as error:
        raise TraceError(f"{path}: not readable as CSV ({error})") from error
    if not comments or comments[0].strip() != VERSION:
        raise TraceError(f"{path}: not a route trace of BigMoeOnEdge: its first line must be {VERSION!r}")
    found = next(filter(None, map(MODEL_LINE.match, comments)), None)
    if found is None:
        raise TraceError(f"{path}: it lacks the comment line '# model=... n_expert=... n_expert_used=...'")
    expert_bytes = {int(line[1]): int(line[2]) for line in map(LAYER_LINE.match, comments) if line}
    moe_layers = {layer: size for layer, size in sorted(expert_bytes.items()) if size}  # dense layers have experts of 0 bytes
    return Preamble(Path(found["model"]).stem, int(found["n_experts"]), int(found["top_k"]), moe_layers)


def _rows(path: Path) -> pd.DataFrame:
    try:
        return pd.read_csv(path, comment="#", usecols=list(DTYPES), dtype=DTYPES, index_col=False)
    except (OSError, ValueError) as error:
        raise TraceError(
            f"{path}: its rows are damaged or cut off ({str(error).splitlines()[0]}); expected the columns {', '.join(DTYPES)}"
        ) from error


def _row_problem(rows: pd.DataFrame, preamble: Preamble) -> str | None:
    """What makes the rows unusable, missing ones and their order apart, in words; None if nothing does."""
    if rows.empty:
        return "it holds no rows"
    for column, end in (
        ("turn", 2**31),
        ("step", 2**31),
        ("phase", 2),
        ("slot", preamble.top_k),
        ("expert", preamble.n_experts),
    ):
        wrong = rows[(rows[column] < 0) | (rows[column] >= end)]
        if len(wrong):
            return f"{column} {wrong[column].iloc[0]} {_where(wrong)} is out of range: expected 0 to {end - 1}"
    if np.isinf(rows["weight"]).any():
        return f"the weight {_where(rows[np.isinf(rows['weight'])])} is not finite"
    twice = rows[rows.duplicated(["turn", "step", "layer", "slot"])]
    if len(twice):
        return f"there are two rows {_where(twice)}"
    unknown = sorted(set(rows["layer"]) - preamble.expert_bytes.keys())
    if unknown:
        return (
            f"it has rows of layer {unknown[0]}, but lacks the comment line '# layer={unknown[0]} expert_bytes=...' (above 0)"
        )
    return None


def _where(rows: pd.DataFrame) -> str:
    return "in " + ", ".join(f"{name} {rows[name].iloc[0]}" for name in ("turn", "step", "layer", "slot"))


def _tokens(path: Path, rows: pd.DataFrame) -> Tokens:
    """The tokens that `rows` are about. Raises TraceError where a turn does not begin with its prefill."""
    turn_and_step = rows["turn"].to_numpy() << 32 | rows["step"].to_numpy()
    keys, first, of_row = np.unique(turn_and_step, return_index=True, return_inverse=True)
    tokens = Tokens(keys >> 32, keys & 0xFFFFFFFF, rows["phase"].to_numpy()[first], of_row)
    mixed = rows[tokens.phase[of_row] != rows["phase"]]
    if len(mixed):
        raise TraceError(f"{path}: the token {_where(mixed)} is in the prefill as well as decoded")
    if tokens.out_of_order.any():
        turn, position = (int(values[tokens.out_of_order.argmax()]) for values in (tokens.turn, tokens.position))
        raise TraceError(f"{path}: turn {turn} must begin with its prefill (phase 0) and then decode; see step {position}")
    return tokens


def _complete(path: Path, topk_ids: np.ndarray, weights: np.ndarray, tokens: Tokens, layers: np.ndarray) -> None:
    """Fill the last layer for a prompt's tokens in `topk_ids` and `weights` [N, L, k], in place, from its final token.

    Raises:
        TraceError: other rows are missing.
    """
    absent = (tokens.phase == PREFILL) & (topk_ids[:, -1] < 0).all(axis=1)
    source = tokens.final_of_prompt[absent]
    topk_ids[absent, -1], weights[absent, -1] = topk_ids[source, -1], weights[source, -1]
    if (topk_ids < 0).any():
        token, layer, slot = np.argwhere(topk_ids < 0)[0]
        raise TraceError(
            f"{path}: the row of turn {tokens.turn[token]}, step {tokens.position[token]}, layer {layers[layer]}, slot {slot} is "
            "missing; is the file truncated?"
        )


def _provenance(path: Path, preamble: Preamble) -> dict[str, str]:
    expert_bytes = list(preamble.expert_bytes.values())
    return {
        "source": f"https://github.com/Helldez/BigMoeOnEdge, {path.name}",
        "model": preamble.model,
        "row_bytes": str(round(float(np.mean(expert_bytes)))),
        "row_bytes_note": f"the mean over layers, whose experts have from {min(expert_bytes)} to {max(expert_bytes)} bytes",
        "row_bytes_per_layer": json.dumps(expert_bytes),
    }


def _weights_note(rows: pd.DataFrame) -> dict[str, str]:
    """The engine writes nan where the model's graph shows no weights; a trace has none that are not finite."""
    n_unknown = int(rows["weight"].isna().sum())
    return {"topk_weights": f"{n_unknown} of {len(rows)} were not recorded: they are 1 / top-k"} if n_unknown else {}
