"""A cache that does not begin empty: it is told of experts worth having before the first token (PreScope, arXiv 2509.23638)."""

from __future__ import annotations

from collections.abc import Sequence

from prefetch.cache.base import CachePolicy
from prefetch.geometry import ExpertKey


def warm_start(policy: CachePolicy, hottest_first: Sequence[ExpertKey]) -> list[ExpertKey]:
    """Fill an empty `policy`, as if a router had selected each expert twice in a row, the hottest last.

    Twice, because a segmented policy keeps proven experts apart; the hottest last, because whatever then has to leave is colder.

    Returns:
        the members, hottest first: what has to be brought in.
    """
    for key in reversed(hottest_first):
        policy.insert(key)
        if key in policy:
            policy.access(key)
    return [key for key in hottest_first if key in policy]
