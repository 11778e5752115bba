"""When the next step is to be launched, while the one before it runs.

The earlier a step is launched, the less it knows: a request that arrives behind its launch, or an
adapter that becomes resident, waits for the step after it. So the launch comes as late as it may
without the device falling idle. That is known where steps repeat: a decode of the same sequences'
adapters takes as long as the last one did. Every other step is followed by the next at once.
"""

from collections import deque

from engine.plan import StepPlan
from ipc.messages import AdapterId

# On top of what launching takes: a thread that sleeps wakes late.
_MARGIN_S = 0.0004
_NUM_RECENT = 4
_LEAST_RECENT = 2
# Of a launch that took long, what the next ones are still expected to take.
_FADING = 0.95

Kind = tuple[AdapterId | None, ...]


class StepPacer:
    """Knows how long the latest decodes took, and how long the host takes to launch one.

    Times are those of one clock, in seconds. Used on the step thread.
    """

    def __init__(self) -> None:
        self._kind: Kind | None = None
        self._recent_s: deque[float] = deque(maxlen=_NUM_RECENT)
        self._launch_s = 0.0

    def launch_took(self, seconds: float) -> None:
        """From the turn's begin until the step was with the device."""
        self._launch_s = max(seconds, _FADING * self._launch_s)

    def step_took(self, plan: StepPlan, seconds: float) -> None:
        """The device was at the step for so long."""
        kind = _kind(plan)
        if kind != self._kind:
            self._kind = kind
            self._recent_s.clear()
        if kind is not None:
            self._recent_s.append(seconds)

    def next_launch_s(self, plan: StepPlan, began_s: float) -> float | None:
        """When to launch what follows ``plan``, which the device began at ``began_s``.

        None: nobody knows when it will be done, so at once.
        """
        if len(self._recent_s) < _LEAST_RECENT or _kind(plan) != self._kind:
            return None
        return began_s + min(self._recent_s) - self._launch_s - _MARGIN_S


def _kind(plan: StepPlan) -> Kind | None:
    """What decides how long a decode takes; None for other steps."""
    if plan.layer_group is not None or any(chunk.num_tokens != 1 for chunk in plan.chunks):
        return None
    return tuple(chunk.sequence.adapter_id for chunk in plan.chunks)
