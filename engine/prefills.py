"""How a step takes a sequence's prefill: as a chunk of its tokens, or by groups of layers."""

from engine.layer_jobs import LayerJobs
from engine.plan import ScheduledChunk, next_chunk
from engine.sequence import Sequence
from engine.step_turns import PrefillRoom


class Prefills:
    """Gives prefills of a step's room, one sequence after the other.

    Owned by the step thread.
    """

    def __init__(self, layer_jobs: LayerJobs) -> None:
        self._layer_jobs = layer_jobs

    def has_place(self, room: PrefillRoom, sequence: Sequence) -> bool:
        """Whether the step has room for a part of the sequence's prefill."""
        if self._goes_by_layers(room, sequence):
            return room.for_layers > 0
        return room.takes_chunk_of(sequence.num_uncomputed_tokens)

    def schedule(self, chunks: list[ScheduledChunk], room: PrefillRoom, sequence: Sequence) -> bool:
        """Gives a running sequence of what is left; False if that is nothing."""
        if not self.has_place(room, sequence):
            return False
        if self._goes_by_layers(room, sequence):
            if not self._layer_jobs.has(sequence):
                self._layer_jobs.begin(sequence)
            room.take_layers(self._layer_jobs.plan(room.for_layers))
        else:
            chunk = next_chunk(sequence, room.for_chunks)
            chunks.append(chunk)
            room.take_chunk(chunk.num_tokens)
        return True

    def _goes_by_layers(self, room: PrefillRoom, sequence: Sequence) -> bool:
        if self._layer_jobs.has(sequence):
            return True
        return room.is_too_small_for(sequence.num_uncomputed_tokens) and self._layer_jobs.is_free
