"""What goes between host and device arrives as it was, whatever becomes of the memory that it went through."""

from __future__ import annotations

from array import array

import torch

from prefetch.compute.exchange import MOST_KINDS, RING_WORDS, Exchange

CPU = torch.device("cpu")


def test_what_is_fetched_stays_when_more_is_fetched() -> None:
    exchange = Exchange(CPU)
    ids, weights = torch.arange(8).view(2, 4), torch.rand(2, 4)
    first = exchange.fetch([ids, weights])
    exchange.fetch([ids + 1, weights + 1])
    assert torch.equal(first[0], ids) and torch.equal(first[1], weights)


def test_a_fetch_in_inference_mode_serves_one_outside_of_it() -> None:
    exchange = Exchange(CPU)
    with torch.inference_mode():
        exchange.fetch([torch.zeros(3)])
    assert torch.equal(exchange.fetch([torch.ones(3)])[0], torch.ones(3))


def test_memory_is_kept_for_few_kinds_of_tensors() -> None:
    exchange = Exchange(CPU)
    for n in range(1, 3 * MOST_KINDS):
        assert torch.equal(exchange.fetch([torch.full((n,), n)])[0], torch.full((n,), n))
    assert len(exchange._landings) <= MOST_KINDS


def test_what_is_sent_stays_when_the_ring_comes_round_or_grows() -> None:
    exchange = Exchange(CPU)
    sizes = [1, RING_WORDS // 2, RING_WORDS // 2, 3, 3 * RING_WORDS, 5]
    sent = [exchange.send(array("q", [index] * size)) for index, size in enumerate(sizes)]
    for index, size in enumerate(sizes):
        assert torch.equal(sent[index], torch.full((size,), index))


def test_the_ring_begins_anew_after_a_fetch() -> None:
    exchange = Exchange(CPU)
    for value in range(10):
        assert exchange.send(array("q", [value, -value])).tolist() == [value, -value]
        exchange.fetch([torch.zeros(1)])
        assert exchange._used == 0


def test_tensors_are_sent_whole() -> None:
    rows = torch.rand(3, 5)
    assert torch.equal(Exchange(CPU).send_tensor(rows), rows)
