"""A tiny offloaded model, put together the way experiments do it but from plain objects."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from predictors.base import Predictor
from predictors.none import NoPredictor
from prefetch.cache.base import CachePolicy
from prefetch.cache.slru import Slru
from prefetch.fast_tier import FastTier
from prefetch.model import attach, load_offloaded
from prefetch.planner.base import Planner
from prefetch.planner.top_m import TopM
from prefetch.runtime import OffloadRuntime
from prefetch.slots import SlotPool
from prefetch.store import ExpertStore
from prefetch.transfers.sources import DiskSource, Source
from prefetch.transfers.threads import ThreadTransfers

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


@contextmanager
def offloaded(folder: Path, pack_dir: Path, setting: Setting) -> Iterator[tuple[PreTrainedModel, OffloadRuntime]]:
    """The model of `folder`, fp32, with its experts behind a runtime; everything is closed afterwards."""
    store = ExpertStore.open(folder, torch.float32, pack_dir, progress=False)
    pool = SlotPool(store.geometry, setting.n_slots)
    source = setting.source(store.path, store.offset, store.row_bytes)
    transfers = ThreadTransfers(source, pool.buffer, n_threads=2, chunk_bytes=setting.chunk_bytes)
    try:
        staging = 0 if setting.policy_admits else setting.staging
        policy = Slru(setting.n_slots - staging - setting.transient) if setting.policy is None else setting.policy
        tier = FastTier(
            pool, policy, transfers, staging=staging, transient=setting.transient, policy_admits=setting.policy_admits
        )
        predictor, planner = setting.predictor or NoPredictor(), setting.planner or TopM()
        runtime = OffloadRuntime(store.geometry, tier, predictor, planner, store.read_expert)
        model = load_offloaded(folder, torch.float32)
        with attach(model, runtime):
            yield model, runtime
    finally:
        transfers.close()


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
