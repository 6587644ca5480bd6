"""The routing of a run as one file: trace once, replay many.

One safetensors file of the plain arrays listed in `RoutingTrace`, readable without this project. Row n is one token of
one forward pass; rows are in order of (sequence, step, position).
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from prefetch.errors import TraceError
from prefetch.geometry import ExpertKey

FORMAT = "gatecast routing trace, version 1"
TOKEN_DTYPES = {"sequence": np.int32, "step": np.int32, "phase": np.uint8, "token_ids": np.int32}
ROUTING_DTYPES = {"topk_ids": np.uint16, "topk_weights": np.float32}
ROW_ARRAYS = (*TOKEN_DTYPES, *ROUTING_DTYPES)  # a row a token each


class ForwardRows(NamedTuple):
    """One forward pass and the rows of its tokens."""

    sequence: int
    step: int
    rows: slice


@dataclass
class RoutingTrace:
    """N tokens through L MoE layers of E experts, top-k. Raises TraceError where the arrays do not fit together.

    A guess is stored with the token it is *for*, under its lookahead d: from layer L - 1 to layer 0 of the next forward
    pass d is 1, and the guess stands in the next pass's row.
    """

    sequence: np.ndarray  # int32 [N], which sequence of the run
    step: np.ndarray  # int32 [N], forward pass of the sequence: 0 is the prefill
    phase: np.ndarray  # uint8 [N], 0 prefill, 1 decode
    token_ids: np.ndarray  # int32 [N]
    topk_ids: np.ndarray  # uint16 [N, L, k], what the routers selected, in rank order
    topk_weights: np.ndarray  # float32 [N, L, k]
    n_experts: int  # E
    guesses: dict[int, np.ndarray] = field(default_factory=dict)  # d -> int16 [N, L, m], likeliest first, -1 = no guess
    resident: dict[int, np.ndarray] = field(default_factory=dict)  # d -> bool [N, L, E], on board at the guess
    metadata: dict[str, str] = field(default_factory=dict)  # model, predictor, workload, versions

    def __post_init__(self) -> None:
        problem = _problem_of(self)
        if problem:
            raise TraceError(f"not a routing trace: {problem}")

    @property
    def n_tokens(self) -> int:
        return int(self.topk_ids.shape[0])

    @property
    def n_layers(self) -> int:
        return int(self.topk_ids.shape[1])

    @property
    def top_k(self) -> int:
        return int(self.topk_ids.shape[2])

    @property
    def row_bytes(self) -> int | None:
        """Bytes of one expert as it was stored and moved, where the trace says so (metadata "row_bytes")."""
        said = self.metadata.get("row_bytes")
        return None if said is None else int(said)

    def save(self, path: Path) -> None:
        """Write the trace to `path`; a crash leaves either the old file or the new one."""
        arrays = {name: getattr(self, name) for name in ROW_ARRAYS}
        arrays |= {f"guesses.{d}": guesses for d, guesses in self.guesses.items()}
        arrays |= {f"resident.{d}": resident for d, resident in self.resident.items()}
        header = {"format": FORMAT, "n_experts": str(self.n_experts), "metadata": json.dumps(self.metadata)}
        aside = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            with aside.open("wb") as file:
                file.write(save({name: np.ascontiguousarray(array) for name, array in arrays.items()}, header))
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path) -> RoutingTrace:
        """Read a trace.

        Raises:
            TraceError: the file is missing, truncated, of another format or version, or its arrays do not fit together.
        """
        header, arrays = _read(path)
        if header.get("format") != FORMAT:
            raise TraceError(f"{path}: its format is {header.get('format')!r}; this version reads {FORMAT!r}")
        try:
            return cls(
                **{name: arrays.pop(name) for name in ROW_ARRAYS},
                n_experts=int(header["n_experts"]),
                guesses=_by_lookahead(arrays, "guesses."),
                resident=_by_lookahead(arrays, "resident."),
                metadata=json.loads(header["metadata"]),
            )
        except KeyError as error:
            raise TraceError(f"{path}: the routing trace lacks {error}; record it again") from error
        except (TraceError, ValueError) as error:
            raise TraceError(f"{path}: {error}; record it again") from error

    def forwards(self) -> list[ForwardRows]:
        """The forward passes, in order."""
        if not self.n_tokens:
            return []
        changes = (np.diff(self.sequence) != 0) | (np.diff(self.step) != 0)
        bounds = [0, *(np.flatnonzero(changes) + 1).tolist(), self.n_tokens]
        return [
            ForwardRows(int(self.sequence[first]), int(self.step[first]), slice(first, end)) for first, end in pairwise(bounds)
        ]

    def routing_events(self) -> list[list[ExpertKey]]:
        """What caches see: per forward pass and layer the experts needed, by first appearance (tokens, then ranks)."""
        keys = [[ExpertKey(layer, e) for e in range(self.n_experts)] for layer in range(self.n_layers)]
        events = []
        for forward in self.forwards():
            for layer in range(self.n_layers):
                experts = dict.fromkeys(self.topk_ids[forward.rows, layer].reshape(-1).tolist())
                events.append([keys[layer][e] for e in experts])
        return events


def _read(path: Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    if not path.is_file():
        raise TraceError(f"{path}: no such routing trace")
    try:
        with safe_open(path, framework="numpy") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no mapping
    except SafetensorError as error:
        raise TraceError(f"{path}: the routing trace is truncated or damaged ({error}); record it again") from error


def _by_lookahead(arrays: dict[str, np.ndarray], prefix: str) -> dict[int, np.ndarray]:
    return {int(name.removeprefix(prefix)): array for name, array in arrays.items() if name.startswith(prefix)}


def _problem_of(trace: RoutingTrace) -> str | None:
    """What makes the trace unusable, in words; None if nothing does."""
    if trace.topk_ids.ndim != 3:
        return f"topk_ids has shape {trace.topk_ids.shape}, expected [tokens, layers, k]"
    return _shape_problem(trace) or _value_problem(trace)


def _shape_problem(trace: RoutingTrace) -> str | None:
    tokens, routed = trace.topk_ids.shape[:1], trace.topk_ids.shape
    expected: list[tuple[str, np.ndarray, Any, tuple[int, ...]]]
    expected = [(name, getattr(trace, name), dtype, tokens) for name, dtype in TOKEN_DTYPES.items()]
    expected += [(name, getattr(trace, name), dtype, routed) for name, dtype in ROUTING_DTYPES.items()]
    for d, guesses in trace.guesses.items():
        expected.append((f"guesses.{d}", guesses, np.int16, (*routed[:2], *guesses.shape[-1:])))
    for d, resident in trace.resident.items():
        expected.append((f"resident.{d}", resident, np.bool_, (*routed[:2], trace.n_experts)))
    for name, array, dtype, shape in expected:
        if array.shape != shape or array.dtype != dtype:
            return f"{name} is {array.dtype} {array.shape}, expected {np.dtype(dtype)} {shape}"
    if trace.guesses.keys() != trace.resident.keys():
        return f"it holds guesses for lookaheads {sorted(trace.guesses)} but residency for {sorted(trace.resident)}"
    return None


def _value_problem(trace: RoutingTrace) -> str | None:
    if (trace.topk_ids >= trace.n_experts).any():
        return f"topk_ids names expert {trace.topk_ids.max()}, but there are {trace.n_experts}"
    if not np.isfinite(trace.topk_weights).all():
        return "topk_weights are not finite"
    if ((trace.phase > 0) != (trace.step > 0)).any():
        return "step 0 must be phase 0 (prefill), later steps phase 1 (decode)"
    order = trace.sequence.astype(np.int64) << 32 | trace.step
    if (np.diff(order) < 0).any():
        return "its rows are not in order of (sequence, step)"
    for d, guesses in trace.guesses.items():
        if ((guesses < -1) | (guesses >= trace.n_experts)).any():
            return f"guesses.{d} names experts from {guesses.min()} to {guesses.max()}, but there are {trace.n_experts}"
    return None
