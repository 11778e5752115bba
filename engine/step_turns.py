"""Whose turn the next step is, where prefills are launched apart from decodes.

On a GPU decodes are a graph, launched at once, and prefills are hundreds of kernels, launched one
by one. In one step the decodes' tokens would wait for the prefills' end, and those for the decodes.
So a step has either, and its tokens are delivered when they are there:

| the step has | when                                                                              |
|--------------|-----------------------------------------------------------------------------------|
| prefills     | there are any, and the step before had decodes                                    |
| layers       | a prefill goes through them in groups, and since the last decodes there were less |
|              | than ``most_between_decodes`` tokens of groups and prefills                       |
| decodes      | else                                                                              |

So decodes wait for so many tokens at most, and prefills for one decode. A prompt longer than that
is not cut into chunks of tokens, each of which would read all weights again, but goes through the
layers in groups (``engine.layer_jobs``). While nobody decodes, a step has as many tokens as it may.
"""

from dataclasses import dataclass

from engine.plan import StepPlan


@dataclass(slots=True)
class PrefillRoom:
    """What a step under construction may still have of prefills, in tokens through all layers.

    ``for_chunks`` go through all layers at once, ``for_layers`` through groups of them. With
    ``either`` only one of the two is taken. A chunk that fits into ``longest`` is not cut.
    """

    for_chunks: int
    for_layers: int
    longest: int | None = None
    either: bool = False

    @classmethod
    def together(cls, budget: int) -> "PrefillRoom":
        """Of a step that may have both, and where chunks are cut to what is left."""
        return cls(budget, budget)

    @property
    def is_full(self) -> bool:
        return not self.for_chunks and not self.for_layers

    def is_too_small_for(self, num_tokens: int) -> bool:
        """Whether no step now could have such a prefill whole, so that groups are the better."""
        return self.longest is not None and num_tokens > self.longest

    def takes_chunk_of(self, num_tokens: int) -> bool:
        """Whether a prefill of so many tokens may be begun, or go on, as a chunk."""
        if self.longest is None or num_tokens > self.longest:
            return self.for_chunks > 0
        return num_tokens <= self.for_chunks

    def take_chunk(self, num_tokens: int) -> None:
        """A chunk of so many tokens is in the step."""
        self.for_chunks -= num_tokens
        self.for_layers = 0 if self.either else self.for_layers - num_tokens

    def take_layers(self, num_tokens: int) -> None:
        """A group that costs so much is in the step: there is only one."""
        self.for_chunks = 0 if self.either else self.for_chunks - num_tokens
        self.for_layers = 0 if self.either else self.for_layers - num_tokens


class StepTurns:
    """Keeps count of what was launched since the last decodes. Owned by the scheduler.

    ``most_in_step`` and ``most_between_decodes`` are tokens through all layers.
    """

    def __init__(self, most_in_step: int, most_between_decodes: int) -> None:
        self._most_in_step = most_in_step
        self._most_between_decodes = most_between_decodes
        self._num_between = 0
        self._has_decodes = False

    def begin_step(self, beside_decodes: bool) -> PrefillRoom:
        """A step is to be planned: the room for prefills in it; whether anybody could decode."""
        self._has_decodes = False
        if not beside_decodes:
            most = self._most_in_step
            return PrefillRoom(most, most, longest=most, either=True)
        for_layers = max(0, self._most_between_decodes - self._num_between)
        # One step that reads all weights is enough between two decodes, however few its tokens.
        for_chunks = 0 if self._num_between else for_layers
        return PrefillRoom(for_chunks, for_layers, self._most_between_decodes, either=True)

    def take_decodes(self) -> None:
        """The step that is being planned is the decodes'."""
        self._has_decodes = True

    def launched(self, plan: StepPlan) -> None:
        """What was planned is in flight."""
        self._num_between = 0 if self._has_decodes else self._num_between + plan.num_tokens
