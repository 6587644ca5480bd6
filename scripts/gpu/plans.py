"""The cache planner: the plans of several tokens against their reference, and the planner's time over the plans of several tokens.

A plan's time depends on what it finds, so it is timed as it is used: every layer of several tokens in turn, over a cache that is
full and smaller than what they need, each call with ids of its own. Beside it flashlib 0.4's LRU admission (Apache-2.0), where that
package is installed: plain LRU, no predictions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernels.cache_plan import cache_plan, cache_plan_reference
from kernels.device_cache import CachePlan, DeviceCache, slru_protected
from scripts.gpu.case import Case
from scripts.gpu.generated_routing import Ids, RoutingStatistics, generated_routing, guesses_of
from scripts.gpu.kernel_times import KernelTime, Timed, times_beside_roof
from scripts.gpu.shapes import MoEShape

MOST_SLOTS = 1228  # 12 GB of Qwen3-30B-A3B's experts in bf16
SLOTS_STEP = 64
MOST_PAIRS = 64  # the planner is sequential, and meant for decode
TIMED_TOKENS = (1, 8)
N_STEPS = 8  # of decoding, that are timed
CHECKED_TOKENS = 4  # or two steps, if those have more: the reference takes milliseconds for a plan
STATISTICS = RoutingStatistics()
RECALL = 0.734  # of the predictions: gate reuse's on the bundled model

PlannerCall = tuple[int, Tensor, Tensor | None]  # layer, needed experts [T, k], predicted ones [1, M]


def plan_case(shape: MoEShape, n_tokens: int, dtype: torch.dtype, device: str, seed: int) -> Case | None:
    """The plans of several steps, on a cache that they fill and that evicts, with fewer staging places than predictions: all that each
    of them decides, and all books after it. For one dtype: there are integers alone.

    The reference runs on the host, where it does not wait for a device at each number.
    """
    if n_tokens * shape.top_k > MOST_PAIRS or dtype != torch.float32:
        return None
    return Case(
        lambda: _all_books(cache_plan, *checked_run(shape, n_tokens, device)),
        lambda: _all_books(cache_plan_reference, *checked_run(shape, n_tokens, "cpu")).to(device),
    )


def checked_run(shape: MoEShape, n_tokens: int, device: str) -> tuple[DeviceCache, list[PlannerCall]]:
    """The cache of `plan_case`, empty, and what is asked of it."""
    n_steps = max(2, CHECKED_TOKENS // n_tokens)
    ids, guesses = (drawn[:n_steps] for drawn in _routing(shape, n_tokens))
    return planner_run(shape, ids, guesses, device, _capacity(ids), shape.top_k // 2)


def plan_times(shape: MoEShape, n_tokens: int) -> Iterator[KernelTime]:
    """Microseconds of a plan with and without predictions."""
    if n_tokens not in TIMED_TOKENS:
        reason = f"the planner is meant for decode, and timed with {' and '.join(map(str, TIMED_TOKENS))} tokens"
        yield KernelTime(shape.name, n_tokens, "ours", None, 0, None, reason, "cache_plan")
        return
    ids, guesses = _routing(shape, n_tokens)
    for operation, predicted in (("cache_plan", None), ("cache_plan with predictions", guesses)):
        calls = {"ours": planner_calls(shape, ids, predicted, _capacity(ids), "cuda")}
        if predicted is None:
            calls |= _flashlib(shape, ids)
        yield from times_beside_roof(Timed(operation, shape.name, n_tokens, 0), [], calls, None, 0)


def planner_calls(shape: MoEShape, ids: Ids, guesses: Ids | None, capacity: int, device: str) -> list[Callable[[], None]]:
    """The calls of `planner_run`, each with memory for its plan, and a staging place for each prediction."""
    staging = 0 if guesses is None else 2 * shape.top_k
    cache, calls = planner_run(shape, ids, guesses, device, capacity, staging)

    def call(layer: int, needed: Tensor, predicted: Tensor | None) -> Callable[[], None]:
        plan = CachePlan.empty(needed, 0 if predicted is None else predicted.numel())
        return lambda: void(cache_plan(cache, layer, needed, predicted, plan))

    return [call(*asked) for asked in calls]


def planner_run(
    shape: MoEShape, ids: Ids, guesses: Ids | None, device: str, capacity: int, staging: int
) -> tuple[DeviceCache, list[PlannerCall]]:
    """An empty cache of so many members, and what it is asked for every step and layer of `ids` [n, L, T, k].

    Args:
        guesses: [n, L, M], for each layer what was guessed of it, one layer before: of the first, when the last of the step before is
            planned. The last call of all has nothing to guess.
        device: on "meta" calls are left out that launch the same programs as others.
    """
    cache = DeviceCache.empty(
        shape.n_layers, shape.n_experts, capacity=capacity, staging=staging, transient=ids[0, 0].size,
        protected_capacity=slru_protected(capacity), device=device,
    )  # fmt: skip
    needed = torch.from_numpy(ids).to(device).flatten(0, 1)
    guessed = [] if guesses is None else list(torch.from_numpy(guesses).to(device).flatten(0, 1)[1:, None])
    nothing = [None] * (len(needed) - len(guessed))
    calls = [(i % shape.n_layers, *asked) for i, asked in enumerate(zip(needed, guessed + nothing, strict=True))]
    return cache, calls[: shape.n_layers] + calls[-1:] if device == "meta" else calls


def rehearse_plan_times(shape: MoEShape, n_tokens: int) -> None:
    """Launch what `plan_times` launches, on tensors without memory."""
    if n_tokens not in TIMED_TOKENS:
        return
    ids, guesses = _routing(shape, n_tokens)
    for predicted in (None, guesses):
        for call in planner_calls(shape, ids, predicted, _capacity(ids), "meta"):
            call()


def _routing(shape: MoEShape, n_tokens: int) -> tuple[Ids, Ids]:
    """Needed experts [n, L, T, k], and guesses of them [n, L, k]: of the first token's."""
    drawn = generated_routing(N_STEPS * n_tokens, shape.n_layers, shape.n_experts, shape.top_k, STATISTICS, seed=0)
    ids = drawn.reshape(N_STEPS, n_tokens, shape.n_layers, shape.top_k).transpose(0, 2, 1, 3)
    guesses = guesses_of(np.ascontiguousarray(ids[:, :, 0]), shape.n_experts, RECALL, STATISTICS, seed=1)
    return np.ascontiguousarray(ids), guesses


def _capacity(ids: Ids) -> int:
    """Three quarters of what the steps need, so that every replay misses anew; from a step on in steps, which keep programs few."""
    n_needed = sum(len(np.unique(ids[:, layer])) for layer in range(ids.shape[1]))
    capacity = min(MOST_SLOTS, n_needed * 3 // 4)
    return capacity if capacity < SLOTS_STEP else capacity // SLOTS_STEP * SLOTS_STEP


def _all_books(plan: Callable[..., CachePlan], cache: DeviceCache, calls: list[PlannerCall]) -> Tensor:
    """`_books` after each call."""
    return torch.cat([_books(cache, plan(cache, *call)) for call in calls])


def _books(cache: DeviceCache, plan: CachePlan) -> Tensor:
    """All that a plan decides, int64, in one tensor; entries of the copy list past its end are undefined and set to 0."""
    listed = torch.arange(len(plan.copy_keys), device=plan.copy_keys.device) < plan.copy_bounds[2]
    copies = (torch.where(listed, entries, 0) for entries in (plan.copy_keys, plan.copy_slots))
    state = cache.tensors
    return torch.cat([part.flatten().long() for part in (*state, plan.slot_ids, plan.copy_bounds, *copies)])


def _flashlib(shape: MoEShape, ids: Ids) -> dict[str, list[Callable[[], None]]]:
    """The same steps and layers, as many slots."""
    try:
        from flashlib.kernels.slot_cache.triton.lru_ensure import lru_ensure
    except ImportError:
        return {}
    integers: dict[str, Any] = {"dtype": torch.int32, "device": "cuda"}
    n_slots = _capacity(ids)
    slot_of = torch.full((shape.n_layers * shape.n_experts,), -1, **integers)
    key_of, used, step = torch.full((n_slots,), -1, **integers), torch.zeros(n_slots, **integers), torch.zeros((), **integers)
    n_copies = torch.zeros((), dtype=torch.int64, device="cuda")
    keys = torch.from_numpy(ids + shape.n_experts * np.arange(shape.n_layers)[:, None, None]).int().cuda().flatten(2)
    slots, source, target = (torch.empty_like(keys[0, 0]) for _ in range(3))

    def call(query: Tensor) -> Callable[[], None]:
        return lambda: void(lru_ensure(query, slot_of, key_of, used, step, slots, source, target, n_copies))

    return {"flashlib lru_ensure": [call(query) for layers in keys for query in layers]}


def void(result: object) -> None:
    """A call that is timed and returns nothing: a plan is not compared by its bits here."""
