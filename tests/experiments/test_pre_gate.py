"""Pre-gated copies of a checkpoint, from the command to the live run: what is tuned, what is written, what it is called."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig
from safetensors.torch import load_file
from transformers import Qwen3MoeForCausalLM

from experiments.config import REPOSITORY, register
from experiments.pre_gate import PreGateConfig, _with_heads, pre_gate
from experiments.pre_gate_tuning import TuningOptions, random_windows, tune
from experiments.results import Results
from experiments.text_quality import TextQuality, relative_change, spread_windows, text_quality
from experiments.train import load_model_view
from predictors.base import ModelView
from predictors.fitting import FitOptions, fit
from predictors.pre_gate import PreGate
from prefetch.checkpoint import Checkpoint
from prefetch.errors import CheckpointError, ConfigError, PredictorError
from prefetch.families import family_of, moe_geometry
from prefetch.model import load_offloaded, load_whole, model_view
from prefetch.pre_gate import read_pre_gates
from scripts.bundled_corpus import Corpus
from scripts.bundled_evaluation import bits_per_byte
from tests.conftest import qwen3_config, save_random
from tests.predictors.synthetic_run import make_run, views_per_layer

BUNDLED = REPOSITORY / "models" / "bytes-moe"
TEXT = Corpus({"a": bytes(range(32, 127)) * 9, "b": b"to be or not to be", "c": b"x" * 300})


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model that reads bytes: `qwen3_config` with the bundled model's tokenizer."""
    folder = save_random(Qwen3MoeForCausalLM, qwen3_config(vocab_size=264), tmp_path_factory.mktemp("model") / "tiny-bytes")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUNDLED / name, folder)
    return folder


def configured(source: Path, output: Path, *overrides: str) -> DictConfig:
    register()
    ConfigStore.instance().store(name="pre_gate_schema", node=PreGateConfig)
    quick = ["tuning.steps=2", "tuning.batch=2", "tuning.window=32", "scored_bytes=600", "tracking=disabled", "n_threads=1"]
    where = ["model=local", f"model.path={source}", f"output={output}"]
    with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
        return compose("pre_gate", overrides=[*where, *quick, *overrides])


@pytest.fixture(scope="module")
def routed(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("routed")
    pre_gate(configured(tiny, folder / "checkpoint"), folder)
    return folder


def view_of(folder: Path) -> ModelView:
    model = load_offloaded(folder, torch.float32).requires_grad_(False)
    return model_view(model, family_of(model.config), moe_geometry(model.config, torch.float32))


@pytest.fixture(scope="module")
def head_weights(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads for the tiny model at level 1, trained on noise: what they know does not matter here."""
    model = view_of(tiny)
    random = torch.Generator().manual_seed(0)
    views = []
    for layer, view in enumerate(views_per_layer(make_run())[: model.n_layers]):
        hidden = torch.randn(len(view.token_ids), model.hidden_size, generator=random)
        top = model.router_logits[layer](hidden).softmax(-1).topk(model.top_k)
        views.append(dataclasses.replace(view, hidden=hidden, topk_ids=top.indices, topk_weights=top.values))
    predictor = PreGate()
    fit(predictor, model, views, views, FitOptions(epochs=1, batch_rows=8))
    path = tmp_path_factory.mktemp("weights") / "pre_gate.safetensors"
    predictor.save(path, {}, torch.float32)
    return path


def decode(folder: Path, model: Path, *overrides: str) -> tuple[Results, str]:
    """A small live run in a process of its own; its results and what it said."""
    sizes = [
        "workload.n_prompts=2",
        "workload.new_tokens=12",
        "workload.max_prompt_tokens=24",
        "cache.slots=14",
        "cache.staging=4",
    ]
    where = ["model=local", f"model.path={model}", "model.dtype=float32", f"model.pack_dir={folder / 'packs'}"]
    arms = [f"arms.{name}=null" for name in ("on_demand", "oracle", "resident")]
    done = subprocess.run(
        [sys.executable, "-m", "experiments.decode", *where, *sizes, *arms, "repeats=1", "tracking=disabled",
         f"hydra.run.dir={folder / 'run'}", *overrides],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=240, env=dict(os.environ),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return Results.load(folder / "run"), " ".join(done.stderr.split())


def test_routed_it_runs_live_with_right_prefetches_only_and_is_called_lossy(routed: Path, tmp_path: Path) -> None:
    results, said = decode(tmp_path, routed / "checkpoint")
    assert "level 1, route" in said and "lossy" in said
    assert not any(arm.lossless for arm in results.arms.values())
    predicted = results.arms["predicted"]
    assert predicted.quality is not None and predicted.quality.decode()["recall"] == 1.0
    assert predicted.values("wasted_bytes_per_token") == [0.0]


def test_hints_are_used_unless_another_predictor_is_asked_for_and_stay_lossless(
    tiny: Path, head_weights: Path, tmp_path: Path
) -> None:
    pre_gate(configured(tiny, tmp_path / "hint", "mode=hint", f"weights={head_weights}"), tmp_path)
    assert json.loads((tmp_path / "results.json").read_text())["lossless"] is True
    other = "+arms.asked=['predictor=popularity']"
    results, said = decode(tmp_path, tmp_path / "hint", other)
    assert "level 1, hint" in said and "lossy" not in said
    assert all(arm.lossless for arm in results.arms.values())
    own, asked = (results.arms[name].quality for name in ("predicted", "asked"))
    assert own is not None and asked is not None and own.decode()["recall"] != asked.decode()["recall"]


def test_heads_alone_leave_every_other_weight(tiny: Path, routed: Path) -> None:
    before = load_file(tiny / "model.safetensors")
    after = {name: t for shard in (routed / "checkpoint").glob("*.safetensors") for name, t in load_file(shard).items()}
    new = {f"model.layers.{layer}.mlp.pre_gate.weight" for layer in (0, 1)}
    assert set(after) - set(before) == new
    assert all(torch.equal(after[name], before[name]) for name in before)
    found = json.loads((routed / "results.json").read_text())
    assert found["lossless"] is False and found["parameters_tuned"] == 2 * 8 * 32
    assert set(found["quality"]) == {"held_out", "shifted"}


def test_all_weights_may_be_tuned(tiny: Path, tmp_path: Path) -> None:
    pre_gate(configured(tiny, tmp_path / "checkpoint", "tune=all", "level=2"), tmp_path)
    pre_gates = read_pre_gates(Checkpoint(tmp_path / "checkpoint"))
    assert pre_gates is not None and (pre_gates.level, len(pre_gates.heads)) == (2, 1)
    model, original = (load_whole(folder, torch.float32) for folder in (tmp_path / "checkpoint", tiny))
    assert torch.equal(model.model.layers[2].mlp.gate.weight, pre_gates.heads[0].float())
    assert not torch.equal(model.model.embed_tokens.weight, original.model.embed_tokens.weight.bfloat16().float())
    kept = Qwen3MoeForCausalLM.from_pretrained(tmp_path / "checkpoint", dtype=torch.bfloat16).model.layers[2].mlp.gate.weight
    assert torch.equal(kept, original.model.layers[2].mlp.gate.weight.bfloat16())


def test_tuning_learns_and_repeats_itself(tiny: Path) -> None:
    tokens = torch.tensor(list(b"the cat sat on the mat. " * 60))
    options = TuningOptions(steps=30, batch=4, window=48, learning_rate=3e-2)
    runs = []
    for _ in range(2):
        model, _, heads = _with_heads(tiny, 1)
        frozen = {name: p.clone() for name, p in model.named_parameters() if all(p is not head for head in heads)}
        runs.append((tune(model, heads, "heads", tokens, options), [head.detach().clone() for head in heads]))
        now = dict(model.named_parameters())
        assert all(torch.equal(now[name], p) for name, p in frozen.items())
    assert runs[0][0] == runs[1][0] and all(map(torch.equal, runs[0][1], runs[1][1]))
    losses = torch.tensor(runs[0][0])
    assert losses[-5:].mean() < losses[:5].mean() - 0.02
    assert all(not torch.equal(a, b) for a, b in zip(runs[0][1], _with_heads(tiny, 1)[2], strict=True))


@pytest.mark.parametrize("frozen", [True, False])
def test_gradients_of_heads_are_those_of_plain_transformers(frozen: bool, tiny: Path) -> None:
    """Training computes experts in bf16 and, where they are frozen, leaves their gradients out."""
    tokens = torch.randint(256, (2, 40), generator=torch.Generator().manual_seed(3))
    gradients = []
    for implementation in ("eager", "sorted_training"):
        model, _, heads = _with_heads(tiny, 1)
        model.set_experts_implementation(implementation)
        model.requires_grad_(not frozen)
        for head in heads:
            head.requires_grad_(True)
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        gradients.append(torch.cat([head.grad.flatten() for head in heads]))
        assert all((p.grad is None) == frozen for n, p in model.named_parameters() if n.endswith("experts.down_proj"))
    assert float(torch.nn.functional.cosine_similarity(*gradients, dim=0)) > 0.99


def test_windows_are_pieces_of_the_text() -> None:
    options = TuningOptions(batch=50, window=4)
    windows = random_windows(torch.arange(7), options, torch.Generator().manual_seed(0))
    assert {tuple(row) for row in windows.tolist()} == {tuple(range(s, s + 5)) for s in range(3)}


def test_quality_is_that_of_each_window_alone(tiny: Path) -> None:
    model = load_whole(tiny, torch.float32)
    found = text_quality(model, spread_windows(TEXT, 10**9)).figures()
    assert found["bits_per_byte"] == pytest.approx(bits_per_byte(model, TEXT), rel=1e-6)
    assert found["bytes_scored"] == len(TEXT.text)
    right, double = 0, load_whole(tiny, torch.float64)
    double.set_experts_implementation("eager")
    for tokens, n in spread_windows(TEXT, 10**9):
        with torch.inference_mode():
            logits = double(input_ids=tokens[None, :-1], use_cache=False).logits[0]
        right += int((logits[-n:].argmax(-1) == tokens[-n:]).sum())
    assert found["next_byte_accuracy"] == pytest.approx(right / len(TEXT.text), abs=2 / len(TEXT.text))


def test_a_change_is_paired_and_its_interval_covers_the_truth() -> None:
    random = np.random.default_rng(1)
    covered = 0
    for trial in range(100):
        hardness = random.lognormal(3, 0.5, size=80)  # windows differ much more than the two models do
        before = TextQuality(np.full(80, 256), hardness, np.zeros(80))
        after = TextQuality(np.full(80, 256), hardness * (1.01 + 0.02 * random.standard_normal(80)), np.zeros(80))
        change, low, high = relative_change(before, after, seed=trial)
        assert low <= change <= high and high - low < 0.02
        covered += low <= 0.01 <= high
    assert covered >= 85
    assert relative_change(before, before) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("overrides", "error", "said"),
    [
        (["mode=guess"], ConfigError, "mode=guess: choose one of hint, route"),
        (["tune=most"], ConfigError, "tune=most: choose one of heads, all"),
        (["level=0"], ConfigError, "level=0: it must be from 1 to 2 layers"),
        (["model.path=/nonexistent"], CheckpointError, "/nonexistent/config.json is missing"),
        (["level=3"], ConfigError, "level=3: it must be from 1 to 2 layers"),
        (["tuning.steps=0"], ConfigError, "tuning.steps=0: it must be at least 1"),
        (["tuning.learning_rate=0"], ConfigError, "tuning.learning_rate=0.0: it must be above 0"),
        (["tuning.learning_rate=inf", "tune=all"], ConfigError, "fine-tuning diverged at step 2"),
        (["tuning.window=100000000"], ConfigError, "tuning.window=100000000: the training text has"),
        (["mode=hint", "weights=/nonexistent"], PredictorError, "/nonexistent: no such predictor weights"),
        (["mode=hint", f"weights={BUNDLED}/predictors/pre_gate.safetensors"], PredictorError, "trained for MoE layers=8, here it is 3"),
    ],
)  # fmt: skip
def test_a_users_mistake_leaves_nothing(overrides: list[str], error: type, said: str, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(error, match=said):
        pre_gate(configured(tiny, tmp_path / "out", *overrides), tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_output_that_exists_and_a_source_that_is_pre_gated_are_refused(tiny: Path, routed: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="exists already"):
        pre_gate(configured(tiny, routed / "checkpoint"), tmp_path)
    with pytest.raises(ConfigError, match="ships pre-gates already"):
        pre_gate(configured(routed / "checkpoint", tmp_path / "out"), tmp_path)
    with pytest.raises(ConfigError, match="nothing to predict"):
        load_model_view(configured(routed / "checkpoint", tmp_path / "out"))
    untold = shutil.copytree(tiny, tmp_path / "untold", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(ConfigError, match="no tokenizer that maps bytes to themselves"):
        pre_gate(configured(untold, tmp_path / "out"), tmp_path)
    other = shutil.copytree(tiny, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] |= {"a": 98, "b": 97}
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ConfigError, match="no tokenizer that maps bytes to themselves"):
        pre_gate(configured(other, tmp_path / "out"), tmp_path)


def test_a_failure_while_writing_leaves_no_checkpoint(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(*_: object) -> None:
        raise CheckpointError("the disk is full")

    monkeypatch.setattr("experiments.pre_gate.add_pre_gates", damaged)
    with pytest.raises(CheckpointError, match="the disk is full"):
        pre_gate(configured(tiny, tmp_path / "out"), tmp_path)
    assert not list(tmp_path.iterdir())
