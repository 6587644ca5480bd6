"""What a layer call of the host-driven runtime costs the host, measured without a GPU.

    python -m scripts.bench_host_driven

Thread time at Qwen3-30B-A3B's sizes, one token. Everything runs but what the driver would do: kernels are not launched, and copies have
arrived when they are asked for. Triton's share of a launch is left out too.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from kernels.launch import Launch
from predictors.base import LayerView, Prediction, Predictor
from predictors.none import NoPredictor
from prefetch.cache.slru import Slru
from prefetch.compute.kernel_experts import KernelExperts
from prefetch.fast_tier import FastTier
from prefetch.geometry import ExpertGeometry, ExpertKey, MoEGeometry
from prefetch.planner.top_m import TopM
from prefetch.runtime import OffloadRuntime
from prefetch.slots import SlotPool
from prefetch.transfers.base import Transfer, Transfers, TransferState
from prefetch.transfers.native import NativeJob
from prefetch.transfers.threads import Job

QWEN3_30B = MoEGeometry(8, 128, 8, ExpertGeometry(2048, 768, torch.bfloat16))  # 8 of its 48 layers
N_SLOTS, STAGING, TRANSIENT = 424, 16, 8
N_TOKENS, N_WARMUP = 80, 20
N_MISSES = (0, 1, 2, 4)


class Arrived(Transfers):
    """Moves nothing, at once."""

    queued_bytes = 0

    def submit(self, key: ExpertKey, slot: int, *, demand: bool) -> Transfer:
        done = list(TransferState).index(TransferState.DONE)
        return Job(key, slot, NativeJob(demand=demand, state=done), self)  # type: ignore[arg-type]

    def promote(self, transfer: Transfer) -> None: ...

    def cancel(self, transfer: Transfer) -> None: ...

    def wait_any(self, transfers: list[Transfer]) -> list[Transfer]:  # type: ignore[override]
        return list(transfers)

    def close(self) -> None: ...


class SameScores(Predictor):
    """Scores that cost nothing: what remains is what the runtime does with them."""

    name, on_device = "same scores", True

    def __init__(self, n_experts: int):
        self.scores = torch.rand(1, n_experts, generator=torch.Generator().manual_seed(0))

    def predict(self, seen: LayerView) -> list[Prediction]:
        target = seen.layer + 1
        return [Prediction(target, self.scores)] if target < QWEN3_30B.n_layers else []


class NotLaunched:
    """A compiled kernel that does nothing."""

    def __getitem__(self, grid: tuple[int, ...]) -> NotLaunched:
        return self

    def __call__(self, *values: object) -> None: ...


@contextmanager
def without_launches() -> Iterator[None]:
    """Whatever is launched inside is prepared in full, and dropped."""
    with patch.object(Launch, "run", lambda launch: NotLaunched()), patch("kernels.moe_parts.check_launchable"):
        yield


def routed(token: int, n_misses: int) -> Tensor:
    """Ids [1, k]: a layer's usual experts, some of them replaced by those of which the last use is longest ago."""
    n_usual, n_others = QWEN3_30B.top_k, QWEN3_30B.n_experts - QWEN3_30B.top_k
    others = [n_usual + (token * n_misses + rank) % n_others for rank in range(n_misses)]
    return torch.tensor([[*others, *range(n_misses, n_usual)]])


@torch.inference_mode()
def call_times(
    n_misses: int, predictor: Predictor, n_tokens: int = N_TOKENS, size: MoEGeometry = QWEN3_30B
) -> tuple[float, float]:
    """Median thread time of a layer call, in seconds, and misses a call, after the warm-up."""
    pool = SlotPool(size, N_SLOTS)
    tier = FastTier(pool, Slru(N_SLOTS - STAGING - TRANSIENT), Arrived(), staging=STAGING, transient=TRANSIENT)
    runtime = OffloadRuntime(size, tier, predictor, TopM(), _no_reading, KernelExperts(size, pool))
    hidden = torch.randn(1, size.expert.hidden).to(size.expert.dtype)
    weights = torch.full((1, size.top_k), 1 / size.top_k, dtype=size.expert.dtype)
    times: list[float] = []
    for token in range(N_WARMUP + n_tokens):
        runtime.begin_forward(torch.zeros(1, dtype=torch.int64), new_sequence=token == 0)
        for layer in range(size.n_layers):
            ids = routed(token, n_misses)
            began = time.thread_time()
            runtime.layer_call(layer, hidden, ids, weights)
            times.append(time.thread_time() - began)
        runtime.end_forward()
    calls = runtime.record().calls
    measured = calls["step"] >= N_WARMUP
    return float(np.median(np.array(times)[measured])), float(calls["misses"][measured].mean())


def _no_reading(key: ExpertKey) -> tuple[Tensor, Tensor]:
    raise AssertionError("no planner here leaves experts in place")


def main() -> None:
    torch.set_num_threads(1)
    table = Table("predictor", "misses", "us a layer call", title="Host-driven layer call, thread time of the host")
    with without_launches():
        for predictor in (NoPredictor(), SameScores(QWEN3_30B.n_experts)):
            for n_misses in N_MISSES:
                seconds, missed = call_times(n_misses, predictor)
                table.add_row(predictor.name or "none", f"{missed:.2f}", f"{seconds * 1e6:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
