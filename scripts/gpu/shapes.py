"""The MoE layers that GPU figures are about: sizes from the models' published configurations."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from prefetch.geometry import ExpertGeometry


@dataclass(frozen=True)
class MoEShape:
    """The routed part of one MoE layer of a model, and how many such layers it has."""

    name: str
    hidden: int  # H
    n_experts: int  # E
    top_k: int
    intermediate: int  # I
    n_layers: int

    def geometry(self, dtype: torch.dtype) -> ExpertGeometry:
        """One expert."""
        return ExpertGeometry(self.hidden, self.intermediate, dtype)

    def expected_touched(self, n_tokens: int) -> float:
        """Distinct experts that `n_tokens` touch where each draws its own uniformly: E (1 - (1 - k/E)^T)."""
        return self.n_experts * (1 - (1 - self.top_k / self.n_experts) ** n_tokens)


SHAPES = (
    MoEShape("Qwen3-30B-A3B", 2048, 128, 8, 768, 48),
    MoEShape("Qwen3.6-35B-A3B", 2048, 256, 8, 512, 40),
    MoEShape("Mixtral-8x7B", 4096, 8, 2, 14336, 32),
    MoEShape("DeepSeek-V2-Lite", 2048, 64, 6, 1408, 26),
    MoEShape("OLMoE-1B-7B", 2048, 64, 8, 1024, 16),
    MoEShape("gpt-oss-20b", 2880, 32, 4, 2880, 24),
)
TOKENS = (1, 2, 4, 8, 16, 64, 512)
