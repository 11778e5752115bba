"""The running sequences that have one token to compute."""

from engine.displacement import Displacement
from engine.finish_rules import FinishRules
from engine.layer_jobs import LayerJobs
from engine.plan import ScheduledChunk, StepPlan
from engine.running_sequences import RunningSequences
from engine.sequence import Sequence, SequenceId, SequenceState


class Decodes:
    """Puts decodes into a step, and knows which of their tokens the step before draws.

    Owned by the step thread.
    """

    def __init__(
        self,
        running: RunningSequences,
        displacement: Displacement,
        finish: FinishRules,
        layer_jobs: LayerJobs,
    ) -> None:
        self._running = running
        self._displacement = displacement
        self._finish = finish
        self._layer_jobs = layer_jobs
        # Where in what the last launched step draws each sequence's token is.
        self._sample_indices: dict[SequenceId, int] = {}

    def are_due(self) -> bool:
        """Whether anybody could decode now, if there are blocks."""
        return any(map(self._may_decode, self._running))

    def schedule(self, chunks: list[ScheduledChunk]) -> None:
        """Adds everybody who can; who finds no block takes it from others that run."""
        # A copy, as preemption takes from its end: those are skipped by their state.
        for sequence in tuple(self._running):
            if sequence.state is not SequenceState.RUNNING or not self._may_decode(sequence):
                continue
            assert not self._layer_jobs.has(sequence), "a job of one token ends when it is admitted"
            if self._displacement.extend(sequence):
                chunks.append(self._decode(sequence))

    def launched(self, plan: StepPlan) -> None:
        """The step is in flight: decodes of the next one may follow its draws."""
        draws = (chunk for chunk in plan.completed_chunks if chunk.samples)
        self._sample_indices = {
            chunk.sequence.sequence_id: index for index, chunk in enumerate(draws)
        }

    def _may_decode(self, sequence: Sequence) -> bool:
        if sequence.num_uncomputed_tokens != 1:
            return False
        # Without a pending token it would have ended.
        return not sequence.num_pending_tokens or not self._finish.reaches_length(sequence)

    def _decode(self, sequence: Sequence) -> ScheduledChunk:
        pending_from = None
        if sequence.num_pending_tokens:
            pending_from = self._sample_indices[sequence.sequence_id]
        return ScheduledChunk(sequence, sequence.num_computed_tokens, 1, True, pending_from)
