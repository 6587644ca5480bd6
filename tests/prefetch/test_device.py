"""The device is chosen in one place, and what is not there is said."""

from __future__ import annotations

import pytest
import torch
from hydra import compose, initialize_config_dir

from experiments.backend import refuse_gpu
from experiments.config import register, validate
from prefetch.device import compute_device
from prefetch.errors import ConfigError
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
