"""Segmented LRU: an expert proves itself in a small probationary segment; a second use moves it to a protected one.

Victims come from probation only, so a burst of experts used once cannot flush the proven ones (Karedla, Love & Wherry
1994); the segment sizes and rules are those of the engine SharpInference, one cache over all its layers.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Collection, Iterator

from prefetch.cache.base import CachePolicy
from prefetch.errors import CapacityError, ConfigError
from prefetch.geometry import ExpertKey

VARIANTS = ("original", "promote_on_prefetch", "reserved")
VICTIMS = ("tail", "least_accessed")


class Slru(CachePolicy):
    """Probation holds a quarter of the slots (at least 1), protected the rest; each is a list, least recent first.

    With one list for all layers, a fixed quarter smaller than the experts of one token loses each of them before its second
    use, and nothing ever hits. `fill` lends probation the places that protected does not use.

    Args:
        capacity: slots of all segments together. The original turns a request for 1 into 2 (1 + 1); here `capacity` slots
            are all there are, so it must be at least 2, and 3 for `reserved`.
        variant: what becomes of a prefetch that no router has confirmed, where the runtime lets prefetches in.
            `original`: enters at the head of probation. `promote_on_prefetch`: enters at the head of protected.
            `reserved`: waits in a segment of its own, from which the router's selection moves it to the head of probation.
        victim: `tail`, the least recent of probation, or `least_accessed`, the one of probation selected least often since
            the run began (hits and misses; the least recent among equals).
        reserved: slots of the prefetch segment (`reserved` only): an int counts slots, a float is a fraction of `capacity`.
        expire_after: a reserved prefetch keeps its place until this many selections by its layer's router have passed it
            over, then a newer prefetch may take it. 1: until its layer has routed once; n * top-k: for n decoded tokens.
        fill: probation may also hold what protected leaves free, so that no slot stays empty; as protected grows to its share,
            probation shrinks to its quarter. False, the original: a quarter at all times.

    Raises:
        CapacityError: fewer slots than segments. ConfigError: an unknown variant or victim rule.
    """

    admits_prefetch = True

    def __init__(
        self,
        capacity: int,
        variant: str = "original",
        victim: str = "tail",
        reserved: float = 0.25,
        expire_after: int = 1,
        fill: bool = False,
    ):
        _check_choice("variant", variant, VARIANTS)
        _check_choice("victim", victim, VICTIMS)
        n_reserved = _reserved_slots(capacity, reserved) if variant == "reserved" else 0
        if capacity - n_reserved < 2:
            raise CapacityError(
                f"slru ({variant}) needs at least {3 if n_reserved else 2} slots, one for each segment, "
                f"got {capacity}, of them {n_reserved} reserved for prefetches"
            )
        super().__init__(capacity)
        self.variant, self.victim, self.fill = variant, victim, fill
        self.proven_capacity = capacity - n_reserved  # probation and protected together
        self.probation_capacity = max(1, self.proven_capacity // 4)
        self.protected_capacity = self.proven_capacity - self.probation_capacity
        self.probation: OrderedDict[ExpertKey, None] = OrderedDict()
        self.protected: OrderedDict[ExpertKey, None] = OrderedDict()
        self.waiting = _PrefetchSegment(n_reserved, expire_after)
        self.pinned: set[ExpertKey] = set()
        self._n_selected: Counter[ExpertKey] = Counter()

    def access(self, key: ExpertKey) -> None:
        self._selected(key)
        if key in self.waiting:
            # Probation may now hold one too many. It cannot evict here; the next insertion makes up for it.
            self.waiting.remove(key)
            self.probation[key] = None
        else:
            self._protect(key)

    def insert(self, key: ExpertKey, in_use: Collection[ExpertKey] = ()) -> list[ExpertKey]:
        self._selected(key)
        return self._insert_in_probation(key, in_use)

    def insert_prefetched(self, key: ExpertKey, in_use: Collection[ExpertKey] = ()) -> list[ExpertKey]:
        if self.variant == "reserved":
            return self._insert_waiting(key, in_use)
        if self.variant == "promote_on_prefetch":
            return self._insert_in_protected(key, in_use)
        return self._insert_in_probation(key, in_use)

    def pin(self, key: ExpertKey) -> None:
        """Protect `key` from eviction and demotion until `unpin`. Nothing happens if it is not a member."""
        if key in self:
            self.waiting.discard(key)
            self.pinned.add(key)
            self._protect(key)

    def unpin(self, key: ExpertKey) -> None:
        """`key` may be demoted and evicted again."""
        self.pinned.discard(key)
        self._demote_surplus()

    def remove(self, key: ExpertKey) -> None:
        if key not in self:
            raise KeyError(key)
        self.waiting.discard(key)
        self.probation.pop(key, None)
        self.protected.pop(key, None)
        self.pinned.discard(key)

    def __contains__(self, key: object) -> bool:
        return key in self.protected or key in self.probation or key in self.waiting

    def __len__(self) -> int:
        return len(self.probation) + len(self.protected) + len(self.waiting)

    def __iter__(self) -> Iterator[ExpertKey]:
        yield from self.probation
        yield from self.protected
        yield from self.waiting

    def _selected(self, key: ExpertKey) -> None:
        self._n_selected[key] += 1
        self.waiting.router_selected(key.layer)

    def _insert_in_probation(self, key: ExpertKey, in_use: Collection[ExpertKey]) -> list[ExpertKey]:
        victims = self._make_room_in_probation(1, in_use)
        if not self._probation_has_room(1):
            return [*victims, key]
        self.probation[key] = None
        return victims

    def _insert_in_protected(self, key: ExpertKey, in_use: Collection[ExpertKey]) -> list[ExpertKey]:
        if len(self.protected) < self.protected_capacity and self._n_proven < self.proven_capacity:
            self.protected[key] = None
            return []
        # For the one that protected sends back, or by what probation borrowed.
        victims = self._make_room_in_probation(1, in_use)
        if not self._probation_has_room(1):
            return [*victims, key]
        self._protect(key)
        return victims

    def _insert_waiting(self, key: ExpertKey, in_use: Collection[ExpertKey]) -> list[ExpertKey]:
        victims = self._make_room_in_probation(0, in_use)  # what confirmed prefetches still owe
        n_places = min(self.waiting.capacity, self.capacity - self._n_proven)
        if len(self.waiting) >= n_places:
            expired = self.waiting.pop_expired(in_use)
            if expired is None:
                return [*victims, key]
            victims.append(expired)
        self.waiting.add(key)
        return victims

    def _protect(self, key: ExpertKey) -> None:
        """Move `key` to the head of protected, whose surplus goes back to the head of probation."""
        self.probation.pop(key, None)
        self.protected[key] = None
        self.protected.move_to_end(key)
        self._demote_surplus()

    def _demote_surplus(self) -> None:
        """Pins may fill more than protected's share; then what is not pinned is demoted first."""
        while len(self.protected) > max(self.protected_capacity, len(self.pinned)):
            tail = next(key for key in self.protected if key not in self.pinned)
            del self.protected[tail]
            self.probation[tail] = None

    @property
    def _n_proven(self) -> int:
        return len(self.probation) + len(self.protected)

    def _probation_has_room(self, n_more: int) -> bool:
        within_share = self.fill or len(self.probation) + n_more <= self.probation_capacity
        return within_share and self._n_proven + n_more <= self.proven_capacity

    def _make_room_in_probation(self, n_more: int, in_use: Collection[ExpertKey]) -> list[ExpertKey]:
        """Evict until probation has room for `n_more`, or everything left in it is in use."""
        victims = []
        while not self._probation_has_room(n_more):
            candidates = (key for key in self.probation if key not in in_use)
            if self.victim == "tail":
                victim = next(candidates, None)
            else:
                victim = min(candidates, key=self._n_selected.__getitem__, default=None)
            if victim is None:
                break
            del self.probation[victim]
            victims.append(victim)
        return victims


class _PrefetchSegment:
    """Prefetches that no router has confirmed, oldest first."""

    def __init__(self, capacity: int, expire_after: int):
        if expire_after < 1:
            raise ConfigError(f"cache.expire_after must be at least 1 selection, got {expire_after}")
        self.capacity, self.expire_after = capacity, expire_after
        self._admitted_at: dict[ExpertKey, int] = {}  # its layer's selections by then
        self._n_selections: Counter[int] = Counter()  # by layer

    def router_selected(self, layer: int) -> None:
        """The router of `layer` has selected an expert: progress, for all prefetches of that layer."""
        self._n_selections[layer] += 1

    def add(self, key: ExpertKey) -> None:
        self._admitted_at[key] = self._n_selections[key.layer]

    def pop_expired(self, in_use: Collection[ExpertKey]) -> ExpertKey | None:
        """Take out the oldest that has expired; None if there is none."""
        for key, admitted_at in self._admitted_at.items():
            if self._n_selections[key.layer] - admitted_at >= self.expire_after and key not in in_use:
                self.remove(key)
                return key
        return None

    def remove(self, key: ExpertKey) -> None:
        del self._admitted_at[key]

    def discard(self, key: ExpertKey) -> None:
        self._admitted_at.pop(key, None)

    def __contains__(self, key: object) -> bool:
        return key in self._admitted_at

    def __len__(self) -> int:
        return len(self._admitted_at)

    def __iter__(self) -> Iterator[ExpertKey]:
        return iter(self._admitted_at)


def _check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"cache.{option}={value} is unknown to slru; choose one of {', '.join(choices)}")


def _reserved_slots(capacity: int, reserved: float) -> int:
    """A count as it is; a fraction of `capacity`, rounded down, at least 1."""
    if isinstance(reserved, float):
        if not 0 < reserved < 1:
            raise ConfigError(f"cache.reserved={reserved} must be a fraction between 0 and 1, or a whole number of slots")
        return max(1, int(reserved * capacity))
    if reserved < 1:
        raise ConfigError(f"cache.reserved={reserved} must be at least 1 slot")
    return reserved
