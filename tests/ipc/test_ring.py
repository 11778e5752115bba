"""Chunk states: a chunk is never in two hands."""

import os
import random

import pytest

from ipc.errors import Internal
from ipc.messages import Epoch, RingGrant, RingKind
from ipc.ring import RingReader, RingWriter
from ipc.ring_memory import HostRing


def test_a_chunk_is_taken_by_one_load_at_a_time() -> None:
    writer = RingWriter(2)
    assert {writer.take(), writer.take()} == {0, 1}
    assert writer.take() is None


def test_a_chunk_can_not_be_released_before_it_was_sent() -> None:
    writer = RingWriter(1)
    writer.take()
    with pytest.raises(Internal, match=r"chunk 0 .* expected ready, got filling"):
        writer.released(0)


def test_a_chunk_that_is_the_engines_can_not_be_announced_again() -> None:
    reader = RingReader(2)
    reader.ready(1)
    with pytest.raises(Internal, match=r"chunk 1 .* expected free, got ready"):
        reader.ready(1)


def test_a_chunk_can_not_be_given_back_twice() -> None:
    reader = RingReader(1)
    reader.ready(0)
    reader.free(0)
    with pytest.raises(Internal, match="given back twice"):
        reader.free(0)


@pytest.mark.parametrize("chunk", [-1, 2])
def test_a_chunk_outside_the_ring_is_refused(chunk: int) -> None:
    with pytest.raises(Internal, match=r"expected one of \[0, 2\)"):
        RingReader(2).ready(chunk)


def test_reclaiming_drops_what_is_ready_and_names_what_is_still_copied() -> None:
    reader = RingReader(3)
    reader.ready(0)
    reader.ready(2)
    reader.copying(2)
    assert reader.reclaim() == [2]
    assert reader.num_held == 1


def test_both_ledgers_agree_after_any_sequence_of_loads() -> None:
    seed = 7
    chooser = random.Random(seed)
    writer, reader = RingWriter(4), RingReader(4)
    filling: list[int] = []
    held: list[int] = []
    for _ in range(2000):
        action = chooser.choice(["take", "send", "put back", "free"])
        if action == "take" and (chunk := writer.take()) is not None:
            filling.append(chunk)
        elif action == "send" and filling:
            chunk = filling.pop(chooser.randrange(len(filling)))
            writer.sent(chunk)
            reader.ready(chunk)
            held.append(chunk)
        elif action == "put back" and filling:
            writer.put_back(filling.pop())
        elif action == "free" and held:
            chunk = held.pop(chooser.randrange(len(held)))
            reader.copying(chunk)
            reader.free(chunk)
            writer.released(chunk)
        assert writer.num_free + len(filling) + len(held) == 4, f"seed {seed}"
        assert reader.num_held == len(held), f"seed {seed}"


def test_bytes_written_by_the_loader_are_read_by_the_engine() -> None:
    engine = HostRing.create(num_chunks=2, chunk_bytes=4096)
    loader = HostRing.attach(os.dup(engine.fd), RingGrant(Epoch(1), RingKind.HOST, 2, 4096))
    loader.write(1, [memoryview(b"ada"), memoryview(b"pter")])
    loader.synchronize(1)
    assert bytes(engine.chunk(1)[:7]) == b"adapter"
    assert bytes(engine.chunk(0)) == bytes(4096)
    loader.close()
    assert bytes(engine.chunk(1)[:7]) == b"adapter"
    engine.close()
