"""Collected hidden states are what the routers saw: applying the routers to them gives the recorded routing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from prefetch.trace import RoutingTrace

REPOSITORY = Path(__file__).parents[2]


def test_shards_hold_what_the_routers_saw(tmp_path: Path) -> None:
    overrides = ["collect.hidden_states=true", "collect.shard_rows=50", "workload.n_prompts=2", "workload.new_tokens=6"]
    done = subprocess.run(
        [sys.executable, "-m", "experiments.collect", *overrides, "workload.max_prompt_tokens=64", f"hydra.run.dir={tmp_path}"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        env=dict(os.environ),
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    trace = RoutingTrace.load(tmp_path / "trace.safetensors")
    shards = [load_file(path) for path in sorted(tmp_path.glob("hidden-*.safetensors"))]
    assert all(len(shard["hidden"]) <= 50 for shard in shards)
    hidden, residual = (torch.cat([shard[name] for shard in shards]) for name in ("hidden", "residual"))
    assert len(hidden) == trace.n_tokens == 2 * (64 + 5)
    model = AutoModelForCausalLM.from_pretrained(REPOSITORY / "models" / "bytes-moe", dtype=torch.float32)
    for index, layer in enumerate(model.model.layers):
        torch.testing.assert_close(layer.post_attention_layernorm(residual[:, index]), hidden[:, index])
        _, _, ids = layer.mlp.gate(hidden[:, index])
        chosen = torch.from_numpy(trace.topk_ids[:, index].astype("int64"))
        assert (ids.sort(-1).values == chosen.sort(-1).values).float().mean() > 0.999  # ties within rounding aside
