"""The store: when it packs, and that no damaged byte of a pack is taken for an expert."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import Qwen3MoeForCausalLM

from prefetch import pack_format
from prefetch.errors import PackError, UnsupportedModelError
from prefetch.geometry import ExpertKey
from prefetch.store import ExpertStore
from tests.conftest import qwen3_config, save_random

LAST = ExpertKey(2, 7)


@pytest.fixture
def qwen3(tiny_qwen3: Path, tmp_path: Path) -> Path:
    """A copy that may be changed."""
    return Path(shutil.copytree(tiny_qwen3, tmp_path / "qwen3"))


@pytest.fixture
def packs(tmp_path: Path) -> Path:
    return tmp_path / "packs"


def flip_bit(path: Path, offset: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))


def test_packs_once_and_opens_what_is_there(qwen3, packs):
    first = ExpertStore.open(qwen3, torch.float32, packs)
    before = first.path.stat()
    second = ExpertStore.open(qwen3, torch.float32, packs, verify=True)
    assert (second.path, second.fingerprint, second.geometry) == (first.path, first.fingerprint, first.geometry)
    assert (second.path.stat().st_ino, second.path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert list(packs.iterdir()) == [first.path]


def test_a_dtype_has_a_pack_of_its_own(qwen3, packs):
    paths = {ExpertStore.open(qwen3, dtype, packs).path for dtype in (torch.float32, torch.bfloat16)}
    assert set(packs.iterdir()) == paths and len(paths) == 2


def test_checkpoints_of_the_same_name_do_not_share_a_pack(qwen3, tmp_path, packs):
    namesake = Path(shutil.copytree(qwen3, tmp_path / "other" / "qwen3"))
    assert ExpertStore.open(qwen3, torch.float32, packs).path != ExpertStore.open(namesake, torch.float32, packs).path


def test_a_retrained_checkpoint_is_packed_again(qwen3, packs):
    old = ExpertStore.open(qwen3, torch.float32, packs)
    stale = old.read_row(LAST)
    save_random(Qwen3MoeForCausalLM, qwen3_config(initializer_range=0.3), qwen3)
    new = ExpertStore.open(qwen3, torch.float32, packs)
    assert new.fingerprint != old.fingerprint and not torch.equal(new.read_row(LAST), stale)
    assert list(packs.iterdir()) == [new.path] == [old.path]
    with pytest.raises(PackError, match="layer 2 expert 7"):
        old.read_row(LAST)  # the open store notices that its file has been replaced


def test_an_edited_tensor_is_packed_again_even_where_samples_miss_it(qwen3, packs):
    store = ExpertStore.open(qwen3, torch.float32, packs)
    inode = store.path.stat().st_ino
    os.utime(qwen3 / "model.safetensors")
    again = ExpertStore.open(qwen3, torch.float32, packs)
    assert again.fingerprint == store.fingerprint and again.path.stat().st_ino != inode


def test_a_pack_of_another_version_is_packed_again(qwen3, packs, monkeypatch):
    inode = ExpertStore.open(qwen3, torch.float32, packs).path.stat().st_ino
    monkeypatch.setattr(pack_format, "VERSION", "0")
    assert ExpertStore.open(qwen3, torch.float32, packs, verify=True).path.stat().st_ino != inode


def test_rows_are_page_aligned_and_views_share_their_memory(tiny_qwen3, packs):
    store = ExpertStore.open(tiny_qwen3, torch.bfloat16, packs)
    row = store.read_row(ExpertKey(1, 2))
    gate_up, down = store.views(row)
    assert row.dtype == torch.uint8 and row.shape == (store.row_bytes,) and row.data_ptr() % 4096 == 0
    assert gate_up.shape == (32, 32) and down.shape == (32, 16)
    assert gate_up.data_ptr() == row.data_ptr()
    assert down.data_ptr() == row.data_ptr() + store.geometry.expert.down_offset


def test_every_offset_is_a_multiple_of_4096_and_rows_do_not_overlap(tiny_mixtral, packs):
    store = ExpertStore.open(tiny_mixtral, torch.float16, packs)
    offsets = [store.offset(ExpertKey(layer, expert)) for layer in range(2) for expert in range(4)]
    assert all(offset % 4096 == 0 for offset in offsets) and store.row_bytes % 4096 == 0
    assert [later - offset for offset, later in zip(offsets, offsets[1:], strict=False)] == [store.row_bytes] * 7


@pytest.mark.parametrize("keep", [0, 100, 4096, 100_000, -1])
def test_a_truncated_pack_is_found_when_opened(qwen3, packs, keep):
    path = ExpertStore.open(qwen3, torch.float32, packs).path
    n_packed = path.stat().st_size
    n_left = keep if keep >= 0 else n_packed + keep
    os.truncate(path, n_left)
    with pytest.raises(PackError, match=f"{path.name}: it has {n_left} bytes, {n_packed} were packed.*remove it"):
        ExpertStore.open(qwen3, torch.float32, packs)
    path.unlink()
    ExpertStore.open(qwen3, torch.float32, packs, verify=True)


def test_a_pack_truncated_or_removed_while_in_use(qwen3, packs):
    store = ExpertStore.open(qwen3, torch.float32, packs)
    os.truncate(store.path, store.offset(LAST) + 10)
    store.read_row(ExpertKey(2, 6))
    with pytest.raises(PackError, match=f"layer 2 expert 7 at offset {store.offset(LAST)}: the file ends after 10 of 8192"):
        store.read_row(LAST)
    store.path.unlink()
    with pytest.raises(PackError, match="layer 2 expert 7 .* cannot be read: No such file"):
        store.read_expert(LAST)


def test_a_flipped_bit_is_found_by_whoever_reads_the_row(qwen3, packs):
    store = ExpertStore.open(qwen3, torch.float32, packs)
    damaged, offset = ExpertKey(1, 3), store.offset(ExpertKey(1, 3))
    intact = bytes(store.read_row(damaged).numpy())
    flip_bit(store.path, offset + 77)

    def reopen(verify: bool) -> ExpertStore:
        return ExpertStore.open(qwen3, torch.float32, packs, verify=verify)

    message = f"{store.path.name}: layer 1 expert 3 at offset {offset}: its CRC-32 is .* remove it"
    for read in (lambda: store.read_row(damaged), store.verify, lambda: reopen(True)):
        with pytest.raises(PackError, match=message):
            read()
    reopen(False).read_row(ExpertKey(1, 4))
    store.check_row(damaged, intact)
    with pytest.raises(PackError, match=message):
        store.check_row(damaged, memoryview(store.path.read_bytes())[offset : offset + store.row_bytes])


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.floats(0, 1, exclude_max=True))
def test_no_flipped_bit_anywhere_reaches_an_expert(tiny_qwen3, packs, position):
    store = ExpertStore.open(tiny_qwen3, torch.bfloat16, packs)
    intact = store.path.read_bytes()
    offset = int(position * len(intact))
    flip_bit(store.path, offset)
    if offset < store.offset(ExpertKey(0, 0)):  # the header: it is not known as this checkpoint's pack any more
        ExpertStore.open(tiny_qwen3, torch.bfloat16, packs)
    else:
        with pytest.raises(PackError, match="CRC-32"):
            ExpertStore.open(tiny_qwen3, torch.bfloat16, packs, verify=True)
        flip_bit(store.path, offset)
    assert store.path.read_bytes() == intact


def test_something_else_at_the_packs_place(qwen3, packs):
    path = ExpertStore.open(qwen3, torch.float32, packs).path
    path.unlink()
    path.mkdir()
    with pytest.raises(PackError, match=f"{path.name}: cannot be read: Is a directory"):
        ExpertStore.open(qwen3, torch.float32, packs)


def test_an_unsupported_architecture_is_refused_before_anything_is_written(qwen3, packs):
    config = qwen3 / "config.json"
    config.write_text(config.read_text().replace('"qwen3_moe"', '"llama"'))
    with pytest.raises(UnsupportedModelError, match="'llama' is not supported"):
        ExpertStore.open(qwen3, torch.float32, packs)
    assert not packs.exists()


def test_no_file_stays_open(tiny_mixtral, packs):
    before = len(os.listdir("/proc/self/fd"))
    store = ExpertStore.open(tiny_mixtral, torch.float32, packs, verify=True)
    row = store.read_row(ExpertKey(1, 3))
    assert row.numel() == store.row_bytes and len(os.listdir("/proc/self/fd")) == before
