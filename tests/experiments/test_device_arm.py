"""An arm driven by the device, as `experiments.decode` runs it, on a machine without a GPU: interpreted kernels, a stand-in driver."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from experiments import device_arm
from experiments.after_warmup import record_after
from experiments.arm import ArmRun, run_arm
from experiments.config import register, validate
from experiments.generation import divergences, generate_all
from experiments.slot_budget import slot_budget
from experiments.timeline import timeline
from experiments.workload import Batch
from prefetch.accounting import summarise, violations
from prefetch.errors import CapacityError, ConfigError
from prefetch.geometry import ExpertGeometry, MoEGeometry
from prefetch.model import load_offloaded
from prefetch.store import ExpertStore
from prefetch.transfers.pinned import PinnedSource
from tests.predictors.synthetic_run import CONF
from tests.prefetch.offloaded import PROMPTS, plain
from tests.prefetch.transfers.stand_in_driver import StandInDriver

DEVICE_DRIVEN = ["backend=cuda", "tier=pinned", "backend.driven_by=device", "cache=lru"]
WORKLOAD = ["workload.new_tokens=4", "workload.warmup_batches=1", "workload.temperature=0"]
BATCHES = [Batch(str(number), prompt) for number, prompt in enumerate(PROMPTS[:2])]


@pytest.fixture(autouse=True, scope="module")
def schema() -> None:
    register()


def configured(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("decode", overrides=[*DEVICE_DRIVEN, *WORKLOAD, *overrides])
    validate(cfg)
    return cfg


def run(checkpoint: Path, folder: Path, *overrides: str) -> ArmRun:
    store = ExpertStore.open(checkpoint, torch.float32, folder / "packs", progress=False)
    (folder / "driver").mkdir()
    cfg = configured("predictor=gate_reuse", "cache.slots=12", *overrides)
    place = store.path, store.offset, store.row_bytes
    with closing(PinnedSource(*place, StandInDriver(folder / "driver"), n_threads=2)) as source:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(device_arm, "compute_device", lambda kind: torch.device("cpu"))
            patch.setattr(device_arm, "settle", lambda device: None)
            return run_arm(cfg, load_offloaded(checkpoint, torch.float32), store, BATCHES, None, {}, source)


@pytest.fixture(scope="module")
def finished(schema: None, tiny_qwen3: Path, tmp_path_factory: pytest.TempPathFactory) -> ArmRun:
    return run(tiny_qwen3, tmp_path_factory.mktemp("finished"))


def test_a_planner_that_never_prefetches_only_has_guesses_recorded(tiny_qwen3: Path, tmp_path: Path) -> None:
    planless = run(tiny_qwen3, tmp_path, "planner=none")
    assert violations(planless.record) == [] and set(planless.record.transfers["outcome"]) == {"demand"}
    assert (planless.trace.guesses[1] >= 0).any()


def test_tokens_are_those_of_the_unmodified_model(finished: ArmRun, tiny_qwen3: Path) -> None:
    reference = list(generate_all(plain(tiny_qwen3), BATCHES, configured().workload, 0))
    assert not divergences(reference, finished.generations, torch.finfo(torch.float32).eps)


def test_its_figures_are_those_that_can_be_known(finished: ArmRun) -> None:
    assert violations(finished.record) == [] and not finished.predictor_failed
    found = summarise(record_after(finished.record, 1), link_bytes_per_s=1e9)
    assert found["n_tokens"] == 3 and found["tokens_per_s"] > 0 and found["useful_bytes_per_token"] > 0
    assert pd.isna(found["stall_share"]) and pd.isna(found["transfer_share"])


def test_its_timeline_draws_forward_passes_and_claims_no_more(finished: ArmRun) -> None:
    drawn = json.loads(json.dumps(timeline(finished.record)))["traceEvents"]
    assert {event["name"].split(" ")[0] for event in drawn if event["ph"] == "X"} == {"prefill", "decode"}


def test_a_step_of_a_batch_finds_a_slot_for_each_of_its_pairs() -> None:
    size = MoEGeometry(4, 16, 2, ExpertGeometry(64, 32, torch.bfloat16))
    budget = slot_budget(configured("cache.slots=32", "workload.batch_size=4"), size)
    assert (budget.capacity, budget.staging, budget.transient) == (20, 4, 8)
    with pytest.raises(CapacityError, match="of 8192 slots at most"):
        slot_budget(configured("cache.slots=10000"), MoEGeometry(100, 256, 2, size.expert))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["backend=torch", "tier=disk", "backend.driven_by=device"], "are about a GPU: choose backend=cuda"),
        (["backend.driven_by=gpu"], "backend.driven_by=gpu: choose one of host, device"),
        (["cache=lfu"], "cache._target_=prefetch.cache.lfu.Lfu: choose cache=lru or cache=slru"),
        (["cache=slru", "cache.scope=global"], "cache.fill=False: it can only be true"),
        (["cache=slru", "cache.fill=true"], "cache.scope=per_layer: it can only be global"),
        (["cache.preload=hot_experts"], "cache.preload=hot_experts: it can only be none"),
        (["predictor=popularity"], "predictors.popularity.Popularity asks the host: choose one that computes on the device"),
        (["predictor=draft"], "asks the host"),
        (["planner=cpu_moe"], "planner._target_=prefetch.planner.cpu_fallback.CpuFallback: choose planner=top_m or none"),
        (["planner.max_queued_experts=3"], "has no queue of prefetches: leave planner.max_queued_experts=null"),
        (["tier.verify=true"], "tier.link and tier.verify know nothing of"),
    ],
)  # fmt: skip
def test_what_its_kernels_do_not_know_is_refused(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        configured(*overrides)


@pytest.mark.parametrize(
    "overrides", [[], ["cache=slru", "cache.scope=global", "cache.fill=true"], ["predictor=none", "planner=none"]]
)
def test_what_they_know_is_taken(overrides: list[str]) -> None:
    configured(*overrides)
