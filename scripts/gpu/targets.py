"""What was aimed at. Microseconds are an H200's, by graph replay; of experts both GEMMs."""

from __future__ import annotations

TARGET_DEVICE = "H200"
TARGET_COPY_BYTES_PER_S = 4.3e12  # its copy rate, read and written together, that the targets were set with
TARGETS = {  # (operation, shape, tokens): us
    ("experts", "Qwen3-30B-A3B", 1): 22.0,
    ("experts", "Qwen3-30B-A3B", 8): 140.0,
    ("experts", "Qwen3-30B-A3B", 64): 350.0,
    ("experts", "Mixtral-8x7B", 1): 205.0,
    ("experts", "Qwen3.6-35B-A3B", 1): 17.0,
    ("router", "Qwen3-30B-A3B", 1): 3.0,
    ("router with 4 heads", "Qwen3-30B-A3B", 1): 5.0,
    ("predict_mlp", "Qwen3-30B-A3B", 1): 10.0,
    ("cache_plan", "Qwen3-30B-A3B", 1): 4.0,
    ("cache_plan with predictions", "Qwen3-30B-A3B", 1): 4.0,
}
COPY_ENGINE_BYTES_PER_S = 52e9
AHEAD_UP_TO_TOKENS = 16  # ours is ahead of every provider
BEHIND_AT_MOST = 1.10  # times the best provider's, with more tokens
DECODE_GAIN = 1.3  # of gate reuse over SLRU alone, where the oracle allows it
