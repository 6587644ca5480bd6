"""What SLRU's probation is worth when it may fill what protected leaves free: `python -m scripts.slru_fill`.

Replays generated routing (`scripts.gpu.generated_routing`) through the host's policies, one list for all layers as on the
device, and prints hit rates as a Markdown table. No bytes move and no clock runs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from prefetch.cache.base import CachePolicy
from prefetch.cache.lru import Lru
from prefetch.cache.per_layer import PerLayer
from prefetch.cache.replay import replay_hits
from prefetch.cache.slru import Slru
from prefetch.geometry import ExpertKey
from scripts.gpu.generated_routing import RoutingStatistics, generated_routing

MODELS = {"Qwen3-30B-A3B": (48, 128, 8), "Qwen3.6-35B-A3B": (40, 256, 8)}  # layers, experts a layer, experts a token
SHARES = (0.14, 0.25, 0.45)  # of all experts that the cache holds; 0.14: 12 GB of Qwen3-30B-A3B in bf16
N_TOKENS, N_WARM_UP = 256, 64
Policies = dict[str, Callable[[int], CachePolicy]]


def main() -> None:
    """Print the table."""
    names = list(policies(1))
    print(f"| model | members | {' | '.join(names)} |")
    print("|---|---:|" + "---:|" * len(names))
    for model, (n_layers, n_experts, top_k) in MODELS.items():
        ids = generated_routing(N_TOKENS, n_layers, n_experts, top_k, RoutingStatistics(), seed=0)
        events = [[ExpertKey(layer, int(expert)) for expert in token[layer]] for token in ids for layer in range(n_layers)]
        warm_up, rest = events[: N_WARM_UP * n_layers], events[N_WARM_UP * n_layers :]
        for share in SHARES:
            capacity = int(share * n_layers * n_experts)
            rates = []
            for make in policies(n_layers).values():
                policy = make(capacity)
                replay_hits(policy, warm_up)
                rates.append(f"{replay_hits(policy, rest).hit_rate:.1%}")
            print(f"| {model} | {capacity} ({share:.0%}) | {' | '.join(rates)} |")


def policies(n_layers: int) -> Policies:
    """What is compared, each a function of the members it may hold."""
    return {
        "LRU": Lru,
        "SLRU, the original": Slru,
        "SLRU, filled": partial(Slru, fill=True),
        "SLRU a layer, the original": lambda capacity: PerLayer(capacity, n_layers, Slru),
        "SLRU a layer, filled": lambda capacity: PerLayer(capacity, n_layers, partial(Slru, fill=True)),
    }


if __name__ == "__main__":
    main()
