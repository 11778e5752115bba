"""With which token a sequence ends, and why."""

from engine.scheduler_limits import SchedulerLimits
from engine.sequence import Sequence
from ipc.messages import FinishReason


class FinishRules:
    """Ends sequences by what they drew and by their length."""

    def __init__(self, limits: SchedulerLimits) -> None:
        self._eos_token_ids = limits.eos_token_ids
        self._max_sequence_tokens = limits.max_sequence_tokens

    def reason(self, sequence: Sequence, token_id: int) -> FinishReason | None:
        """Why ``token_id``, the sequence's newest token that is known, is its last; or None."""
        sampling = sequence.sampling
        num_output_tokens = sequence.num_output_tokens
        if num_output_tokens >= sampling.min_tokens:
            ends = not sampling.ignore_eos and token_id in self._eos_token_ids
            if ends or token_id in sampling.stop_token_ids:
                return FinishReason.STOP
        # A step that draws one more was launched only if this was not to be the last.
        if not sequence.num_pending_tokens and self.reaches_length(sequence):
            return FinishReason.LENGTH
        return None

    def reaches_length(self, sequence: Sequence) -> bool:
        """Whether no token may follow those that are drawn, pending ones among them."""
        return (
            sequence.num_drawn_tokens >= sequence.max_tokens
            or sequence.num_tokens >= self._max_sequence_tokens
        )
