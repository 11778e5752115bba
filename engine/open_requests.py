"""Requests without a terminal answer: their sequences, and what their clients get next."""

import random
from collections.abc import Iterable, Mapping

import msgspec

from engine.commands import AddRequest
from engine.plan import SequenceProgress
from engine.scheduler import Scheduler
from engine.sequence import Sequence, SequenceId
from engine.validation import duplicate_request
from ipc.errors import Overloaded, SidestreamError
from ipc.messages import AdapterId, RequestId, TokenDelta

OVERLOADED_RETRY_S = 1.0


class OpenRequests:
    """Makes sequences of requests for the scheduler, and deltas of what becomes of them.

    No more than ``max_waiting`` wait at once. Owned by the step thread.
    """

    def __init__(self, scheduler: Scheduler, max_waiting: int, seed: int) -> None:
        self._scheduler = scheduler
        self._max_waiting = max_waiting
        self._sequences: dict[tuple[bytes, RequestId], Sequence] = {}
        self._num_accepted = 0
        self._deltas: dict[bytes, list[TokenDelta]] = {}
        # Requests without a seed take theirs from here.
        self._seeds = random.Random(seed)

    @property
    def sequences(self) -> Iterable[Sequence]:
        """Those of all open requests, in order of arrival."""
        return self._sequences.values()

    def add(self, request: AddRequest) -> None:
        """The request's sequence waits; or the client gets the reason why it does not."""
        key = (request.client, request.request_id)
        try:
            if key in self._sequences:
                raise duplicate_request(request.request_id)
            if self._scheduler.num_waiting >= self._max_waiting:
                raise Overloaded(
                    f"{self._max_waiting} requests are waiting: expected fewer",
                    retry_after_s=OVERLOADED_RETRY_S,
                )
            sequence = self._sequence_of(request)
            self._scheduler.add(sequence)
        except SidestreamError as error:
            self._emit(request.client, TokenDelta(request.request_id, error=error.info))
        else:
            self._sequences[key] = sequence

    def cancel(self, client: bytes, request_id: RequestId) -> None:
        """The client wants no answer any more; nothing happens if it has it already."""
        sequence = self._sequences.pop((client, request_id), None)
        if sequence is not None:
            self._scheduler.abort(sequence)

    def drop_client(self, client: bytes) -> None:
        """Nobody wants any of the client's answers."""
        for key in [key for key in self._sequences if key[0] == client]:
            self._scheduler.abort(self._sequences.pop(key))

    def report(self, progress: SequenceProgress) -> None:
        """A token was drawn for the request, perhaps its last."""
        sequence, sampled = progress.sequence, progress.sampled
        delta = TokenDelta(
            sequence.request_id,
            [sampled.token_id],
            None if sampled.logprobs is None else [sampled.logprobs],
            progress.finish_reason,
            num_cached_tokens=sequence.num_cached_tokens if sequence.num_output_tokens == 1 else 0,
        )
        self._emit(sequence.client, delta)
        if progress.finish_reason is not None:
            del self._sequences[sequence.client, sequence.request_id]

    def fail_adapter(self, adapter_id: AdapterId, error: SidestreamError) -> None:
        """Everyone who waits for the adapter is answered with ``error``."""
        for sequence in self._scheduler.fail_adapter(adapter_id):
            del self._sequences[sequence.client, sequence.request_id]
            self._emit(sequence.client, TokenDelta(sequence.request_id, error=error.info))

    def take_deltas(self) -> Mapping[bytes, list[TokenDelta]]:
        """By client, what is to be delivered since the last call."""
        deltas, self._deltas = self._deltas, {}
        return deltas

    def _sequence_of(self, request: AddRequest) -> Sequence:
        sampling = request.sampling
        if sampling.seed is None and sampling.temperature > 0:
            sampling = msgspec.structs.replace(sampling, seed=self._seeds.getrandbits(63))
        self._num_accepted += 1
        return Sequence(
            sequence_id=SequenceId(self._num_accepted),
            client=request.client,
            request_id=request.request_id,
            adapter_id=request.adapter_id,
            token_ids=request.prompt_token_ids,
            num_prompt_tokens=len(request.prompt_token_ids),
            max_tokens=request.max_tokens,
            sampling=sampling,
            arrival_s=request.arrival_s,
        )

    def _emit(self, client: bytes, delta: TokenDelta) -> None:
        self._deltas.setdefault(client, []).append(delta)
