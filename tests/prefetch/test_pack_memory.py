"""A model whose experts are several times larger than the memory a process may have is packed and decoded with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from tests.conftest import qwen3_config

N_LAYERS, N_EXPERTS, HIDDEN, INTERMEDIATE = 8, 16, 1024, 1536
CHECKPOINT_BYTES = N_LAYERS * N_EXPERTS * 3 * HIDDEN * INTERMEDIATE * 2  # bfloat16: 1.2 GB
HEADROOM_BYTES = 50_000_000  # on top of what the interpreter has after its imports

PACK_AND_DECODE = """
import re, resource, sys
from pathlib import Path
import torch
from prefetch.cache.slru import Slru
from prefetch.compute.torch_experts import TorchExperts
from prefetch.fast_tier import FastTier
from prefetch.geometry import ExpertKey
from prefetch.model import attach, load_offloaded
from prefetch.planner.top_m import TopM
from prefetch.runtime import OffloadRuntime
from prefetch.slots import SlotPool
from prefetch.store import ExpertStore
from prefetch.transfers.sources import DiskSource
from prefetch.transfers.threads import ThreadTransfers
from predictors.gate_reuse import GateReuse

torch.set_num_threads(1)
torch.nn.functional.linear(torch.ones(1, 64), torch.ones(64, 64))  # whatever the libraries set aside
folder, packs, headroom, checkpoint_bytes = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])

def status_bytes(field):
    return int(re.search(field + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

limit = status_bytes("VmData") + headroom
resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))
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

resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY,) * 2)  # it would count shards that are merely mapped
pool = SlotPool(store.geometry, 6)
transfers = ThreadTransfers(DiskSource(store.path, store.offset, store.row_bytes), pool.buffer, n_threads=1, chunk_bytes=1 << 20)
tier = FastTier(pool, Slru(2), transfers, staging=2, transient=2)
runtime = OffloadRuntime(store.geometry, tier, GateReuse(), TopM(), store.read_expert, TorchExperts(pool))
model = load_offloaded(folder, torch.bfloat16)
with attach(model, runtime):
    tokens = model.generate(torch.tensor([[1, 2, 3]]), attention_mask=torch.ones(1, 3), max_new_tokens=6, do_sample=False)
transfers.close()
calls = runtime.record().calls
assert calls["needed"].sum() >= 6 * store.geometry.n_layers * 2 and calls["misses"].sum() > 0
print(limit, status_bytes("VmHWM"), *tokens[0].tolist())  # unlike ru_maxrss, VmHWM does not begin at the parent's size
"""


def write_sparse_layer(path: Path, layer: int) -> list[str]:
    """One shard: all experts of a layer, zeros (holes in the file) but for a mark in the first and last weight of each
    expert's gate, up and down. Returns the tensors' names."""
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
    return list(header)


def write_rest(path: Path, config: Qwen3MoeConfig) -> list[str]:
    """One shard: every weight but the experts', random. Returns the tensors' names."""
    small = Qwen3MoeConfig(**{**config.to_dict(), "moe_intermediate_size": 1})  # the rest does not depend on it
    with torch.random.fork_rng():
        torch.manual_seed(0)
        weights = Qwen3MoeForCausalLM(small).to(torch.bfloat16).state_dict()
    rest = {name: weight for name, weight in weights.items() if ".experts." not in name}
    save_file(rest, path, {"format": "pt"})
    return list(rest)


def test_experts_larger_than_memory(tmp_path):
    folder, packs = tmp_path / "large", tmp_path / "packs"
    config = qwen3_config(
        hidden_size=HIDDEN, moe_intermediate_size=INTERMEDIATE, num_hidden_layers=N_LAYERS, num_experts=N_EXPERTS
    )
    config.save_pretrained(folder)
    weight_map = dict.fromkeys(write_rest(folder / "rest.safetensors", config), "rest.safetensors")
    for layer in range(N_LAYERS):
        shard = f"experts-{layer}.safetensors"
        weight_map |= dict.fromkeys(write_sparse_layer(folder / shard, layer), shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    arguments = [str(folder), str(packs), str(HEADROOM_BYTES), str(CHECKPOINT_BYTES)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    child = subprocess.run(
        [sys.executable, "-c", PACK_AND_DECODE, *arguments], env=environment, capture_output=True, text=True, timeout=120
    )
    assert child.returncode == 0, child.stderr
    limit_bytes, peak_bytes, *tokens = map(int, child.stdout.split())
    assert len(tokens) == 3 + 6
    (pack,) = packs.iterdir()
    assert pack.stat().st_size > CHECKPOINT_BYTES > 2 * limit_bytes  # 3.2 times with a CPU build of torch
    assert 1.5 * peak_bytes < CHECKPOINT_BYTES  # 2.2 times; all that was ever resident, the libraries' code included
    pack.unlink()
