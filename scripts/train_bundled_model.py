"""Train the bundled model: a byte-level Qwen3-MoE on Python's standard library, on two CPU cores.

    python -m scripts.train_bundled_model                 # train, evaluate, export to models/bytes-moe
    python -m scripts.train_bundled_model --resume        # go on from the last checkpoint
    python -m scripts.train_bundled_model --export-only   # evaluate and export the last checkpoint

Hidden matrices learn with Muon (momentum whose steps are orthogonalised; Jordan 2024), the rest with AdamW.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from scripts.bundled_corpus import split_library
from scripts.bundled_model_card import SEED, export

SEQUENCE = 512  # tokens in a training window
AUX_COEFFICIENT = 5e-3


def model_config() -> Qwen3MoeConfig:
    """8 MoE layers of 32 experts, top-4; 15.1 M parameters, 94 % of them in experts."""
    return Qwen3MoeConfig(
        vocab_size=264,  # 256 bytes, the separator, rounded up
        hidden_size=192,
        intermediate_size=96,
        moe_intermediate_size=96,
        num_hidden_layers=8,
        num_experts=32,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        tie_word_embeddings=True,
        max_position_embeddings=8192,
        router_aux_loss_coef=AUX_COEFFICIENT,
        bos_token_id=256,
        eos_token_id=256,
    )


class SortedExperts(torch.autograd.Function):
    """All experts' SwiGLU MLPs, [T, H] and [T, k] ids -> [T, k, H]. Autograd through views of the stacked weights would fill a
    gradient the size of the stack for every expert; here each expert's gradient is written in place. GEMMs run in bf16,
    four times faster than fp32 on a CPU with bf16 dot products; master weights stay fp32."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, topk_ids: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        place, spans = _places(topk_ids.reshape(-1), len(down))
        rows = hidden.new_zeros(spans[-1][1].stop, hidden.shape[1], dtype=torch.bfloat16)
        rows[place] = hidden.bfloat16().repeat_interleave(topk_ids.shape[1], dim=0)
        gate_up, down = gate_up.bfloat16(), down.bfloat16()
        inner = rows.new_empty(len(rows), gate_up.shape[1])
        out = torch.empty_like(rows)
        for e, span in spans:
            torch.mm(rows[span], gate_up[e].t(), out=inner[span])
        gate, up = inner.chunk(2, dim=-1)
        activated = F.silu(gate) * up
        for e, span in spans:
            torch.mm(activated[span], down[e].t(), out=out[span])
        ctx.save_for_backward(rows, gate_up, down, inner, activated, place)
        ctx.spans = spans
        return out[place].view(*topk_ids.shape, -1).to(hidden.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, Tensor | None, Tensor | None]:
        rows, gate_up, down, inner, activated, place = ctx.saved_tensors
        n_tokens, top_k, _ = grads[0].shape
        grad_out = torch.zeros_like(rows)
        grad_out[place] = grads[0].reshape(n_tokens * top_k, -1).bfloat16()
        grad_gate_up, grad_down = torch.zeros_like(gate_up), torch.zeros_like(down)
        learns = any(ctx.needs_input_grad[2:])  # not where only routers are fine-tuned
        grad_activated = torch.empty_like(activated)
        for e, span in ctx.spans:
            torch.mm(grad_out[span], down[e], out=grad_activated[span])
            if learns:
                torch.mm(grad_out[span].t(), activated[span], out=grad_down[e])
        gate, up = inner.chunk(2, dim=-1)
        sigmoid = torch.sigmoid(gate)
        silu = gate * sigmoid
        grad_gate = grad_activated * up * (sigmoid + silu * (1 - sigmoid))
        grad_inner = torch.cat([grad_gate, grad_activated * silu], dim=-1)
        grad_rows = torch.empty_like(rows)
        for e, span in ctx.spans:
            torch.mm(grad_inner[span], gate_up[e], out=grad_rows[span])
            if learns:
                torch.mm(grad_inner[span].t(), rows[span], out=grad_gate_up[e])
        grad_hidden = grad_rows[place].view(n_tokens, top_k, -1).sum(1, dtype=grads[0].dtype)
        return grad_hidden, None, grad_gate_up.float() if learns else None, grad_down.float() if learns else None


def _places(experts: Tensor, n_experts: int) -> tuple[Tensor, list[tuple[int, slice]]]:
    """Where each pair's row goes, [P], and each expert's span of rows, padded with zero rows to a multiple of 64: the GEMM
    library prepares every new shape anew, which costs more than the product itself."""
    counts = torch.bincount(experts, minlength=n_experts)
    padded = (counts + 63) // 64 * 64
    ends = padded.cumsum(0)
    order = torch.argsort(experts, stable=True)
    shift = (ends - padded) - (counts.cumsum(0) - counts)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order)) + shift[experts[order]]
    bounds = [0, *ends.tolist()]
    return place, [(e, slice(bounds[e], bounds[e + 1])) for e in range(n_experts)]


def sorted_experts_forward(experts: Any, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
    """Experts implementation for training: [T, H] -> [T, H]."""
    rows = SortedExperts.apply(hidden, topk_ids, experts.gate_up_proj, experts.down_proj)  # [T, k, H]
    return (rows * topk_weights.unsqueeze(-1)).sum(1)


ALL_EXPERTS_FUNCTIONS.register("sorted_training", sorted_experts_forward)


class RouterTap:
    """Collects every router's logits and choices of one forward pass."""

    def __init__(self, model: Qwen3MoeForCausalLM):
        self.seen: list[tuple[Tensor, Tensor]] = []
        for layer in model.model.layers:
            layer.mlp.gate.register_forward_hook(lambda _m, _a, out: self.seen.append((out[0], out[2])))

    def balancing_loss(self) -> Tensor:
        """E * sum_e f_e * P_e averaged over layers (Switch Transformer, eq. 4, for top-k): 1 per unit k when balanced.
        transformers' `load_balancing_loss_func` pools all layers first, so that one layer's imbalance can hide another's."""
        losses = []
        for logits, ids in self.seen:
            n_experts = logits.shape[-1]
            load = torch.bincount(ids.reshape(-1), minlength=n_experts) / len(ids)
            losses.append(n_experts * (load * logits.softmax(-1).mean(0)).sum())
        self.seen.clear()
        return torch.stack(losses).mean()


class Muon:
    """Momentum with orthogonalised steps for (stacks of) matrices, five Newton-Schulz iterations in bf16."""

    def __init__(self, parameters: list[nn.Parameter], momentum: float = 0.95, weight_decay: float = 0.05):
        self.parameters, self.momentum, self.weight_decay = parameters, momentum, weight_decay
        self.buffers = [torch.zeros_like(p) for p in parameters]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for p, buffer in zip(self.parameters, self.buffers, strict=True):
            assert p.grad is not None
            buffer.lerp_(p.grad, 1 - self.momentum)
            update = orthogonalised(p.grad.lerp(buffer, self.momentum))
            p.mul_(1 - lr * self.weight_decay)
            p.add_(update, alpha=-lr * math.sqrt(max(1.0, p.shape[-2] / p.shape[-1])))
            p.grad = None


def orthogonalised(update: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrix, roughly, of each [m, n] matrix in `update` [..., m, n]."""
    x = update.bfloat16().reshape(-1, *update.shape[-2:])
    flip = x.shape[-2] > x.shape[-1]
    x = x.mT.contiguous() if flip else x
    x = x / (x.float().norm(dim=(-2, -1), keepdim=True) + 1e-7).bfloat16()
    for _ in range(5):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return (x.mT if flip else x).reshape(update.shape).to(update.dtype)


class Trainer:
    """Model, optimisers and position in the data; everything a checkpoint holds."""

    def __init__(self, args: argparse.Namespace, tokens: np.ndarray):
        torch.manual_seed(SEED)
        self.args, self.tokens = args, torch.from_numpy(tokens.astype(np.int64))
        self.model = Qwen3MoeForCausalLM(model_config())
        self.model.set_experts_implementation("sorted_training")
        self.tap = RouterTap(self.model)
        hidden = [p for n, p in self.model.named_parameters() if p.ndim >= 2 and "embed" not in n and "gate.weight" not in n]
        chosen = {id(p) for p in hidden}
        self.muon = Muon(hidden)
        rest = [p for p in self.model.parameters() if id(p) not in chosen]
        self.adamw = torch.optim.AdamW(rest, lr=args.adam_lr, betas=(0.9, 0.95), weight_decay=0.0)
        self.step, self.seconds = 0, 0.0
        self.n_steps = args.tokens // (args.batch * SEQUENCE)

    def batch(self, step: int) -> Tensor:
        """[batch, SEQUENCE + 1] windows; each epoch is a new permutation of windows at a new phase."""
        per_epoch = (len(self.tokens) - SEQUENCE - 1) // SEQUENCE // self.args.batch
        epoch, index = divmod(step, per_epoch)
        generator = torch.Generator().manual_seed(SEED + epoch)
        phase = int(torch.randint(SEQUENCE, (1,), generator=generator))
        order = torch.randperm(per_epoch * self.args.batch, generator=generator)
        starts = order[index * self.args.batch : (index + 1) * self.args.batch] * SEQUENCE + phase
        starts = starts.clamp(max=len(self.tokens) - SEQUENCE - 1)
        return torch.stack([self.tokens[s : s + SEQUENCE + 1] for s in starts.tolist()])

    def schedule(self) -> float:
        """Share of the peak learning rate: a short warm-up, a plateau, then linear decay to zero over the last 60 %."""
        progress = self.step / self.n_steps
        return min(1.0, (self.step + 1) / 50, (1 - progress) / 0.6)

    def train_step(self) -> dict[str, float]:
        started = time.perf_counter()
        window = self.batch(self.step)
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.model(input_ids=window[:, :-1], use_cache=False).logits.float()
        loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), window[:, 1:].reshape(-1))
        balance = self.tap.balancing_loss()
        (loss + AUX_COEFFICIENT * balance).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        share = self.schedule()
        self.muon.step(self.args.muon_lr * share)
        for group in self.adamw.param_groups:
            group["lr"] = self.args.adam_lr * share
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        self.step += 1
        self.seconds += time.perf_counter() - started
        return {"bits_per_byte": loss.item() / math.log(2), "balance": balance.item(), "lr_share": share, "step": self.step}

    def save(self, path: Path) -> None:
        """Write aside, then rename: a killed run leaves the last whole checkpoint."""
        state = {
            "model": self.model.state_dict(),
            "muon": self.muon.buffers,
            "adamw": self.adamw.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "n_steps": self.n_steps,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(".tmp")
        torch.save(state, aside)
        os.replace(aside, path)

    def load(self, path: Path) -> None:
        if not path.exists():
            raise SystemExit(f"{path} does not exist: nothing to resume; start without --resume")
        state = torch.load(path, weights_only=True)
        if state["n_steps"] != self.n_steps:
            raise SystemExit(
                f"{path} belongs to a run of {state['n_steps']} steps, not {self.n_steps}: give the same --tokens and --batch"
            )
        self.model.load_state_dict(state["model"])
        self.muon.buffers = state["muon"]
        self.adamw.load_state_dict(state["adamw"])
        self.step, self.seconds = state["step"], state["seconds"]


def train(trainer: Trainer, checkpoint: Path, wandb_mode: Literal["offline", "online", "disabled"]) -> None:
    """Run to the last step, with a progress bar, a checkpoint every minute and a curve in wandb."""
    import wandb

    run = wandb.init(project="gatecast-bundled-model", mode=wandb_mode, dir="outputs", settings=wandb.Settings(silent=True))
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"), TimeRemainingColumn()
    with Progress(*columns) as progress:
        bar = progress.add_task("training", total=trainer.n_steps, completed=trainer.step, note="")
        saved_s = time.monotonic()
        while trainer.step < trainer.n_steps:
            metrics = trainer.train_step()
            run.log(metrics)
            note = f"{metrics['bits_per_byte']:.3f} bits/byte, balance {metrics['balance']:.2f}, {trainer.step / trainer.seconds:.2f} steps/s"
            progress.update(bar, completed=trainer.step, note=note)
            if time.monotonic() - saved_s > 60 or trainer.step == trainer.n_steps:
                trainer.save(checkpoint)
                saved_s = time.monotonic()
    run.finish()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=10_649_600, help="training tokens (bytes) in all (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="windows of 512 tokens per step (default: %(default)s)")
    parser.add_argument(
        "--muon-lr", type=float, default=0.02, help="peak learning rate of hidden matrices (default: %(default)s)"
    )
    parser.add_argument("--adam-lr", type=float, default=4e-3, help="peak learning rate of embeddings, norms, routers")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--export-only", action="store_true", help="evaluate and export the last checkpoint, train nothing")
    parser.add_argument("--wandb", choices=["offline", "online", "disabled"], default="offline")
    parser.add_argument("--checkpoint", type=Path, default=Path("outputs/bundled_model/checkpoint.pt"))
    parser.add_argument("--output", type=Path, default=Path("models/bytes-moe"))
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    training, held_out, shifted = split_library()
    trainer = Trainer(args, training.tokens())
    if args.resume or args.export_only:
        trainer.load(args.checkpoint)
    if not args.export_only:
        train(trainer, args.checkpoint, args.wandb)
    export(
        trainer.model,
        args.output,
        training,
        held_out,
        shifted,
        n_tokens=trainer.step * args.batch * SEQUENCE,
        seconds=trainer.seconds,
    )


if __name__ == "__main__":
    main()
