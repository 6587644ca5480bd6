"""A tiny offloaded model, put together the way experiments do it but from plain objects."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from kernels.quantised import QuantFormat
from predictors.base import Predictor
from predictors.none import NoPredictor
from prefetch.cache.base import CachePolicy
from prefetch.cache.slru import Slru
from prefetch.compute.base import ExpertCompute
from prefetch.compute.kernel_experts import KernelExperts
from prefetch.compute.torch_experts import TorchExperts
from prefetch.fast_tier import FastTier
from prefetch.model import attach, load_offloaded
from prefetch.planner.base import Planner
from prefetch.planner.top_m import TopM
from prefetch.runtime import OffloadRuntime
from prefetch.slots import SlotPool
from prefetch.store import ExpertStore
from prefetch.transfers.cuda_driver import CudaDriver
from prefetch.transfers.pinned import PinnedSource, SlotFences
from prefetch.transfers.sources import DiskSource, Source
from prefetch.transfers.threads import ThreadTransfers
from tests.prefetch.transfers.stand_in_driver import COMPUTE_STREAM

PROMPTS = [torch.randint(0, 64, (1, 12), generator=torch.Generator().manual_seed(seed)) for seed in range(3)]


@dataclass
class Setting:
    """Knobs of one tiny run."""

    policy: CachePolicy | None = None  # default: SLRU over what staging leaves
    n_slots: int = 10
    staging: int = 2
    transient: int = 2
    predictor: Predictor | None = None
    planner: Planner | None = None
    policy_admits: bool = False
    source: type[Source] = DiskSource
    chunk_bytes: int = 4096  # several chunks per expert
    # Compute by kernels out of slots that copies from pinned memory fill; default: the CPU's path.
    driver: CudaDriver | None = None
    how: QuantFormat | None = None  # quantise the experts
    fuse_routers: bool = False
    zero_copy: bool = False  # kernels, not the CPU, compute what the planner leaves in place


@contextmanager
def offloaded(folder: Path, pack_dir: Path, setting: Setting) -> Iterator[tuple[PreTrainedModel, OffloadRuntime]]:
    """The model of `folder`, fp32, with its experts behind a runtime; everything is closed afterwards."""
    store = ExpertStore.open(folder, torch.float32, pack_dir, setting.how, progress=False)
    with backend(store, setting) as (pool, transfers, compute):
        staging = 0 if setting.policy_admits else setting.staging
        policy = Slru(setting.n_slots - staging - setting.transient) if setting.policy is None else setting.policy
        tier = FastTier(
            pool, policy, transfers, staging=staging, transient=setting.transient, policy_admits=setting.policy_admits
        )
        predictor, planner = setting.predictor or NoPredictor(), setting.planner or TopM()
        runtime = OffloadRuntime(store.geometry, tier, predictor, planner, store.read_expert, compute)
        model = load_offloaded(folder, torch.float32)
        with attach(model, runtime, fuse_routers=setting.fuse_routers):
            yield model, runtime


@contextmanager
def backend(store: ExpertStore, setting: Setting) -> Iterator[tuple[SlotPool, ThreadTransfers, ExpertCompute]]:
    """What moves and computes experts; the GPU's runs on the stand-in driver, with host memory for its slots."""
    place, driver = (store.path, store.offset, store.row_bytes), setting.driver
    knobs: dict[str, Any] = {"n_threads": 2, "chunk_bytes": setting.chunk_bytes}
    with ExitStack() as stack:
        if driver is None:
            source = stack.enter_context(closing(setting.source(*place)))
            pool = SlotPool(store.geometry, setting.n_slots)
            transfers = stack.enter_context(closing(ThreadTransfers(source, pool.buffer, **knobs)))
            yield pool, transfers, TorchExperts(pool)
            return
        pinned = stack.enter_context(closing(PinnedSource(*place, driver, n_threads=2)))
        fences = stack.enter_context(closing(SlotFences(driver, setting.n_slots, lambda: COMPUTE_STREAM)))
        pool = SlotPool(store.geometry, setting.n_slots, on_release=fences.raise_at)
        knobs |= {"slot_address": pool.address, "fence": fences.event}
        transfers = stack.enter_context(closing(ThreadTransfers(pinned, pool.buffer, **knobs)))
        compute = KernelExperts(store.geometry, pool, pinned.mapped_address if setting.zero_copy else None)
        yield pool, transfers, compute
        compute.check()


def plain(folder: Path) -> PreTrainedModel:
    """The same model, unmodified, as transformers runs it."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.set_experts_implementation("eager")
    return model


@torch.inference_mode()
def decode(model: PreTrainedModel, prompts: list[Tensor] = PROMPTS, new_tokens: int = 24) -> tuple[Tensor, Tensor]:
    """Greedy tokens [n_prompts * B, new_tokens] and all logits [n_prompts * B, new_tokens, V]."""
    tokens, logits = [], []
    for prompt in prompts:
        cache, ids = DynamicCache(config=model.config), prompt
        steps = []
        for _ in range(new_tokens):
            steps.append(model(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1])
            ids = steps[-1].argmax(-1, keepdim=True)
        logits.append(torch.stack(steps, dim=1))
        tokens.append(logits[-1].argmax(-1))
    return torch.cat(tokens), torch.cat(logits)
