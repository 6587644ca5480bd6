"""Export the bundled model in the Hugging Face format, with prompts, measured figures and a model card made of them."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3MoeForCausalLM

from scripts.bundled_corpus import Corpus, module_of
from scripts.bundled_evaluation import bits_per_byte, router_statistics

SEED = 20261123  # of training
N_PROMPTS = {"code": 16, "prose": 8}
PROMPT_BYTES = 384
SHIFTED_BYTES = 100_000  # of the shifted domain, scored


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Token id = byte value; 256 separates documents. A BPE without merges over the byte-level alphabet."""
    alphabet = _bytes_to_unicode()
    vocabulary = {alphabet[byte]: byte for byte in range(256)} | {"<|separator|>": 256}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|separator|>",
        eos_token="<|separator|>",
        clean_up_tokenization_spaces=False,
    )


def _bytes_to_unicode() -> dict[int, str]:
    """The byte-level alphabet of GPT-2: printable bytes stand for themselves, the rest for code points from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = (byte for byte in range(256) if byte not in printable)
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def export(
    model: Qwen3MoeForCausalLM, folder: Path, training: Corpus, held_out: Corpus, shifted: Corpus, n_tokens: int, seconds: float
) -> None:
    """Write the model in bf16, its tokenizer, prompts, `training.json` and the card to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    model = model.to(torch.bfloat16).eval()
    model.config._experts_implementation = None
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    _write_prompts(folder / "prompts.jsonl", {"code": held_out, "prose": shifted})
    figures = _measure(folder, training, held_out, shifted) | {"tokens_seen": n_tokens, "training_seconds": round(seconds)}
    (folder / "training.json").write_text(json.dumps(figures, indent=1) + "\n")
    (folder / "README.md").write_text(card(figures))


def _measure(folder: Path, training: Corpus, held_out: Corpus, shifted: Corpus) -> dict[str, Any]:
    """Figures of the exported bf16 weights, computed in fp32."""
    shifted_part = Corpus({name: data[:SHIFTED_BYTES] for name, data in shifted.files.items() if data})
    model = Qwen3MoeForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return {
        "bits_per_byte_held_out": round(bits_per_byte(model, held_out), 4),
        "xz_bits_per_byte_held_out_by_file": round(held_out.xz_bits_per_byte_by_file(), 4),
        "xz_bits_per_byte_held_out": round(held_out.xz_bits_per_byte(), 4),
        "bits_per_byte_shifted": round(bits_per_byte(model, shifted_part), 4),
        "xz_bits_per_byte_shifted": round(shifted_part.xz_bits_per_byte(), 4),
        "shifted_bytes_scored": len(shifted_part.text),
        "routers": router_statistics(model, held_out),
        "seed": SEED,
        "n_parameters": sum(p.numel() for p in model.parameters()),
        "corpora": {
            name: {"bytes": len(corpus.text), "files": len(corpus.files), "sha256": corpus.sha256}
            for name, corpus in (("training", training), ("held_out", held_out), ("shifted", shifted))
        },
        "held_out_modules": sorted({module_of(Path(name)) for name in held_out.files}),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__},
        "hardware": f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
    }


def _write_prompts(path: Path, corpora: dict[str, Corpus]) -> None:
    """Prompts from text that training never saw, evenly spread, each starting at a line."""
    lines = []
    for domain, corpus in corpora.items():
        files = [(name, data) for name, data in corpus.files.items() if len(data) > 4 * PROMPT_BYTES]
        for i in range(N_PROMPTS[domain]):
            name, data = files[i * len(files) // N_PROMPTS[domain]]
            start = data.index(b"\n", (i % 5 + 1) * len(data) // 8) + 1
            text = data[start : start + PROMPT_BYTES].decode(errors="ignore")
            lines.append(json.dumps({"id": f"{domain}-{i:02d}", "domain": domain, "source": name, "text": text}))
    path.write_text("\n".join(lines) + "\n")


def card(f: dict[str, Any]) -> str:
    """The model card, from measured figures alone."""
    rows = "\n".join(
        f"| {r['layer']} | {r['least_load']:.2f} - {r['greatest_load']:.2f} | {r['load_entropy']:.3f} | {r['entropy_bits']:.2f} "
        f"| {r['token_reuse']:.1%} | {'-' if r['gate_reuse_recall'] is None else format(r['gate_reuse_recall'], '.1%')} |"
        for r in f["routers"]
    )
    corpora = f["corpora"]
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [mixture-of-experts, byte-level]
---
# bytes-moe

A byte-level Mixture-of-Experts language model, small enough to travel in a repository and trained for real, so that its routers
choose as trained routers do. It is the model gatecast demonstrates and tests itself on; it is not meant to write programs.

`Qwen3MoeForCausalLM`: 8 layers, all MoE, 32 experts each, top-4, hidden size 192, expert size 96; {f["n_parameters"] / 1e6:.1f} M parameters, bf16.
Token id = byte value, 256 separates documents (the text `<|separator|>` becomes that token too).

## Data
The sources of Python's standard library, {f["versions"]["python"]} (PSF licence), without test suites and the tables of `encodings`;
split by module with a hash of the module's name.

| part | bytes | files | sha256 |
|---|---|---|---|
| training | {corpora["training"]["bytes"]:,} | {corpora["training"]["files"]} | `{corpora["training"]["sha256"][:16]}...` |
| held out | {corpora["held_out"]["bytes"]:,} | {corpora["held_out"]["files"]} | `{corpora["held_out"]["sha256"][:16]}...` |
| shifted domain (the text of `pydoc_data`: prose) | {corpora["shifted"]["bytes"]:,} | {corpora["shifted"]["files"]} | `{corpora["shifted"]["sha256"][:16]}...` |

Held-out modules: {", ".join(f["held_out_modules"])}.

## Training
`python -m scripts.train_bundled_model`: {f["tokens_seen"]:,} tokens in {f["training_seconds"] / 60:.0f} minutes on {f["hardware"]}; Muon and AdamW,
load-balancing loss 5e-3, seed {f["seed"]}. The run was stopped and resumed from its checkpoints; bf16 GEMMs on two threads give the same
curve, not the same bits.
Versions: {", ".join(f"{k} {v}" for k, v in f["versions"].items())}.

## Quality
Bits per byte, teacher-forced in windows of 512 with a stride of 256, every byte scored once, from the weights as shipped.

| text | this model | `xz -9e`, all files in one stream | `xz -9e`, file by file |
|---|---|---|---|
| held out | **{f["bits_per_byte_held_out"]:.3f}** | {f["xz_bits_per_byte_held_out"]:.3f} | {f["xz_bits_per_byte_held_out_by_file"]:.3f} |
| shifted domain, first {f["shifted_bytes_scored"]:,} bytes | {f["bits_per_byte_shifted"]:.3f} | {f["xz_bits_per_byte_shifted"]:.3f} | - |

## Routers, on held-out text
| layer | expert load, least - greatest (1 = even) | load entropy (1 = even) | router entropy, bits (5 = uniform) | experts shared with the token before (chance {4 / 32:.1%}) | next router one layer early, recall@4 |
|---|---|---|---|---|---|
{rows}

All figures stand in `training.json`. Licence: weights Apache-2.0; the training text is Python's, PSF licence.
"""
