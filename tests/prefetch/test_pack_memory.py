"""Experts several times larger than the memory a process may have are packed and read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from tests.conftest import qwen3_config

N_LAYERS, N_EXPERTS, HIDDEN, INTERMEDIATE = 6, 16, 1024, 1536
CHECKPOINT_BYTES = N_LAYERS * N_EXPERTS * 3 * HIDDEN * INTERMEDIATE * 2  # bfloat16: 0.9 GB
HEADROOM_BYTES = 50_000_000  # on top of what the interpreter has after its imports

PACK_AND_READ = """
import re, resource, sys
from pathlib import Path
import torch
from prefetch.geometry import ExpertKey
from prefetch.store import ExpertStore

torch.set_num_threads(1)
folder, packs, headroom, checkpoint_bytes = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])

def data_bytes():
    return int(re.search(r"VmData:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

limit = data_bytes() + headroom
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
try:
    torch.empty(checkpoint_bytes, dtype=torch.uint8)
    sys.exit("the limit does not bite")
except RuntimeError:
    pass

store = ExpertStore.open(folder, torch.bfloat16, packs)
for layer in range(store.geometry.n_layers):
    for expert in range(store.geometry.n_experts):
        gate_up, down = store.read_expert(ExpertKey(layer, expert))
        mark = layer * store.geometry.n_experts + expert + 1
        marks = [gate_up[0, 0], gate_up[-1, -1], down[0, 0], down[-1, -1]]
        assert [float(value) for value in marks] == [mark, -mark, mark, -mark], (layer, expert, marks)
print(limit)
"""


def write_sparse_layer(path: Path, layer: int) -> None:
    """One shard: all experts of a layer, zeros (holes in the file) but for a mark in the first and last weight of each
    expert's gate, up and down."""
    header, data_end, marks = {}, 0, {}
    for expert in range(N_EXPERTS):
        mark = layer * N_EXPERTS + expert + 1
        for name, shape, first, last in [
            ("gate_proj", [INTERMEDIATE, HIDDEN], mark, 0),
            ("up_proj", [INTERMEDIATE, HIDDEN], 0, -mark),
            ("down_proj", [HIDDEN, INTERMEDIATE], mark, -mark),
        ]:
            n_bytes = 2 * HIDDEN * INTERMEDIATE
            full_name = f"model.layers.{layer}.mlp.experts.{expert}.{name}.weight"
            header[full_name] = {"dtype": "BF16", "shape": shape, "data_offsets": [data_end, data_end + n_bytes]}
            marks[data_end], marks[data_end + n_bytes - 2] = first, last
            data_end += n_bytes
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for offset, mark in marks.items():
            file.seek(8 + len(text) + offset)
            file.write(torch.tensor([mark], dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes())


def test_experts_larger_than_memory(tmp_path):
    folder, packs = tmp_path / "large", tmp_path / "packs"
    qwen3_config(
        hidden_size=HIDDEN, moe_intermediate_size=INTERMEDIATE, num_hidden_layers=N_LAYERS, num_experts=N_EXPERTS
    ).save_pretrained(folder)
    shards = [f"model-{layer + 1:05}-of-{N_LAYERS:05}.safetensors" for layer in range(N_LAYERS)]
    for layer, shard in enumerate(shards):
        write_sparse_layer(folder / shard, layer)
    weight_map = {f"any name, only shards count {shard}": shard for shard in shards}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    arguments = [str(folder), str(packs), str(HEADROOM_BYTES), str(CHECKPOINT_BYTES)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    child = subprocess.run(
        [sys.executable, "-c", PACK_AND_READ, *arguments], env=environment, capture_output=True, text=True, timeout=120
    )
    assert child.returncode == 0, child.stderr
    limit_bytes = int(child.stdout)
    (pack,) = packs.iterdir()
    assert pack.stat().st_size > CHECKPOINT_BYTES > 2 * limit_bytes  # 3.6 times with a CPU build of torch
    pack.unlink()
