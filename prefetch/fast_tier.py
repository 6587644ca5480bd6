"""The fast tier's books: which expert is in which slot, and why it is there.

An expert on board is a *member* of the cache (the router selected it and the policy keeps it), a *staged* prefetch (on its
way or arrived, not yet confirmed by a router), or a *transient* (the router selected it, the policy declined it: it
leaves when its layer call ends). Members fill at most `policy.capacity` slots and staged prefetches at most `staging`, so
that at least `transient` slots are left for the transients of any layer call.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field

from prefetch.cache.base import CachePolicy
from prefetch.cache.warm_start import warm_start
from prefetch.errors import CapacityError, TransferError
from prefetch.geometry import ExpertKey
from prefetch.slot_books import SlotBooks
from prefetch.transfers.base import Transfer, Transfers, TransferState

BEFORE_ANY = -1  # the sequence of what happens before the first
USEFUL_WEIGHT = 0.02  # of the latest prefetch in `useful_share`: a memory of about fifty


@dataclass(eq=False)
class TransferRecord:
    """One transfer and what became of it. `outcome` is final once the transfer has settled and its use is known."""

    transfer: Transfer
    kind: str  # "demand" | "prefetch" | "preload", at submission
    sequence: int  # when submitted; -1 for a preload, which comes before the first
    step: int
    # Layers from the prediction to its target; 0 for a demand load, and for a layer predicted before its attention.
    lookahead: int
    outcome: str = ""  # "demand" | "useful" | "wasted" | "cancelled" | "failed" | "preload"
    late: bool = False  # useful, but it had not fully arrived when its layer needed it


@dataclass(eq=False)
class Demand:
    """A needed expert that was not a hit. `record` is None until it has been given a slot."""

    key: ExpertKey
    record: TransferRecord | None
    transient: bool
    arrived: bool = False  # its bytes are complete


@dataclass
class LookUp:
    """What one routing event found: every needed expert is in exactly one of the four lists."""

    hits: list[ExpertKey] = field(default_factory=list)  # in a slot, fully arrived
    late: list[Demand] = field(default_factory=list)  # its prefetch is under way
    misses: list[Demand] = field(default_factory=list)
    in_place: list[ExpertKey] = field(default_factory=list)  # misses computed where they lie: by CPU, or by GPU across the link
    transient_hits: list[ExpertKey] = field(default_factory=list)  # hits (prefetched) that the policy declined


class FastTier:
    """Members, staged prefetches and transients over one pool of slots. Only the compute thread calls it."""

    def __init__(
        self,
        pool: SlotBooks,
        policy: CachePolicy,
        transfers: Transfers,
        *,
        staging: int,
        transient: int,
        policy_admits: bool = False,
    ):
        wanted = policy.capacity + staging + transient
        if wanted > pool.n_slots:
            raise CapacityError(
                f"{pool.n_slots} slots cannot hold {policy.capacity} cached, {staging} staged and {transient} transient experts: "
                f"cache.slots must be at least {wanted}"
            )
        self.pool, self.policy, self.transfers = pool, policy, transfers
        self.staging, self.policy_admits = staging, policy_admits
        self.sequence, self.step = 0, 0  # stamped on records; the runtime advances them
        self.slots: dict[ExpertKey, int] = {}  # every expert on board, arrived or not
        self.staged: dict[ExpertKey, TransferRecord] = {}
        self.draining: list[tuple[TransferRecord, int]] = []  # cancelled on the way; their slots free up as they settle
        self.records: list[TransferRecord] = []
        self.considered: set[ExpertKey] = set()  # prefetches that a planner thought of and did not make
        self.useful_share = 1.0  # running share of prefetches, made or considered, that a router confirmed

    def preload(self, hottest_first: Sequence[ExpertKey]) -> None:
        """Before the first token: fill the cache with what its policy keeps of these experts; returns when they have arrived.

        Raises:
            TransferError: one of them could not be read.
        """
        self.sequence = BEFORE_ANY
        loading: list[Transfer] = []
        for key in warm_start(self.policy, hottest_first):
            slot = self.pool.acquire()
            assert slot is not None, "there is a slot for every member"
            loading.append(self._submit(key, slot, "preload", 0).transfer)
        while waiting := [transfer for transfer in loading if not transfer.settled]:
            self.transfers.wait_any(waiting)
        for transfer in loading:
            key, error = transfer.key, transfer.error
            if error is not None:
                raise TransferError(f"expert {key.expert} of MoE layer {key.layer} could not be preloaded: {error}") from error
            self.pool.publish(key, transfer.slot)

    def on_board(self, key: ExpertKey) -> bool:
        """In a slot or on its way into one."""
        return key in self.slots

    @property
    def holds_everything(self) -> bool:
        """No expert is missing."""
        return len(self.slots) == self.pool.slot_of.numel()

    @property
    def prefetch_room(self) -> int:
        """Prefetches that may start now. In staging they evict nobody; where the policy admits them it decides."""
        self._collect_drained()
        if self.policy_admits:
            return self.policy.capacity - len(self.staged)
        return max(0, min(self.staging - len(self.staged) - len(self.draining), self.pool.n_free))

    def consider(self, key: ExpertKey) -> None:
        """Judge `key` as if it were prefetched, when its layer routes next; nothing moves."""
        self.considered.add(key)

    def stage(self, key: ExpertKey, lookahead: int, in_use: Collection[ExpertKey]) -> None:
        """Start a prefetch of `key`, which is not on board. Nothing happens if the policy declines it, no slot is free, or the layer
        call that uses `in_use` uses it too: then its demand load may be waiting for a slot."""
        if key in in_use:
            return
        if self.policy_admits:
            victims = self.policy.insert_prefetched(key, in_use)
            self._evict(victim for victim in victims if victim != key)
            if key in victims:
                return
        slot = self.pool.acquire()
        if slot is None:
            if self.policy_admits:
                self.policy.remove(key)
            return
        self.staged[key] = self._submit(key, slot, "prefetch", lookahead)

    def look_up(
        self,
        layer: int,
        needed: Sequence[ExpertKey],
        choose_in_place: Callable[[list[ExpertKey]], Collection[ExpertKey]],
    ) -> LookUp:
        """One routing event: accesses for members, then admissions, both in routing order, whatever has arrived by now,
        so that the cache's history depends on the routing alone. Prefetches for this layer that it does not need end here.

        Args:
            layer: the MoE layer that routes.
            needed: its experts, in routing order, without repeats.
            choose_in_place: given the experts that are not on board, those to be computed where they lie.
        """
        found = LookUp()
        in_use = frozenset(needed)
        self._expire(layer, in_use)
        absent = [key for key in needed if key not in self.slots]
        in_place = frozenset(choose_in_place(absent)) if absent else frozenset()
        members = [key for key in needed if key in self.policy]
        for key in members:
            self.policy.access(key)
            self._confirm(key, False, found)
        for key in needed:
            if key in in_place:
                found.in_place.append(key)
            elif key not in members:
                victims = self.policy.insert(key, in_use)
                self._evict(victim for victim in victims if victim != key)
                self._confirm(key, key in victims, found)
        return found

    def start(self, demands: list[Demand]) -> list[Demand]:
        """Give slots to demands that have none and start their transfers: members first (their slots are reserved), then
        transients as far as slots go. Returns those that must wait for a transient to leave."""
        waiting = []
        for demand in sorted(demands, key=lambda demand: demand.transient):
            if demand.record is not None:
                continue
            slot = self._acquire_for(demand)
            if slot is None:
                waiting.append(demand)
            else:
                demand.record = self._submit(demand.key, slot, "demand", 0)
        return waiting

    def arrived(self, demand: Demand) -> None:
        """The bytes of `demand` are complete."""
        self.pool.publish(demand.key, self.slots[demand.key])
        demand.arrived = True

    def release(self, key: ExpertKey) -> None:
        """Take `key` off board (a transient that has been used, or an eviction)."""
        slot = self.slots.pop(key)
        self.pool.unpublish(key)
        self.pool.release(slot)

    def abandon(self, found: LookUp) -> None:
        """The layer call of `found` raised. What has not arrived is forgotten, so that no slot is half-written under an expert's name
        and the next request starts afresh; transients leave. Returns when nothing more is written into their slots."""
        for demand in found.late + found.misses:
            if not demand.arrived:
                self._forget(demand)
        transients = [demand.key for demand in found.late + found.misses if demand.transient] + found.transient_hits
        for key in transients:
            if key in self.slots:
                self.release(key)

    def _forget(self, demand: Demand) -> None:
        if demand.record is not None:
            transfer = demand.record.transfer
            self.transfers.cancel(transfer)
            while not transfer.settled:
                self.transfers.wait_any([transfer])
            demand.record.outcome = "failed"
            self.release(demand.key)
        if demand.key in self.policy:
            self.policy.remove(demand.key)

    def finish(self) -> None:
        """End of a run: prefetches nobody used are wasted or cancelled; returns when their slots are quiet."""
        for key in list(self.staged):
            if key in self.policy:
                self.policy.remove(key)
            self._unstage(key)
        while self.draining:
            self.transfers.wait_any([record.transfer for record, _ in self.draining])
            self._collect_drained()

    def _submit(self, key: ExpertKey, slot: int, kind: str, lookahead: int) -> TransferRecord:
        self.slots[key] = slot
        transfer = self.transfers.submit(key, slot, demand=kind != "prefetch")
        record = TransferRecord(transfer, kind, self.sequence, self.step, lookahead)
        if kind != "prefetch":
            record.outcome = kind
        self.records.append(record)
        return record

    def _confirm(self, key: ExpertKey, transient: bool, found: LookUp) -> None:
        """Sort a needed expert, now a member or a transient, into hit, late or miss by the state of its bytes."""
        record = self.staged.pop(key, None)
        if record is not None and record.transfer.state is TransferState.FAILED:
            record.outcome = "failed"
            self.pool.release(self.slots.pop(key))
            record = None
        if record is None:
            if key not in self.slots:
                found.misses.append(Demand(key, None, transient))
                return
            found.hits.append(key)
        elif record.transfer.state is TransferState.DONE:
            self._judge(record, "useful")
            self.pool.publish(key, self.slots[key])
            found.hits.append(key)
        elif record.transfer.state is TransferState.QUEUED:  # nothing had moved yet: to the layer this is a plain miss
            record.outcome = "demand"
            self._learn(True)  # the guess was right, the link too slow
            self.transfers.promote(record.transfer)
            found.misses.append(Demand(key, record, transient))
            return
        else:
            self._judge(record, "useful")
            record.late = True
            self.transfers.promote(record.transfer)
            found.late.append(Demand(key, record, transient))
            return
        if transient:
            found.transient_hits.append(key)

    def _acquire_for(self, demand: Demand) -> int | None:
        slot = self.pool.acquire()
        while slot is None and not demand.transient and self.draining:  # its reserved slot is still being written
            self.transfers.wait_any([record.transfer for record, _ in self.draining])
            self._collect_drained()
            slot = self.pool.acquire()
        return slot

    def _expire(self, layer: int, in_use: Collection[ExpertKey]) -> None:
        if self.considered:
            for key in [key for key in self.considered if key.layer == layer]:
                self.considered.remove(key)
                self._learn(key in in_use)
        if not self.policy_admits:
            for key in [key for key in self.staged if key.layer == layer and key not in in_use]:
                self._unstage(key)

    def _evict(self, victims: Iterable[ExpertKey]) -> None:
        for victim in victims:
            if victim in self.staged:
                self._unstage(victim)
            elif victim in self.slots:
                self.release(victim)

    def _unstage(self, key: ExpertKey) -> None:
        record, slot = self.staged.pop(key), self.slots.pop(key)
        self.transfers.cancel(record.transfer)
        self.draining.append((record, slot))
        self._collect_drained()

    def _collect_drained(self) -> None:
        still = []
        for record, slot in self.draining:
            if not record.transfer.settled:
                still.append((record, slot))
                continue
            outcomes = {TransferState.DONE: "wasted", TransferState.FAILED: "failed"}
            self._judge(record, outcomes.get(record.transfer.state, "cancelled"))
            self.pool.release(slot)
        self.draining = still

    def _judge(self, record: TransferRecord, outcome: str) -> None:
        record.outcome = outcome
        self._learn(outcome == "useful")

    def _learn(self, useful: bool) -> None:
        self.useful_share += USEFUL_WEIGHT * (useful - self.useful_share)
