"""When the next step is to be launched, while the one before it runs.

The earlier a step is launched, the less it knows: a request that arrives behind its launch, or an
adapter that becomes resident, or a layer of it, waits for the step after it. So the launch comes as
late as it may without the device falling idle. That is known where steps repeat:

| step                   | is expected to take                                                     |
|------------------------|-------------------------------------------------------------------------|
| decodes                | what the last ones of the same sequences' adapters did, or of others    |
| a group of layers      | for each layer what the last group did whose chunk was about as long    |

Every other step is followed by the next at once.

Where a launch came too late after all, because other threads kept the host busy, the next ones
come earlier by as much, and only slowly later again: one step in a hundred that the device had to
wait for is what everybody's slowest tokens are made of.
"""

from collections import deque

from engine.plan import LayerGroup, StepPlan
from ipc.messages import AdapterId

# On top of what launching takes: a thread that sleeps wakes late.
_MARGIN_S = 0.0004
_NUM_RECENT = 4
_LEAST_RECENT = 2
# Of a launch that took long, what the next ones are still expected to take.
_FADING = 0.95
# By how much launches are brought forward at most, and what is left of it a step later.
_MOST_LEAD_S = 0.002
_LEAD_FADING = 0.999
# Of what another step took, which was not quite the same, the part that is sure.
_SURE = 0.85

Kind = tuple[AdapterId | None, ...]


class StepPacer:
    """Knows how long the latest steps took, and how long the host takes to launch decodes.

    Times are those of one clock, in seconds. Used on the step thread.
    """

    def __init__(self) -> None:
        self._kind: Kind | None = None
        self._recent_s: deque[float] = deque(maxlen=_NUM_RECENT)
        self._decode_s: float | None = None
        # Of a layer, by the bit length of its chunk's tokens.
        self._layer_s: dict[int, float] = {}
        self._launch_s = 0.0
        self._lead_s = 0.0

    def launch_took(self, plan: StepPlan, seconds: float) -> None:
        """From the turn's begin until the step was with the device.

        Only decodes count: the device begins others with their first kernel.
        """
        if plan.is_decode:
            self._launch_s = max(seconds, _FADING * self._launch_s)

    def step_took(self, plan: StepPlan, seconds: float) -> None:
        """The device was at the step for so long."""
        if plan.layer_group is not None:
            if not plan.chunks:
                group = plan.layer_group
                self._layer_s[_size(group)] = seconds / len(group.layers)
            return
        kind = _kind(plan)
        if kind != self._kind:
            self._kind = kind
            self._recent_s.clear()
        if kind is not None:
            self._recent_s.append(seconds)
            self._decode_s = seconds

    def was_given(self, late_s: float) -> None:
        """The device had a decode's launch so long behind the end of the step before; or ahead.

        Only of those that were to be in time counts.
        """
        if late_s > 0:
            self._lead_s = min(_MOST_LEAD_S, self._lead_s + late_s)
        else:
            self._lead_s *= _LEAD_FADING

    def next_launch_s(self, plan: StepPlan, began_s: float) -> float | None:
        """When to launch what follows ``plan``, which the device began at ``began_s``.

        None: nobody knows when it will be done, so at once.
        """
        takes_s = self._expected_s(plan)
        if takes_s is None:
            return None
        return began_s + takes_s - self._launch_s - _MARGIN_S - self._lead_s

    def _expected_s(self, plan: StepPlan) -> float | None:
        """The least that the step is sure to take."""
        group = plan.layer_group
        if group is not None:
            layer_s = None if plan.chunks else self._layer_s.get(_size(group))
            return None if layer_s is None else _SURE * layer_s * len(group.layers)
        kind = _kind(plan)
        if kind is None:
            return None
        if kind == self._kind and len(self._recent_s) >= _LEAST_RECENT:
            return min(self._recent_s)
        return None if self._decode_s is None else _SURE * self._decode_s


def _kind(plan: StepPlan) -> Kind | None:
    """What decides how long a decode takes; None for other steps."""
    return tuple(chunk.sequence.adapter_id for chunk in plan.chunks) if plan.is_decode else None


def _size(group: LayerGroup) -> int:
    return group.chunk.num_tokens.bit_length()
