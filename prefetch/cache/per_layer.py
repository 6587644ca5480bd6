"""Per-layer capacity: every MoE layer has its own cache, so that no layer can crowd out another.

Splits the slots evenly, as Mixtral-offloading does (Eliseev & Mazur 2023, arXiv 2312.17238), over any policy; the slots
that are left over go one each to the first layers, where predictions are weakest.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

from prefetch.cache.base import CachePolicy
from prefetch.errors import CapacityError
from prefetch.geometry import ExpertKey


class PerLayer(CachePolicy):
    """Hands each call to the policy of the key's layer.

    Args:
        capacity: experts over all layers.
        n_layers: MoE layers.
        factory: makes one layer's policy from its capacity.

    Raises:
        CapacityError: a layer's share is nothing, or too small for its policy.
    """

    def __init__(self, capacity: int, n_layers: int, factory: Callable[[int], CachePolicy]):
        share, n_larger = divmod(capacity, n_layers)
        if share < 1:
            raise CapacityError(
                f"{capacity} slots cannot be split over {n_layers} MoE layers: cache.slots must be at least {n_layers}, "
                "or use one cache for all layers (cache.scope=global)"
            )
        try:
            self.layers = [factory(share + (layer < n_larger)) for layer in range(n_layers)]
        except CapacityError as error:
            raise CapacityError(f"{capacity} slots over {n_layers} MoE layers leave {share} for one: {error}") from error
        super().__init__(sum(policy.capacity for policy in self.layers))
        self.admits_prefetch = self.layers[0].admits_prefetch

    def access(self, key: ExpertKey) -> None:
        self.layers[key.layer].access(key)

    def insert(self, key: ExpertKey, in_use: Collection[ExpertKey] = ()) -> list[ExpertKey]:
        return self.layers[key.layer].insert(key, in_use)

    def insert_prefetched(self, key: ExpertKey, in_use: Collection[ExpertKey] = ()) -> list[ExpertKey]:
        return self.layers[key.layer].insert_prefetched(key, in_use)

    def remove(self, key: ExpertKey) -> None:
        self.layers[key.layer].remove(key)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, ExpertKey) and key in self.layers[key.layer]

    def __len__(self) -> int:
        return sum(len(policy) for policy in self.layers)

    def __iter__(self) -> Iterator[ExpertKey]:
        for policy in self.layers:
            yield from policy
