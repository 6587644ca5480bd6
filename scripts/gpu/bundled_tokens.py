"""End to end on the bundled model: the tokens of unmodified transformers, by the host-driven and the device-driven runtime."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.generation import divergences, generate
from experiments.workload import load_batches
from kernels.device_cache import DeviceCache, slru_protected
from kernels.routing import Routing
from kernels.slot_table import ExpertTable, addresses_of
from predictors.base import LinearHead, Predictor
from predictors.gate_reuse import GateReuse
from predictors.none import NoPredictor
from prefetch.device_runtime import DeviceRuntime
from prefetch.fused_router import FusedRouter
from prefetch.geometry import ExpertGeometry, ExpertKey, MoEGeometry
from prefetch.model import attach, load_offloaded, load_whole
from prefetch.store import ExpertStore
from scripts.gpu.forked import Row

REPOSITORY = Path(__file__).parents[2]
BUNDLED = REPOSITORY / "models" / "bytes-moe"
HOST_DRIVEN = (  # the demo's arms, one whose predictor is a kernel, and the two other ways to serve a miss
    "experiment=demo", "backend=cuda", "tier=pinned", "repeats=1", "workload.n_prompts=2", "workload.new_tokens=24",
    "tracking=disabled", "+arms.corrected_gate=['predictor=corrected_gate']",
    "+arms.read_in_place=['planner=cpu_moe','backend.in_place=gpu']", "+arms.on_cpu=['planner=cpu_moe']",
)  # fmt: skip
SHARE_OF_SLOTS, STAGING, NEW_TOKENS = 0.25, 8, 96
PROMPT_TOKENS = 256
HOST_DRIVEN_S, LAST_WORDS = 60, 3000


@dataclass(frozen=True)
class Agreement:
    """One run of the device-driven runtime beside unmodified transformers on the same device."""

    predictor: str
    n_tokens: int
    n_equal: int
    explained_by_rounding: bool  # where they part, the two best tokens were as close as rounding allows
    counts: dict[str, int]


def device_driven_tokens(end_s: float) -> Iterator[Row]:
    """The device-driven runtime without prefetches, with them, and with guesses from the routers' own launches, a row each."""
    prompts = [batch.token_ids for batch in load_batches(
        BUNDLED, prompts=BUNDLED / "prompts.jsonl", text=None, n_prompts=2, batch_size=1, max_prompt_tokens=PROMPT_TOKENS
    )]  # fmt: skip
    for predictor, fuse_routers in ((NoPredictor(), False), (GateReuse(), False), (GateReuse(), True)):
        packs, device = REPOSITORY / ".cache" / "packs", torch.device("cuda", 0)
        yield asdict(device_driven(BUNDLED, packs, device, prompts, NEW_TOKENS, predictor, fuse_routers=fuse_routers))


def host_driven_tokens(end_s: float) -> Iterator[Row]:
    """The host-driven runtime as a user runs it; it refuses itself to write results of wrong tokens.

    Raises:
        RuntimeError: it cannot run here, or failed; its last words say why.
    """
    missing = [package for package in ("hydra", "pydantic") if find_spec(package) is None]
    if missing:
        raise RuntimeError(f"needs {' and '.join(missing)}, not installed here")
    yield {"results": host_driven(HOST_DRIVEN, min(HOST_DRIVEN_S, end_s - time.monotonic()))}


def host_driven(overrides: tuple[str, ...], limit_s: float) -> dict[str, Any]:
    """`results.json` of `experiments.decode` with these overrides."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "experiments.decode", *overrides, f"hydra.run.dir={folder}/run"]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=limit_s)
        if done.returncode:
            raise RuntimeError(f"experiments.decode: {' '.join(done.stderr[-LAST_WORDS:].split())}")
        results: dict[str, Any] = json.loads((Path(folder) / "run" / "results.json").read_text())
        return results


def device_driven(
    folder: Path,
    pack_dir: Path,
    device: torch.device,
    prompts: list[Tensor],
    new_tokens: int,
    predictor: Predictor,
    *,
    fuse_routers: bool = False,
) -> Agreement:
    """Decode `prompts` ([1, n] each) in fp32 with a quarter of the experts in slots."""
    store = ExpertStore.open(folder, torch.float32, pack_dir, progress=False)
    size = store.geometry
    rows = torch.stack([store.read_row(ExpertKey(n, e)) for n in range(size.n_layers) for e in range(size.n_experts)])
    rows = rows.pin_memory() if device.type == "cuda" else rows
    addresses = addresses_of(rows).view(size.n_layers, size.n_experts).to(device)
    runtime = _runtime(size, ExpertTable(size.expert, (rows,), addresses), predictor)
    whole, offloaded = load_whole(folder, torch.float32, device), load_offloaded(folder, torch.float32, device)
    reference = [generate(whole, prompt, new_tokens) for prompt in prompts]
    with attach(offloaded, runtime, fuse_routers=fuse_routers):
        found = [generate(offloaded, prompt, new_tokens) for prompt in prompts]
    parted = divergences(reference, found, torch.finfo(torch.float32).eps)
    equal = sum(int((ours.tokens == theirs.tokens).sum()) for ours, theirs in zip(found, reference, strict=True))
    explained = all(place.margin <= place.rounding for place in parted)
    name = (predictor.name or "none") + (" in the router's launch" if fuse_routers else "")
    return Agreement(name, len(prompts) * new_tokens, equal, explained, runtime.counts())


def rehearse_device_driven() -> None:
    """Launch what `device_driven_tokens` launches, on tensors without memory."""
    size, device = MoEGeometry(8, 32, 4, ExpertGeometry(192, 96, torch.float32)), torch.device("meta")
    rows = torch.empty(size.n_total, size.expert.row_bytes, dtype=torch.uint8, device=device)
    addresses = torch.empty(size.n_layers, size.n_experts, dtype=torch.int64, device=device)
    runtime = _runtime(size, ExpertTable(size.expert, (rows,), addresses), NoPredictor())
    router = torch.empty(size.n_experts, size.expert.hidden, device=device)
    routing = Routing(size.top_k, renormalise=True)
    fused = [FusedRouter(router, None, heads, routing, lambda said: None) for heads in ([LinearHead(1, router)], [])]
    for n_tokens in (PROMPT_TOKENS, 1):
        hidden = torch.empty(n_tokens, size.expert.hidden, device=device)
        weights, ids = torch.empty(2, n_tokens, size.top_k, device=device)
        for route in fused:
            route(hidden)
        for layer in range(size.n_layers):
            runtime.layer_call(layer, hidden, ids.long(), weights)
            if n_tokens == 1:
                runtime.planned_call(layer, hidden, ids.long(), weights, ids.long())


def _runtime(size: MoEGeometry, backing: ExpertTable, predictor: Predictor) -> DeviceRuntime:
    capacity, device = int(SHARE_OF_SLOTS * size.n_total), backing.entries.device
    cache = DeviceCache.empty(
        size.n_layers, size.n_experts, capacity=capacity, staging=STAGING, transient=size.top_k,
        protected_capacity=slru_protected(capacity), device=device,
    )  # fmt: skip
    slots = torch.empty(cache.n_slots, size.expert.row_bytes, dtype=torch.uint8, device=device)
    return DeviceRuntime(size, slots, backing, cache, predictor)
