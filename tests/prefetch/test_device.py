"""The device is chosen in one place, and what is not there is said."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from experiments import backend
from experiments.backend import enforce_budget, memory_budget, refuse_gpu, use_device
from experiments.config import register, validate
from experiments.slot_budget import check_slots
from prefetch.device import compute_device, limit_memory, settle
from prefetch.errors import CapacityError, ConfigError
from prefetch.geometry import ExpertGeometry, MoEGeometry
from tests.predictors.synthetic_run import CONF


@pytest.fixture(scope="module", autouse=True)
def schema() -> None:
    register()


def test_the_cpus_backend() -> None:
    assert compute_device("torch") == torch.device("cpu")


@pytest.mark.parametrize(
    ("version", "said"), [(None, "this PyTorch is built without CUDA"), ("13.0", "no CUDA device is visible to PyTorch")]
)
def test_cuda_that_is_not_there(version: str | None, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", version)
    with pytest.raises(ConfigError, match=f"backend=cuda, but {said}; backend=torch computes on the CPU"):
        compute_device("cuda")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["backend=cuda"], "tier.kind=disk: choose tier=pinned"),
        (["backend=cuda", "tier=pinned", "backend.in_place=gp"], "backend.in_place=gp: choose one of cpu, gpu"),
        (["backend.memory=12GB"], "are about a GPU: choose backend=cuda"),
        (["backend.in_place=gpu"], "are about a GPU: choose backend=cuda"),
        (["backend.router=fused"], "are about a GPU: choose backend=cuda"),
        (["backend.kind=rocm"], "backend.kind=rocm: choose one of torch, cuda"),
    ],
)
def test_backends_that_do_not_fit(overrides: list[str], said: str) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"), pytest.raises(ConfigError, match=said):
        validate(compose("decode", overrides=overrides))


@pytest.mark.parametrize(
    "overrides",
    [["backend=cuda", "tier=pinned"], ["backend=cuda", "tier=pinned", "backend.memory=12GB", "backend.in_place=gpu"]],
)
def test_backends_that_do(overrides: list[str]) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        validate(compose("decode", overrides=overrides))


def test_programs_of_the_cpu_say_so() -> None:
    with (
        initialize_config_dir(str(CONF), version_base="1.3"),
        pytest.raises(ConfigError, match="experiments.x computes on the CPU"),
    ):
        refuse_gpu(compose("decode", overrides=["backend=cuda"]).backend, "experiments.x")


@pytest.fixture
def small_gpu(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, int]]:
    """PyTorch as it answers where device 1, with 16 GB, is current; returns the limits that are set: (fraction, device)."""
    limits: list[tuple[float, int]] = []

    def set_fraction(fraction: float, device: object) -> None:
        limits.append((fraction, torch.cuda._utils._get_device_index(device)))  # as PyTorch's does: no device without an index

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=16 * 10**9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a small GPU")
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", set_fraction)
    return limits


@pytest.mark.parametrize(("device", "index"), [("cuda", 1), ("cuda:0", 0)])
def test_memory_is_limited_on_the_device_that_is_meant(device: str, index: int, small_gpu: list[tuple[float, int]]) -> None:
    limit_memory(torch.device(device), 4 * 10**9)
    assert small_gpu == [(0.25, index)]


@pytest.mark.usefixtures("small_gpu")
def test_a_budget_is_what_was_asked_for_or_all_there_is() -> None:
    gpu = torch.device("cuda", 1)
    assert memory_budget(OmegaConf.create({"memory": "12GB"}), gpu) == 12 * 10**9
    assert memory_budget(OmegaConf.create({"memory": None}), gpu) == 16 * 10**9
    assert memory_budget(OmegaConf.create({"memory": None}), torch.device("cpu")) is None
    with pytest.raises(CapacityError, match=r"backend.memory=24GB, but a small GPU has 16.0 GB"):
        memory_budget(OmegaConf.create({"memory": "24GB"}), gpu)


def test_no_job_of_a_sweep_has_the_limit_of_the_one_before(
    small_gpu: list[tuple[float, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = torch.device("cuda", 1)
    monkeypatch.setattr(backend, "compute_device", lambda kind: gpu)
    enforce_budget(gpu, 4 * 10**9)
    assert use_device(OmegaConf.create({"kind": "cuda", "n_threads": 1})) == gpu
    assert small_gpu == [(0.25, 1), (1.0, 1)]


def test_an_arm_that_cannot_fit_is_named_before_anything_runs() -> None:
    size = MoEGeometry(4, 16, 2, ExpertGeometry(64, 32, torch.bfloat16))
    with initialize_config_dir(str(CONF), version_base="1.3"):
        arms = {
            "slru": compose("decode", overrides=["cache.slots=0.5"]),
            "all": compose("decode", overrides=["cache=resident"]),
        }
    check_slots(arms, size, None)
    check_slots(arms, size, size.total_bytes)
    with pytest.raises(CapacityError, match=r"arm all: its slots take .* leave the arm out \(arms.all=null\)"):
        check_slots(arms, size, size.total_bytes - 1)


def test_settling_hides_no_other_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(device: torch.device) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    settle(torch.device("cuda", 0))
