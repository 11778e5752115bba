"""The states of the staging ring's chunks, as each side of it sees them.

| state   | who may touch the bytes | left by                                              |
|---------|-------------------------|------------------------------------------------------|
| FREE    | nobody                  | the loader takes it: FILLING                         |
| FILLING | the loader writes       | its copy is complete; it sends ``ChunkReady``: READY |
| READY   | nobody                  | the placer takes it: COPYING                         |
| COPYING | the engine reads        | its copy is complete; ``ChunkReleased``: FREE        |

Neither side can see all of it: for the loader, READY and COPYING are one (``sent``); for the
engine, FREE and FILLING are one (the loader's). Each ledger refuses a transition that its table
does not have, because a chunk in two hands is one adapter's bytes in another's slot.
"""

from collections import deque
from enum import Enum

from ipc.errors import Internal


class ChunkState(Enum):
    FREE = "free"
    FILLING = "filling"
    READY = "ready"
    COPYING = "copying"


class RingWriter:
    """The loader's ledger: which chunks it may fill. Owned by the stager."""

    def __init__(self, num_chunks: int) -> None:
        self._states = [ChunkState.FREE] * num_chunks
        self._free = deque(range(num_chunks))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self) -> int | None:
        """A free chunk, now FILLING; None when the engine holds all of them."""
        if not self._free:
            return None
        chunk = self._free.popleft()
        self._states[chunk] = ChunkState.FILLING
        return chunk

    def sent(self, chunk: int) -> None:
        """The chunk is complete and was announced."""
        self._expect(chunk, ChunkState.FILLING)
        self._states[chunk] = ChunkState.READY

    def put_back(self, chunk: int) -> None:
        """The chunk was taken but will not be announced: its load has ended."""
        self._expect(chunk, ChunkState.FILLING)
        self._make_free(chunk)

    def released(self, chunk: int) -> None:
        """The engine gave the chunk back. Raises ``Internal`` if it was not the engine's."""
        self._expect(chunk, ChunkState.READY)
        self._make_free(chunk)

    def _make_free(self, chunk: int) -> None:
        self._states[chunk] = ChunkState.FREE
        self._free.append(chunk)

    def _expect(self, chunk: int, state: ChunkState) -> None:
        _check_chunk(chunk, len(self._states))
        if self._states[chunk] is not state:
            raise Internal(
                f"chunk {chunk} of the staging ring: expected {state.value},"
                f" got {self._states[chunk].value}"
            )


class RingReader:
    """The engine's ledger: which chunks were announced and not given back. Owned by the placer."""

    def __init__(self, num_chunks: int) -> None:
        self._states = [ChunkState.FREE] * num_chunks

    @property
    def num_held(self) -> int:
        """Chunks that are the engine's now."""
        return sum(state is not ChunkState.FREE for state in self._states)

    def ready(self, chunk: int) -> None:
        """The loader announced the chunk. Raises ``Internal`` if it was the engine's already."""
        self._move(chunk, ChunkState.FREE, ChunkState.READY)

    def copying(self, chunk: int) -> None:
        """A copy out of the chunk begins."""
        self._move(chunk, ChunkState.READY, ChunkState.COPYING)

    def free(self, chunk: int) -> None:
        """Nothing reads the chunk any more: its copy is complete, or it was never begun."""
        _check_chunk(chunk, len(self._states))
        if self._states[chunk] is ChunkState.FREE:
            raise Internal(f"chunk {chunk} of the staging ring is given back twice")
        self._states[chunk] = ChunkState.FREE

    def reclaim(self) -> list[int]:
        """The loader is dead: every READY chunk is dropped; returns those still COPYING."""
        for chunk, state in enumerate(self._states):
            if state is ChunkState.READY:
                self._states[chunk] = ChunkState.FREE
        return [c for c, state in enumerate(self._states) if state is ChunkState.COPYING]

    def _move(self, chunk: int, expected: ChunkState, state: ChunkState) -> None:
        _check_chunk(chunk, len(self._states))
        if self._states[chunk] is not expected:
            raise Internal(
                f"chunk {chunk} of the staging ring: expected {expected.value},"
                f" got {self._states[chunk].value}"
            )
        self._states[chunk] = state


def _check_chunk(chunk: int, num_chunks: int) -> None:
    if not 0 <= chunk < num_chunks:
        raise Internal(f"chunk {chunk} of the staging ring: expected one of [0, {num_chunks})")
