"""The device-driven runtime in Triton's interpreter: against unmodified transformers, against the host's caches, against its own books."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel, StaticCache

from kernels.device_cache import DeviceCache, slru_protected
from kernels.slot_table import ExpertTable, addresses_of
from predictors.base import LayerView, Prediction, Predictor
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
    fuse_routers: bool = False,
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
    with attach(model, runtime, fuse_routers=fuse_routers):
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


class Captured(TorchDispatchMode):
    """Refuses what has to wait for the device, as a CUDA graph's capture does."""

    WAITS = {
        "aten::_local_scalar_dense",
        "aten::item",
        "aten::is_nonzero",
        "aten::nonzero",
        "aten::equal",
        "aten::masked_select",
    }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() in self.WAITS:
            raise AssertionError(f"{func.name()} waits for the device")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("prefetch_bytes", [1, 1 << 30], ids=["one prefetch", "all guesses"])
def test_a_decode_step_of_a_transformers_model_asks_the_device_for_nothing(
    prefetch_bytes: int, tiny_qwen3: Path, pack_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    knobs = {"prefetch_bytes": prefetch_bytes}
    with device_driven(tiny_qwen3, pack_dir, GateReuse(), **knobs) as (model, runtime), torch.inference_mode():
        cache = StaticCache(config=model.config, max_cache_len=32)
        ids = model(input_ids=PROMPT[0], past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1, keepdim=True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)  # transformers looks, too
        with Captured():
            model(input_ids=ids, past_key_values=cache, use_cache=True)
        assert (runtime.sequence, runtime.step) == (0, 1) and runtime.counts()["prefetches"] > 0


class Interrupted(GateReuse):
    """Ctrl-C at the second layer of a decode step, while the first one's prefetches are under way."""

    def predict(self, seen: LayerView) -> list[Prediction]:
        if seen.layer == 1:
            raise KeyboardInterrupt
        return super().predict(seen)


def test_prefetches_of_a_pass_that_raised_are_waited_for(tiny_qwen3: Path, pack_dir: Path) -> None:
    with pytest.raises(KeyboardInterrupt), device_driven(tiny_qwen3, pack_dir, Interrupted()) as (model, runtime):
        try:
            decode(model, PROMPT, NEW_TOKENS)
        finally:
            assert runtime.prefetched is not None
    assert runtime.prefetched is None


def test_an_expert_that_was_not_there_is_noticed(tiny_qwen3: Path, pack_dir: Path) -> None:
    with device_driven(tiny_qwen3, pack_dir, NoPredictor()) as (_, runtime):
        runtime.missed.fill_(1)
        with pytest.raises(TransferError, match="in no slot"):
            runtime.counts()


def test_predictors_that_need_the_host_are_refused(tiny_qwen3: Path, pack_dir: Path) -> None:
    with pytest.raises(ConfigError, match="popularity asks the host"), device_driven(tiny_qwen3, pack_dir, Popularity()):
        pass
