"""A device that lags as far behind the host as it may, running a model that can be predicted.

A step runs only once somebody waits for it or for a later one. What the host changed meanwhile is
then in place, so whatever a step would read too late, or write over, is found.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from engine.plan import LayerGroup, SampledToken, ScheduledChunk, StepPlan
from engine.sequence import Sequence
from ipc.messages import AdapterId, FinishReason
from tests.engine.builders import BASE, EOS

ALL_LAYERS = range(BASE.num_layers)
VOCABULARY = (EOS, 1, 1, 2, 3, 4)


def first_key(adapter_id: AdapterId | None) -> int:
    return hash((0 if adapter_id is None else adapter_id,))


def next_key(key: int, token_id: int) -> int:
    """What the cache holds for a token: it depends on the adapter and on all tokens before."""
    return hash((key, token_id))


def draw(key: int) -> int:
    """The token that follows the one with this key."""
    return VOCABULARY[key % len(VOCABULARY)]


def answer(sequence: Sequence, max_sequence_tokens: int) -> tuple[list[int], FinishReason]:
    """What a sequence is answered if nothing interferes, by an obvious loop."""
    prompt = sequence.token_ids[: sequence.num_prompt_tokens]
    key = first_key(sequence.adapter_id)
    for token_id in prompt:
        key = next_key(key, token_id)
    output: list[int] = []
    sampling = sequence.sampling
    while True:
        output.append(draw(key))
        key = next_key(key, output[-1])
        if output[-1] == EOS and not sampling.ignore_eos and len(output) >= sampling.min_tokens:
            return output, FinishReason.STOP
        if len(output) == sequence.max_tokens or len(prompt + output) == max_sequence_tokens:
            return output, FinishReason.LENGTH


@dataclass(frozen=True)
class LateChunk:
    """All that a launch of ``layers`` of a chunk hands over; what the sequence becomes later is not
    seen. ``job`` is the chunk that goes through the layers in groups."""

    layers: range
    job: ScheduledChunk | None
    adapter_id: AdapterId | None
    known: tuple[int, ...]
    pending_from: int | None
    start: int
    block_table: tuple[int, ...]
    samples: bool
    read_adapter: Callable[[], None]


@dataclass(eq=False)
class LateStep:
    device: "LateDevice"
    number: int
    chunks: list[LateChunk]
    drawn: list[int] = field(default_factory=list)

    def is_done(self) -> bool:
        return self.device.has_run(self.number)

    def device_s(self) -> float:
        return 0.01

    def wait(self) -> list[SampledToken]:
        self.device.run_up_to(self.number + 1)
        return [SampledToken(token_id, None) for token_id in self.drawn]


class LateDevice:
    """Owns the keys of every layer of every block. Called with an adapter and layers at a step's
    launch, ``see_adapter`` gives what is to be called when the step reads them."""

    def __init__(
        self,
        block_size: int,
        see_adapter: Callable[[AdapterId, range], Callable[[], None]] = lambda _, layers: (
            lambda: None
        ),
    ) -> None:
        self.num_launched = 0
        self.num_run = 0
        self._block_size = block_size
        self._see_adapter = see_adapter
        self._steps: deque[LateStep] = deque()
        self._keys: dict[tuple[int, int, int], int] = {}
        # The job whose hidden states are kept, and the layer that they stand before.
        self._kept: tuple[ScheduledChunk, int] | None = None
        self._last_drawn: list[int] = []

    def launch(self, plan: StepPlan) -> LateStep:
        assert not plan.is_empty, "an empty step is not launched"
        chunks = [self._late(chunk) for chunk in plan.chunks]
        if plan.layer_group is not None:
            chunks.append(self._late(plan.layer_group.chunk, plan.layer_group))
        step = LateStep(self, self.num_launched, chunks)
        self._steps.append(step)
        self.num_launched += 1
        return step

    def run_up_to(self, num_steps: int) -> None:
        """Runs what has not run yet of the first ``num_steps`` steps."""
        while self.num_run < num_steps:
            step = self._steps.popleft()
            step.drawn = [draw(key) for key in map(self._compute, step.chunks) if key is not None]
            self._last_drawn = step.drawn
            self.num_run += 1

    def has_run(self, number: int) -> bool:
        return number < self.num_run

    def _late(self, chunk: ScheduledChunk, group: LayerGroup | None = None) -> LateChunk:
        sequence = chunk.sequence
        layers = ALL_LAYERS if group is None else group.layers
        end = chunk.start + chunk.num_tokens
        known = tuple(sequence.token_ids[:end])
        assert len(known) == end - (chunk.pending_from is not None)
        return LateChunk(
            layers,
            None if group is None else chunk,
            sequence.adapter_id,
            known,
            chunk.pending_from,
            chunk.start,
            tuple(sequence.block_table),
            chunk.samples and layers.stop == ALL_LAYERS.stop,
            (lambda: None)
            if sequence.adapter_id is None
            else self._see_adapter(sequence.adapter_id, layers),
        )

    def _compute(self, chunk: LateChunk) -> int | None:
        """Checks that every key that is read is the chunk's own, and writes the new ones."""
        chunk.read_adapter()
        if chunk.job is not None:
            assert chunk.layers.start == 0 or self._kept == (chunk.job, chunk.layers.start)
            self._kept = (chunk.job, chunk.layers.stop)
        tokens = list(chunk.known)
        if chunk.pending_from is not None:
            tokens.append(self._last_drawn[chunk.pending_from])
        key = first_key(chunk.adapter_id)
        for position, token_id in enumerate(tokens):
            key = next_key(key, token_id)
            place = (chunk.block_table[position // self._block_size], position % self._block_size)
            for layer in chunk.layers:
                if position < chunk.start:
                    assert self._keys[layer, *place] == key, "another prompt's keys"
                else:
                    self._keys[layer, *place] = key
        return key if chunk.samples else None
