"""The GPU's path from end to end without a GPU: kernels in Triton's interpreter, copies through a stand-in for the driver.

All else is what runs on a GPU: worker threads, pinned memory, fences, tables, launches, runtime.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from predictors.base import LayerView, Prediction
from predictors.gate_reuse import GateReuse
from prefetch.accounting import violations
from prefetch.cache.none import NoCache
from prefetch.cache.resident import Resident
from prefetch.compute.kernel_experts import KernelExperts
from prefetch.errors import GatecastError, TransferError
from prefetch.planner.cpu_fallback import CpuFallback
from prefetch.planner.top_m import TopM
from prefetch.runtime import OffloadRuntime
from tests.prefetch.offloaded import PROMPTS, Setting, decode, offloaded, plain
from tests.prefetch.transfers.stand_in_driver import StandInDriver

SETTINGS: dict[str, Callable[[], Setting]] = {
    "resident": lambda: Setting(Resident(24), n_slots=24, staging=0, transient=0),
    "slru": lambda: Setting(),
    "gate reuse": lambda: Setting(predictor=GateReuse()),
    "two transients": lambda: Setting(NoCache(0), n_slots=2, staging=0, transient=2),
    "zero-copy": lambda: Setting(planner=CpuFallback(TopM()), zero_copy=True),
    "zero-copy when busy": lambda: Setting(predictor=GateReuse(), planner=CpuFallback(TopM(), link_experts=1), zero_copy=True),
}
PROMPT, NEW_TOKENS = PROMPTS[:1], 6


@pytest.fixture(scope="module")
def pack_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("packs")


@pytest.fixture
def driver(tmp_path: Path) -> StandInDriver:
    return StandInDriver(tmp_path)


@pytest.fixture(scope="module")
def resident_logits(tiny_qwen3: Path, pack_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    setting = SETTINGS["resident"]()
    setting.driver = StandInDriver(tmp_path_factory.mktemp("resident"))
    with offloaded(tiny_qwen3, pack_dir, setting) as (model, _):
        return decode(model, PROMPT, NEW_TOKENS)[1]


def test_tokens_equal_unmodified_transformers(tiny_qwen3: Path, resident_logits: torch.Tensor) -> None:
    expected_tokens, expected_logits = decode(plain(tiny_qwen3), PROMPT, NEW_TOKENS)
    assert torch.equal(resident_logits.argmax(-1), expected_tokens)
    torch.testing.assert_close(resident_logits, expected_logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SETTINGS)
def test_logits_have_the_same_bits_whatever_the_parts(
    name: str, tiny_qwen3: Path, pack_dir: Path, driver: StandInDriver, resident_logits: torch.Tensor
) -> None:
    setting = SETTINGS[name]()
    setting.driver = driver
    with offloaded(tiny_qwen3, pack_dir, setting) as (model, runtime):
        _, logits = decode(model, PROMPT, NEW_TOKENS)
        runtime.finish()
        record = runtime.record()
    assert torch.equal(logits, resident_logits)
    assert violations(record, moved_bytes=driver.read("n_copied")) == []
    assert (record.calls["in_place"].sum() > 0) == ("zero-copy" in name)


def test_experts_that_the_cpu_computes_are_added_on_the_device(
    tiny_qwen3: Path, pack_dir: Path, driver: StandInDriver, resident_logits: torch.Tensor
) -> None:
    setting = Setting(predictor=GateReuse(), planner=CpuFallback(TopM(), link_experts=1), driver=driver)
    with offloaded(tiny_qwen3, pack_dir, setting) as (model, runtime):
        tokens, logits = decode(model, PROMPT, NEW_TOKENS)
        runtime.finish()
        record = runtime.record()
    assert torch.equal(tokens, resident_logits.argmax(-1))
    torch.testing.assert_close(logits, resident_logits, rtol=1e-5, atol=1e-5)
    assert record.calls["in_place"].sum() > 0 and violations(record) == []


def test_every_released_slot_is_fenced(tiny_qwen3: Path, pack_dir: Path, driver: StandInDriver) -> None:
    with offloaded(tiny_qwen3, pack_dir, Setting(driver=driver)) as (model, runtime):
        released: list[int] = []
        pool = runtime.tier.pool
        release = pool.release
        pool.release = lambda slot: (released.append(slot), release(slot))[1]  # type: ignore[method-assign]
        decode(model, PROMPT, NEW_TOKENS)
    assert len(released) > 0 and driver.read("clock_of_compute") == len(released)
    assert driver.read("n_waits") > 0


def test_a_failed_copy_surfaces_at_its_layer(tiny_qwen3: Path, pack_dir: Path, driver: StandInDriver) -> None:
    driver.fail_copy(5)
    spans: list[str] = []

    @contextmanager
    def span(name: str) -> Iterator[None]:
        spans.append(name)
        try:
            yield
        finally:
            spans.remove(name)

    with offloaded(tiny_qwen3, pack_dir, Setting(driver=driver)) as (model, runtime):
        runtime.compute.span = span  # type: ignore[method-assign]
        with pytest.raises(TransferError, match=r"expert \d+ of MoE layer \d+ could not be loaded.*illegal memory access"):
            decode(model, PROMPT, NEW_TOKENS)
    assert spans == []


def test_a_kernels_fault_surfaces_as_itself(tiny_qwen3: Path, pack_dir: Path, driver: StandInDriver) -> None:
    def fault(*arguments: Any) -> None:
        driver.die()
        raise RuntimeError("the kernel's own fault")

    with pytest.raises(RuntimeError, match="the kernel's own fault"):
        with offloaded(tiny_qwen3, pack_dir, Setting(driver=driver)) as (model, runtime):
            runtime.compute.begin = fault  # type: ignore[method-assign,assignment]
            decode(model, PROMPT, NEW_TOKENS)


def test_an_expert_that_was_not_there_is_noticed(tiny_qwen3: Path, pack_dir: Path, driver: StandInDriver) -> None:
    with offloaded(tiny_qwen3, pack_dir, Setting(driver=driver)) as (_, runtime):
        compute = runtime.compute
        assert isinstance(compute, KernelExperts)
        compute.missed.fill_(1)
        with pytest.raises(TransferError, match="in no slot"):
            compute.check()
        compute.missed.zero_()


def watched(runtime: OffloadRuntime) -> list[str]:
    """What the runtime asks of the device, in order: `fetch` waits, `send` is one upload, `begin` begins a layer call."""
    compute, asked = runtime.compute, []
    assert isinstance(compute, KernelExperts)

    def note(name: str, owner: Any) -> None:
        call = getattr(owner, name)
        setattr(owner, name, lambda *arguments: (asked.append(name), call(*arguments))[1])

    note("fetch", compute.exchange)
    note("send", compute.exchange)
    note("begin", compute)
    note("predict", runtime.predictor)
    return asked


def test_the_host_waits_once_a_layer_and_predictors_are_asked_before(
    tiny_qwen3: Path, pack_dir: Path, driver: StandInDriver
) -> None:
    with offloaded(tiny_qwen3, pack_dir, Setting(predictor=GateReuse(), driver=driver)) as (model, runtime):
        asked = watched(runtime)
        decode(model, PROMPT, NEW_TOKENS)
    waits = [name for name in asked if name in ("predict", "fetch")]
    assert waits == ["predict", "fetch"] * (3 * NEW_TOKENS)


def test_a_forward_pass_ends_when_the_device_is_done(tiny_qwen3: Path, pack_dir: Path, driver: StandInDriver) -> None:
    with offloaded(tiny_qwen3, pack_dir, Setting(driver=driver)) as (model, runtime):
        n_ended: list[int] = []  # passes that had ended by the book when the device was waited for
        runtime.compute.wait = lambda: n_ended.append(len(runtime.recorder.wall_s))  # type: ignore[method-assign]
        decode(model, PROMPT, NEW_TOKENS)
    assert n_ended == list(range(NEW_TOKENS))


def test_hits_are_one_upload_and_all_that_is_awaited_another(tiny_qwen3: Path, pack_dir: Path, driver: StandInDriver) -> None:
    with offloaded(tiny_qwen3, pack_dir, Setting(driver=driver)) as (model, runtime):
        asked = watched(runtime)
        decode(model, PROMPT, NEW_TOKENS)
        runtime.finish()
        calls = runtime.record().calls
    decoded = calls[calls["phase"] == "decode"]
    n_uploads = (decoded["hits"] > 0).sum() + (decoded["misses"] > 0).sum()
    assert decoded["misses"].max() > 1
    first_decoded = [place for place, name in enumerate(asked) if name == "begin"][-len(decoded)]
    assert asked[first_decoded:].count("send") == n_uploads


@pytest.mark.parametrize("zero_copy", [False, True])
def test_experts_in_place_are_one_part_and_the_host_waits_before_the_hits(
    zero_copy: bool, tiny_qwen3: Path, pack_dir: Path, driver: StandInDriver
) -> None:
    setting = Setting(predictor=GateReuse(), planner=CpuFallback(TopM(), link_experts=0), driver=driver, zero_copy=zero_copy)
    with offloaded(tiny_qwen3, pack_dir, setting) as (model, runtime):
        asked = watched(runtime)
        decode(model, PROMPT, NEW_TOKENS)
        runtime.finish()
        calls = runtime.record().calls
    n_on_cpu = 0 if zero_copy else int((calls["in_place"] > 0).sum())
    assert calls["in_place"].max() > 1 and asked.count("fetch") == len(calls) + n_on_cpu
    assert asked.count("send") <= int((calls["hits"] > 0).sum() + (calls["late"] > 0).sum() + (calls["misses"] > 0).sum())
    assert not any(pair == ("send", "fetch") and n_on_cpu for pair in _within_calls(asked))


def _within_calls(asked: list[str]) -> Iterator[tuple[str, str]]:
    """Neighbours in `asked` of which the later belongs to the layer call of the earlier: `predict` comes first in a call."""
    for earlier, later in zip(asked, asked[1:], strict=False):
        if later != "predict":
            yield earlier, later


class Wrong(GateReuse):
    """Fails at the second layer, one way or another."""

    def __init__(self, how: str):
        super().__init__()
        self.how = how

    def predict(self, seen: LayerView) -> list[Prediction]:
        if seen.layer == 0:
            return super().predict(seen)
        if self.how == "user":
            raise GatecastError("the user's mistake")
        if self.how == "raises":
            raise ZeroDivisionError
        return [Prediction(0, torch.full((1, 8), torch.nan) if self.how == "nan" else torch.zeros(3, 3))]


@pytest.mark.parametrize("how", ["raises", "nan", "shape"])
def test_a_predictor_that_fails_on_the_device_is_switched_off(
    how: str, tiny_qwen3: Path, pack_dir: Path, driver: StandInDriver, resident_logits: torch.Tensor
) -> None:
    with offloaded(tiny_qwen3, pack_dir, Setting(predictor=Wrong(how), driver=driver)) as (model, runtime):
        _, logits = decode(model, PROMPT, NEW_TOKENS)
        assert type(runtime.predictor).__name__ == "NoPredictor"
    assert torch.equal(logits, resident_logits)


def test_a_users_mistake_in_a_predictor_ends_the_run(tiny_qwen3: Path, pack_dir: Path, driver: StandInDriver) -> None:
    with offloaded(tiny_qwen3, pack_dir, Setting(predictor=Wrong("user"), driver=driver)) as (model, _):
        with pytest.raises(GatecastError, match="the user's mistake"):
            decode(model, PROMPT, NEW_TOKENS)
