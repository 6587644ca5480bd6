"""Packs against the experts that transformers loads, and everything that can go wrong while one is written."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import shutil
import signal
import time
import zlib
from collections import namedtuple
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.process import BaseProcess as Process
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeForCausalLM,
)

from prefetch.checkpoint import Checkpoint
from prefetch.errors import CheckpointError, PackError
from prefetch.families import moe_layer_indices, n_experts
from prefetch.geometry import ExpertKey
from prefetch.pack import pack_experts, pack_format_of
from prefetch.store import ExpertStore
from tests.conftest import qwen3_config, save_random
from tests.prefetch.tiny_families import CHECKPOINTS

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts": 6,
    "pad_token_id": None,
}


@pytest.fixture
def qwen3(tiny_qwen3: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(tiny_qwen3, tmp_path / "qwen3"))


@pytest.fixture
def pack(tmp_path: Path) -> Path:
    """Where a pack shall be made."""
    return tmp_path / "packs" / "experts.safetensors"


@pytest.fixture
def fork() -> Iterator[Callable[[Callable[[], None]], Process]]:
    """Runs a function in a child process, which starts at once: torch and transformers are imported already."""
    children = []

    def start(body: Callable[[], None]) -> Process:
        child = multiprocessing.get_context("fork").Process(target=body)
        child.start()
        children.append(child)
        return child

    yield start
    for child in children:
        child.kill()
        child.join()


def olmoe(folder: Path) -> Path:
    return save_random(OlmoeForCausalLM, OlmoeConfig(**SMALL, num_hidden_layers=2, intermediate_size=20), folder)


def qwen2(folder: Path) -> Path:
    config = Qwen2MoeConfig(**SMALL, num_hidden_layers=2, moe_intermediate_size=20, shared_expert_intermediate_size=24)
    return save_random(Qwen2MoeForCausalLM, config, folder)


def partly_dense(folder: Path) -> Path:
    config = qwen3_config(num_hidden_layers=5, mlp_only_layers=[3], decoder_sparse_step=2)
    return save_random(Qwen3MoeForCausalLM, config, folder, max_shard_size="30KB")


def fuse_experts(folder: Path) -> Path:
    """Rewrite a Hub-style checkpoint with the fused 3-D tensors that transformers has in memory."""
    file = folder / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(file).items() if ".experts." not in name}
    for name, tensor in AutoModelForCausalLM.from_pretrained(folder).state_dict().items():
        if ".experts." in name:
            tensors[name] = tensor.contiguous()
    assert tensors["model.layers.2.mlp.experts.gate_up_proj"].shape == (8, 32, 32)
    save_file(tensors, file, {"format": "pt"})
    return folder


@pytest.fixture(
    params=["qwen3", "fused qwen3", "mixtral in shards", "olmoe", "qwen2_moe", "partly dense qwen3 in shards", *CHECKPOINTS]
)
def checkpoint_folder(request, qwen3, tiny_mixtral, tmp_path) -> Path:
    makers = {
        "qwen3": lambda: qwen3,
        "fused qwen3": lambda: fuse_experts(qwen3),
        "mixtral in shards": lambda: tiny_mixtral,
        "olmoe": lambda: olmoe(tmp_path / "olmoe"),
        "qwen2_moe": lambda: qwen2(tmp_path / "qwen2_moe"),
        "partly dense qwen3 in shards": lambda: partly_dense(tmp_path / "partly_dense"),
    }
    makers |= {name: partial(make, tmp_path / name) for name, make in CHECKPOINTS.items()}
    return makers[request.param]()


def as_packed(experts: Any, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
    """gate_up [2I, H], gate rows first, and down [H, I], going by what transformers says of its own layout."""
    gate_up, down = experts.gate_up_proj[expert], experts.down_proj[expert]
    if experts.is_transposed:
        gate_up, down = gate_up.T, down.T
    return gate_up if experts.is_concatenated else torch.cat([gate_up[0::2], gate_up[1::2]]), down


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_are_the_experts_transformers_loads(checkpoint_folder, pack, dtype):
    checkpoint = Checkpoint(checkpoint_folder)
    pack_experts(checkpoint, pack, dtype)
    store = ExpertStore(pack, pack_format_of(checkpoint, dtype))
    model = AutoModelForCausalLM.from_pretrained(checkpoint_folder, dtype=torch.float32)
    layers = [model.get_decoder().layers[i] for i in moe_layer_indices(model.config)]
    assert store.geometry.n_layers == len(layers) and store.geometry.n_experts == n_experts(model.config)
    for layer, module in enumerate(layers):
        for expert in range(n_experts(model.config)):
            gate_up, down = store.read_expert(ExpertKey(layer, expert))
            assert gate_up.dtype == down.dtype == dtype
            expected_gate_up, expected_down = as_packed(module.mlp.experts, expert)
            assert torch.equal(gate_up, expected_gate_up.to(dtype))
            assert torch.equal(down, expected_down.to(dtype))


def test_the_pack_is_a_safetensors_file_with_rows_on_pages(tiny_qwen3, pack):
    checkpoint = Checkpoint(tiny_qwen3)
    pack_experts(checkpoint, pack, torch.bfloat16)
    content, form = pack.read_bytes(), pack_format_of(checkpoint, torch.bfloat16)
    expert = form.geometry.expert
    with safe_open(pack, "pt") as file:
        rows, checksums, metadata = file.get_tensor("rows"), file.get_tensor("checksums"), file.metadata()
    assert rows.shape == (3, 8, 4096) and metadata["dtype"] == "bfloat16"
    assert metadata["checkpoint_fingerprint"] == checkpoint.fingerprint
    for layer in range(3):
        for index in range(8):
            offset, row = form.offset(ExpertKey(layer, index)), rows[layer, index].numpy().tobytes()
            assert offset % 4096 == 0 and content[offset : offset + expert.row_bytes] == row
            assert zlib.crc32(row) == int(checksums[layer, index])
            assert not any(row[expert.down_offset + expert.down_bytes :])


def test_packing_twice_makes_the_same_file(tiny_mixtral, pack):
    pack_experts(Checkpoint(tiny_mixtral), pack, torch.float16)
    first = pack.read_bytes()
    pack_experts(Checkpoint(tiny_mixtral), pack, torch.float16)
    assert pack.read_bytes() == first


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_named(qwen3, pack, value):
    file, name = qwen3 / "model.safetensors", "model.layers.1.mlp.experts.5.up_proj.weight"
    tensors = load_file(file)
    tensors[name][3, 4] = value
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=f"qwen3: {name} .* holds NaN or Inf"):
        pack_experts(Checkpoint(qwen3), pack, torch.float32)
    assert not list(pack.parent.iterdir())


def test_weights_too_large_for_float16_are_named(qwen3, pack):
    file, name = qwen3 / "model.safetensors", "model.layers.2.mlp.experts.0.down_proj.weight"
    tensors = load_file(file)
    tensors[name][0, 0] = -1e5
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=rf"{name} .* holds 1e\+05, too large for torch.float16; pack as bfloat16"):
        pack_experts(Checkpoint(qwen3), pack, torch.float16)
    pack_experts(Checkpoint(qwen3), pack, torch.bfloat16)


def test_a_failed_packing_leaves_the_old_pack(qwen3, pack):
    pack_experts(Checkpoint(qwen3), pack, torch.float32)
    before, file = pack.read_bytes(), qwen3 / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.2.mlp.experts.7.down_proj.weight"]
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match="no shard holds the tensor model.layers.2.mlp.experts.7.down_proj.weight"):
        pack_experts(Checkpoint(qwen3), pack, torch.float32)
    assert pack.read_bytes() == before and list(pack.parent.iterdir()) == [pack]


def test_integers_are_no_dtype_to_pack_as(tiny_qwen3, pack):
    with pytest.raises(PackError, match="cannot be packed as torch.int8; supported: torch.float32"):
        pack_experts(Checkpoint(tiny_qwen3), pack, torch.int8)


def test_too_little_disk_space_is_said_before_anything_is_written(tiny_qwen3, pack, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 5000, 5000))
    needed = pack_format_of(Checkpoint(tiny_qwen3), torch.float32).file_bytes
    with pytest.raises(PackError, match=f"{pack}: not enough disk space; the pack needs {needed} bytes .* has 5000 free"):
        pack_experts(Checkpoint(tiny_qwen3), pack, torch.float32)
    assert not list(pack.parent.iterdir())


def test_running_out_of_space_while_writing(tiny_qwen3, pack, fork, tmp_path):
    """The limit on file size makes a write fail half-way, first short and then with an error, as a full disk does."""

    def pack_with_small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        try:
            pack_experts(Checkpoint(tiny_qwen3), pack, torch.float32)
        except PackError as error:
            (tmp_path / "outcome").write_text(str(error))

    child = fork(pack_with_small_files)
    child.join(60)
    assert child.exitcode == 0
    needed = pack_format_of(Checkpoint(tiny_qwen3), torch.float32).file_bytes
    message = (tmp_path / "outcome").read_text()
    assert f"{pack}: the pack cannot be written: File too large; the pack needs {needed} bytes" in message
    assert "free" in message and not list(pack.parent.iterdir())


def pack_until_killed(checkpoint_folder: Path, folder: Path) -> None:
    """Body of a child process: pack pack-0, pack-1, ... for ever."""
    n_packs = 0
    try:
        while True:
            pack_experts(Checkpoint(checkpoint_folder), folder / f"pack-{n_packs}", torch.float32)
            n_packs += 1
    except KeyboardInterrupt:
        os._exit(42)


def stop_while_packing(pid: int, folder: Path) -> Path:
    """Stop the child at a moment when it has a pack half written; returns the partial file."""
    for _ in range(2000):
        time.sleep(0.003)
        os.kill(pid, signal.SIGSTOP)
        os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)
        partials = [path for path in folder.glob("*.partial") if path.stat().st_size > 0]
        if partials and list(folder.glob("pack-*[0-9]")):
            return partials[0]
        os.kill(pid, signal.SIGCONT)
    raise AssertionError("the child was never seen packing")


@pytest.mark.parametrize(("signal_number", "exit_code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 42)])
def test_stopped_while_packing(tiny_qwen3, tmp_path, fork, signal_number, exit_code):
    child = fork(lambda: pack_until_killed(tiny_qwen3, tmp_path))
    partial = stop_while_packing(child.pid, tmp_path)
    os.kill(child.pid, signal_number)
    os.kill(child.pid, signal.SIGCONT)
    child.join(60)
    assert child.exitcode == exit_code
    form = pack_format_of(Checkpoint(tiny_qwen3), torch.float32)
    for complete in tmp_path.glob("pack-*[0-9]"):
        ExpertStore(complete, form).verify()
    # Nobody can tidy up after SIGKILL; the next packing takes over what is left.
    assert partial.exists() == (signal_number == signal.SIGKILL)
    unfinished = partial.with_suffix("")
    pack_experts(Checkpoint(tiny_qwen3), unfinished, torch.float32)
    ExpertStore(unfinished, form).verify()
    assert not list(tmp_path.glob("*.partial"))


def test_a_leftover_longer_than_the_pack_is_overwritten(tiny_qwen3, pack):
    pack.parent.mkdir()
    pack.with_name(pack.name + ".partial").write_bytes(b"x" * 10**6)
    pack_experts(Checkpoint(tiny_qwen3), pack, torch.float32)
    ExpertStore(pack, pack_format_of(Checkpoint(tiny_qwen3), torch.float32)).verify()
    assert list(pack.parent.iterdir()) == [pack]


def test_a_second_process_waits_and_keeps_the_first_ones_pack(tiny_qwen3, pack, fork):
    """The first packer is frozen in mid-write: the second must neither finish nor touch the file until it goes on."""

    class StopsItself(Checkpoint):
        def read(self, name, shape, index=None):
            if name == "model.layers.1.mlp.experts.0.gate_proj.weight":
                os.kill(os.getpid(), signal.SIGSTOP)
            return super().read(name, shape, index)

    first = fork(lambda: pack_experts(StopsItself(tiny_qwen3), pack, torch.float32))
    os.waitid(os.P_PID, first.pid, os.WSTOPPED | os.WNOWAIT)
    partial = pack.with_name(pack.name + ".partial")
    inode, size = partial.stat().st_ino, partial.stat().st_size
    others = [fork(lambda: pack_experts(Checkpoint(tiny_qwen3), pack, torch.float32)) for _ in range(3)]
    time.sleep(0.3)
    assert all(other.is_alive() for other in others)
    assert (partial.stat().st_ino, partial.stat().st_size) == (inode, size) and not pack.exists()
    os.kill(first.pid, signal.SIGCONT)
    for process in [first, *others]:
        process.join(60)
        assert process.exitcode == 0
    assert pack.stat().st_ino == inode  # nobody packed it again
    ExpertStore(pack, pack_format_of(Checkpoint(tiny_qwen3), torch.float32)).verify()
    assert list(pack.parent.iterdir()) == [pack]


def test_a_folder_that_cannot_be_written_is_named(tiny_qwen3, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(PackError, match="file/pack: the pack cannot be written"):
        pack_experts(Checkpoint(tiny_qwen3), tmp_path / "file" / "pack", torch.float32)


def test_no_file_stays_open_after_failures(qwen3, pack):
    config = json.loads((qwen3 / "config.json").read_text())
    (qwen3 / "config.json").write_text(json.dumps(config | {"moe_intermediate_size": 17}))
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(CheckpointError, match=r"has shape \[16, 32\]; config.json asks for \[17, 32\]"):
        pack_experts(Checkpoint(qwen3), pack, torch.float32)
    assert len(os.listdir("/proc/self/fd")) == before
