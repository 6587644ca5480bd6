"""Checkpoint reading against safetensors' own reader, and every way a folder can be broken."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from prefetch.checkpoint import Checkpoint
from prefetch.errors import CheckpointError, GatecastError, UnsupportedModelError


@pytest.fixture
def qwen3(tiny_qwen3: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(tiny_qwen3, tmp_path / "qwen3"))


@pytest.fixture
def mixtral(tiny_mixtral: Path, tmp_path: Path) -> Path:
    """A copy, in shards, that may be damaged."""
    return Path(shutil.copytree(tiny_mixtral, tmp_path / "mixtral"))


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for shard in folder.glob("*.safetensors") for name, tensor in load_file(shard).items()}


@pytest.mark.parametrize("fixture", ["qwen3", "mixtral"])
def test_reads_what_safetensors_reads(fixture, request):
    folder = request.getfixturevalue(fixture)
    checkpoint, expected = Checkpoint(folder), tensors_of(folder)
    assert len(expected) > 30
    for name, tensor in expected.items():
        assert name in checkpoint
        read = checkpoint.read(name, tuple(tensor.shape))
        assert read.dtype == tensor.dtype and torch.equal(read, tensor)
    assert "model.absent" not in checkpoint


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_reads_one_entry_of_a_fused_tensor(qwen3, dtype):
    fused = torch.randn(5, 6, 7).to(dtype)
    save_file({"before": torch.randn(3), "fused": fused, "later": torch.randn(4)}, qwen3 / "model.safetensors")
    checkpoint = Checkpoint(qwen3)
    for index in range(5):
        read = checkpoint.read("fused", (5, 6, 7), index=index)
        assert read.dtype == dtype and torch.equal(read, fused[index])


def test_absent_tensor_wrong_shape_and_integer_weights_are_named(qwen3):
    save_file({"quantised": torch.zeros(2, 3, dtype=torch.int8)}, qwen3 / "model.safetensors")
    checkpoint = Checkpoint(qwen3)
    with pytest.raises(CheckpointError, match="qwen3: no shard holds the tensor absent.weight"):
        checkpoint.read("absent.weight", (1,))
    with pytest.raises(CheckpointError, match=r"quantised has shape \[2, 3\]; config.json asks for \[3, 2\]"):
        checkpoint.read("quantised", (3, 2))
    with pytest.raises(CheckpointError, match="quantised has dtype I8, not one of F64, F32, F16, BF16"):
        checkpoint.read("quantised", (2, 3))


def test_broken_configurations_are_one_clear_error(qwen3):
    config = qwen3 / "config.json"
    for content, error, message in [
        ("{", CheckpointError, "is not valid JSON"),
        ("[]", CheckpointError, "is not a JSON object"),
        ('{"model_type": "nonesuch"}', UnsupportedModelError, "nonesuch"),
        ("{}", UnsupportedModelError, "model_type"),
        ('{"model_type": "qwen3_moe", "hidden_size": "wide"}', CheckpointError, "hidden_size.*'wide'"),
    ]:
        config.write_text(content)
        with pytest.raises(error, match=f"config.json.*{message}") as caught:
            Checkpoint(qwen3)
        assert "\n" not in str(caught.value)
    config.unlink()
    with pytest.raises(CheckpointError, match="config.json is missing"):
        Checkpoint(qwen3)


def test_a_folder_without_safetensors_is_refused(qwen3):
    (qwen3 / "model.safetensors").rename(qwen3 / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="only safetensors can be read"):
        Checkpoint(qwen3)


def test_a_missing_shard_is_named(mixtral):
    (mixtral / "model-00002-of-00005.safetensors").unlink()
    with pytest.raises(CheckpointError, match="names 5 shards, 1 are missing: model-00002-of-00005.safetensors"):
        Checkpoint(mixtral)


def test_an_index_that_names_an_absent_shard_or_nothing_is_refused(mixtral):
    index = mixtral / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["lm_head.weight"] = "model-00009-of-00005.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="index.json names 6 shards, 1 are missing: model-00009"):
        Checkpoint(mixtral)
    index.write_text('{"metadata": {}}')
    with pytest.raises(CheckpointError, match="no 'weight_map'"):
        Checkpoint(mixtral)


@pytest.mark.parametrize("keep", [0, 5, 8, 100, -4096, -1])
def test_a_truncated_shard_is_found_at_once(mixtral, keep):
    shard = mixtral / "model-00003-of-00005.safetensors"
    os.truncate(shard, keep if keep >= 0 else shard.stat().st_size + keep)
    with pytest.raises(CheckpointError, match=f"{shard.name}.*fetch"):
        Checkpoint(mixtral)


def test_a_shard_cut_short_while_in_use_is_an_error_not_a_crash(qwen3):
    checkpoint, expected = Checkpoint(qwen3), tensors_of(qwen3)
    os.truncate(qwen3 / "model.safetensors", 9000)
    name = "model.layers.2.mlp.experts.7.up_proj.weight"
    with pytest.raises(CheckpointError, match="model.safetensors: it ends at byte .* cut short while in use"):
        checkpoint.read(name, tuple(expected[name].shape))
    (qwen3 / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model.safetensors: cannot be read: No such file"):
        checkpoint.read(name, tuple(expected[name].shape))


def test_a_git_lfs_pointer_says_so(qwen3):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 215960\n"
    (qwen3 / "model.safetensors").write_text(pointer)
    with pytest.raises(CheckpointError, match="Git LFS pointer.*git lfs pull"):
        Checkpoint(qwen3)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_damage_to_a_header_escapes_as_another_error(tiny_qwen3, tmp_path_factory, data):
    content = bytearray((tiny_qwen3 / "model.safetensors").read_bytes())
    n_header = int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, n_header + 7))] = data.draw(st.integers(0, 255))
    folder = tmp_path_factory.mktemp("damaged")
    shutil.copy(tiny_qwen3 / "config.json", folder)
    (folder / "model.safetensors").write_bytes(content)
    try:
        checkpoint = Checkpoint(folder)
        checkpoint.read("model.norm.weight", (32,))
    except GatecastError as error:
        assert str(folder) in str(error)
    finally:
        shutil.rmtree(folder)


def test_the_fingerprint_survives_a_move(mixtral, tmp_path):
    moved = Path(shutil.copytree(mixtral, tmp_path / "elsewhere", copy_function=shutil.copyfile))
    assert Checkpoint(moved).fingerprint == Checkpoint(mixtral).fingerprint


def test_the_fingerprint_tells_retrained_renamed_and_reconfigured_checkpoints_apart(qwen3):
    def scale_all(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensor * 1.001 for name, tensor in tensors.items()}

    file, seen = qwen3 / "model.safetensors", {Checkpoint(qwen3).fingerprint}
    save_file(scale_all(load_file(file)), file)
    seen.add(Checkpoint(qwen3).fingerprint)
    tensors = load_file(file)
    tensors["lm_head.renamed"] = tensors.pop("lm_head.weight")
    save_file(tensors, file)
    seen.add(Checkpoint(qwen3).fingerprint)
    config = json.loads((qwen3 / "config.json").read_text())
    (qwen3 / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    seen.add(Checkpoint(qwen3).fingerprint)
    assert len(seen) == 4


def test_modified_ns_is_that_of_the_newest_shard(mixtral):
    shard = mixtral / "model-00004-of-00005.safetensors"
    os.utime(shard, ns=(1, 2**62))
    assert Checkpoint(mixtral).modified_ns == 2**62


def test_no_file_stays_open(mixtral):
    def n_open() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = n_open()
    checkpoint = Checkpoint(mixtral)
    checkpoint.read("model.norm.weight", (32,))
    assert checkpoint.fingerprint and n_open() == before
    os.truncate(mixtral / "model-00005-of-00005.safetensors", 50)
    with pytest.raises(CheckpointError):
        Checkpoint(mixtral)
    assert n_open() == before


def test_quantised_weights_are_refused(tiny_qwen3, tmp_path):
    folder = Path(shutil.copytree(tiny_qwen3, tmp_path / "fp8"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match=r"its weights are quantised \(fp8\).*bfloat16"):
        Checkpoint(folder)
