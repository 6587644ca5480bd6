"""The device-driven runtime in Triton's interpreter: against unmodified transformers, against the host's caches, against its own books."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kernels.device_cache import DeviceCache, slru_protected
from kernels.slot_table import ExpertTable, addresses_of
from predictors.base import Predictor
from predictors.gate_reuse import GateReuse
from predictors.none import NoPredictor
from predictors.popularity import Popularity
from prefetch.cache.base import CachePolicy
from prefetch.cache.lru import Lru
from prefetch.cache.replay import replay_hits
from prefetch.cache.slru import Slru
from prefetch.device_runtime import DeviceRuntime
from prefetch.errors import ConfigError, TransferError
from prefetch.geometry import ExpertKey
from prefetch.memory import allocate_pages
from prefetch.model import attach, load_offloaded
from prefetch.store import ExpertStore
from tests.prefetch.offloaded import PROMPTS, decode, plain

R = TypeVar("R", bound=DeviceRuntime)
PROMPT, NEW_TOKENS, CAPACITY = PROMPTS[:1], 8, 6


@contextmanager
def device_driven(
    folder: Path,
    pack_dir: Path,
    predictor: Predictor,
    *,
    runtime_class: type[R] = DeviceRuntime,  # type: ignore[assignment]
    capacity: int = CAPACITY,
    protected: int = 0,
    **knobs: Any,
) -> Iterator[tuple[PreTrainedModel, R]]:
    """The model of `folder` in fp32, all of whose experts lie in "pinned" memory behind a few slots."""
    store = ExpertStore.open(folder, torch.float32, pack_dir, progress=False)
    size = store.geometry
    host_rows = torch.stack([store.read_row(ExpertKey(n, e)) for n in range(size.n_layers) for e in range(size.n_experts)])
    cache = DeviceCache.empty(
        size.n_layers,
        size.n_experts,
        capacity=capacity,
        staging=2,
        transient=size.top_k,
        protected_capacity=protected,
    )
    pages = allocate_pages(cache.n_slots * size.expert.row_bytes, "a test")
    slots = torch.frombuffer(pages, dtype=torch.uint8).view(cache.n_slots, -1).fill_(0xFF)
    backing = ExpertTable(size.expert, (host_rows,), addresses_of(host_rows).view(size.n_layers, size.n_experts))
    runtime = runtime_class(size, slots, backing, cache, predictor, **knobs)
    model = load_offloaded(folder, torch.float32)
    with attach(model, runtime):
        yield model, runtime


@pytest.fixture(scope="module")
def pack_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("packs")


@pytest.mark.parametrize(
    "predictor", [NoPredictor(), GateReuse(), GateReuse(lookahead=2)], ids=["none", "gate reuse", "two ahead"]
)
def test_tokens_equal_unmodified_transformers(predictor: Predictor, tiny_qwen3: Path, pack_dir: Path) -> None:
    expected_tokens, expected_logits = decode(plain(tiny_qwen3), PROMPT, NEW_TOKENS)
    with device_driven(tiny_qwen3, pack_dir, predictor) as (model, runtime):
        tokens, logits = decode(model, PROMPT, NEW_TOKENS)
        counts = runtime.counts()
    assert torch.equal(tokens, expected_tokens)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-4)
    needed = (NEW_TOKENS - 1) * 3 * 2  # decode steps, layers, top-k: the prefill is read in place
    assert counts["hits"] + counts["useful"] + counts["misses"] == needed and counts["unplaced"] == 0
    staged = int((runtime.cache.segment == 2).sum())
    assert counts["prefetches"] == counts["useful"] + counts["wasted"] + staged
    assert (counts["prefetches"] > 0) == (not isinstance(predictor, NoPredictor))


@pytest.mark.parametrize("policy", [Lru(12), Slru(12, fill=True)], ids=["lru", "slru"])
def test_hits_are_those_of_the_hosts_cache(policy: CachePolicy, tiny_qwen3: Path, pack_dir: Path) -> None:
    protected = slru_protected(policy.capacity) if isinstance(policy, Slru) else 0
    events: list[list[ExpertKey]] = []
    with device_driven(tiny_qwen3, pack_dir, NoPredictor(), capacity=policy.capacity, protected=protected) as (model, runtime):
        planned_call = runtime.planned_call

        def noted(layer: int, hidden: Tensor, ids: Tensor, weights: Tensor, guesses: Tensor | None) -> Tensor:
            events.append([ExpertKey(layer, expert) for expert in ids[0].tolist()])
            return planned_call(layer, hidden, ids, weights, guesses)

        runtime.planned_call = noted  # type: ignore[method-assign]
        decode(model, PROMPT, 3 * NEW_TOKENS)
        hits = runtime.counts()["hits"]
    assert hits == replay_hits(policy, events).hits > 0


@pytest.mark.parametrize("lookahead", [1, 2])
def test_one_call_prefetches_no_more_than_a_demand_load_may_wait_for(lookahead: int, tiny_qwen3: Path, pack_dir: Path) -> None:
    copied: list[int] = []
    expected_tokens, _ = decode(plain(tiny_qwen3), PROMPT, NEW_TOKENS)
    with device_driven(tiny_qwen3, pack_dir, GateReuse(lookahead=lookahead), prefetch_bytes=1) as (model, runtime):
        planned_call = runtime.planned_call

        def noted(layer: int, hidden: Tensor, ids: Tensor, weights: Tensor, guesses: Tensor | None) -> Tensor:
            out = planned_call(layer, hidden, ids, weights, guesses)
            if runtime.prefetched is not None:
                _, first, last = runtime.prefetched.copy_bounds.tolist()
                copied.append(last - first)
            return out

        runtime.planned_call = noted  # type: ignore[method-assign]
        tokens, _ = decode(model, PROMPT, NEW_TOKENS)
        counts = runtime.counts()
    assert torch.equal(tokens, expected_tokens)
    assert set(copied) == {0, 1} and counts["prefetches"] == sum(copied)


def test_what_is_prefetched_is_the_nearest_and_likeliest_that_is_not_on_board(tiny_qwen3: Path, pack_dir: Path) -> None:
    with device_driven(tiny_qwen3, pack_dir, NoPredictor()) as (_, runtime):
        runtime.most_prefetches = 2
        runtime.cache.slot_of[0, 3] = 1
        guesses = torch.tensor([[3, -1, 7], [3, 5, 4]])  # for layers 0 and 1, the last being layer 2
        assert runtime._most_urgent(2, guesses).tolist() == [[-1, -1, 7], [3, -1, -1]]


def test_an_expert_that_was_not_there_is_noticed(tiny_qwen3: Path, pack_dir: Path) -> None:
    with device_driven(tiny_qwen3, pack_dir, NoPredictor()) as (_, runtime):
        runtime.missed.fill_(1)
        with pytest.raises(TransferError, match="in no slot"):
            runtime.counts()


def test_predictors_that_need_the_host_are_refused(tiny_qwen3: Path, pack_dir: Path) -> None:
    with pytest.raises(ConfigError, match="popularity asks the host"), device_driven(tiny_qwen3, pack_dir, Popularity()):
        pass
