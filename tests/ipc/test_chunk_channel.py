"""Chunks announced and given back over a Unix connection."""

import select
import socket
from collections.abc import Iterator

import pytest

from ipc.chunk_channel import ChunkChannel
from ipc.messages import ChunkReady, ChunkReleased, LoadId

LoaderEnd = ChunkChannel[ChunkReady, ChunkReleased]
EngineEnd = ChunkChannel[ChunkReleased, ChunkReady]


@pytest.fixture
def ends() -> Iterator[tuple[LoaderEnd, EngineEnd]]:
    loader, engine = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    channels: tuple[LoaderEnd, EngineEnd]
    channels = (ChunkChannel(loader, ChunkReleased), ChunkChannel(engine, ChunkReady))
    yield channels
    for channel in channels:
        channel.close()


def test_messages_arrive_one_by_one_in_their_order(ends: tuple[LoaderEnd, EngineEnd]) -> None:
    loader, engine = ends
    announced = [ChunkReady(LoadId(1 << 40), chunk, chunk << 30, 1 << 25) for chunk in range(4)]
    for chunk in announced:
        assert loader.send(chunk)
    assert [engine.receive() for _ in announced] == announced
    assert engine.send(ChunkReleased(3))
    assert loader.receive() == ChunkReleased(3)


def test_what_was_said_before_the_end_is_heard_before_it(
    ends: tuple[LoaderEnd, EngineEnd],
) -> None:
    loader, engine = ends
    loader.send(ChunkReady(LoadId(1), 0, 0, 1))
    loader.close()
    assert engine.receive() == ChunkReady(LoadId(1), 0, 0, 1)
    assert engine.receive() is None


def test_sending_to_a_peer_that_is_gone_says_so(ends: tuple[LoaderEnd, EngineEnd]) -> None:
    loader, engine = ends
    loader.close()
    assert not engine.send(ChunkReleased(0))


def test_an_unread_message_of_the_other_side_is_no_obstacle_to_its_end(
    ends: tuple[LoaderEnd, EngineEnd],
) -> None:
    loader, engine = ends
    engine.send(ChunkReleased(0))
    loader.close()
    assert engine.receive() is None


def test_a_malformed_message_counts_as_the_end(
    ends: tuple[LoaderEnd, EngineEnd], caplog: pytest.LogCaptureFixture
) -> None:
    loader, engine = ends
    # Its own kind of message, but not the one that the engine hears.
    LoaderEnd.send(loader, ChunkReleased(1))  # type: ignore[arg-type]
    assert engine.receive() is None
    assert "malformed" in caplog.text


def test_a_channel_can_be_waited_for(ends: tuple[LoaderEnd, EngineEnd]) -> None:
    loader, engine = ends
    assert not select.select([engine], [], [], 0)[0]
    loader.send(ChunkReady(LoadId(1), 0, 0, 1))
    assert select.select([engine], [], [], 10)[0] == [engine]


def test_a_ring_of_a_hundred_chunks_never_fills_a_channel(
    ends: tuple[LoaderEnd, EngineEnd],
) -> None:
    loader, _ = ends
    assert all(loader.send(ChunkReady(LoadId(1), chunk, 1 << 40, 1)) for chunk in range(100))
