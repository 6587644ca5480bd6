"""The switch between the two expert MLPs."""

from __future__ import annotations

import pytest
import torch

from kernels.moe_mlp import choose_path, moe_mlp, pairs_per_touched_expert
from prefetch.errors import KernelInputError
from tests.kernels.random_moe import TOLERANCES, Sizes, check_result, poisoned, random_call


@pytest.mark.parametrize(
    ("n_experts", "top_k", "last_decode", "first_grouped"),
    [
        pytest.param(128, 8, 4, 8, id="Qwen3-30B: 32 pairs on 29.1 experts, 64 on 51.6"),
        pytest.param(8, 2, 2, 3, id="Mixtral: 4 pairs on 3.5 experts, 6 on 4.6"),
        pytest.param(256, 8, 12, 16, id="Qwen3.6: 96 pairs on 81 experts, 128 on 102"),
    ],
)
def test_switch(n_experts: int, top_k: int, last_decode: int, first_grouped: int) -> None:
    paths = [choose_path(n_tokens, n_experts, top_k) for n_tokens in range(1, 65)]
    assert paths == sorted(paths)  # decode first, then grouped for good
    assert paths[last_decode - 1] == "decode" and paths[first_grouped - 1] == "grouped"


def test_expected_pairs_match_a_simulation() -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.rand(400, 16, 128, generator=generator).argsort(dim=-1)[..., :8]
    touched = torch.zeros(400, 128).scatter_(1, ids.flatten(1), 1.0).sum(dim=1)
    assert pairs_per_touched_expert(16, 128, 8) == pytest.approx(float((16 * 8 / touched).mean()), rel=0.01)


@pytest.mark.parametrize("path", ["auto", "decode", "grouped"])
def test_every_path_computes_the_call(path: str) -> None:
    call = random_call(Sizes(6, 40, 24, 5, 2, n_absent=1), torch.float16, seed=1, biases=True, addends=True)
    out, missed = poisoned(call)
    assert moe_mlp(call, out, missed, path=path) is out
    check_result(call, out, missed)


def test_paths_agree_with_each_other() -> None:
    call = random_call(Sizes(6, 40, 24, 5, 2), torch.float32, seed=2)
    decode, grouped = moe_mlp(call, path="decode"), moe_mlp(call, path="grouped")
    assert (decode - grouped).norm() <= 2 * TOLERANCES[torch.float32] * decode.norm()


def test_unknown_path_is_refused() -> None:
    call = random_call(Sizes(1, 8, 8, 2, 1), torch.float32, seed=0)
    with pytest.raises(KernelInputError, match="path='fast' is unknown; choose auto, decode or grouped"):
        moe_mlp(call, path="fast")
