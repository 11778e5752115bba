"""What the device's time goes to, and what loads cost the steps beside them.

The device's own time of pure decode steps is compared, with loads and without: it is what loads
can slow down by the memory and the bus that they take. The gap between two tokens would be no such
measure, as prefills come in between, and most prefills come with a load.
"""

from engine.histogram import STEP_SECONDS, Histogram
from engine.plan import StepPlan
from ipc.messages import LoadId
from ipc.stats import StepStats

# The weight of the newest quiet step: contexts grow, so what was long ago tells little.
_NEWEST = 0.1
# More than the bit length of any number of adapters in a step.
_ADAPTER_CLASSES = 32


class StepMeter:
    """Counts complete steps as ``StepStats`` says. Owned by the step thread.

    A step costs it some additions, a look-up and a pass over its sequences. It keeps one mean for
    each number of sequences and class of numbers of adapters that it has seen, the class being the
    number's bit length.
    """

    def __init__(self) -> None:
        self._num_decodes = self._num_prefills = self._num_layers = 0
        self._decode_s = self._prefill_s = self._layers_s = 0.0
        self._beside_loads = Histogram(STEP_SECONDS)
        self._without_loads = Histogram(STEP_SECONDS)
        self._bystander_s = 0.0
        self._expected_s = 0.0
        self._quiet_s: dict[int, float] = {}
        self._was_loading = False
        self._last_load: LoadId | None = None

    @property
    def num_steps(self) -> int:
        return self._num_decodes + self._num_prefills + self._num_layers

    def completed(
        self, plan: StepPlan, seconds: float, is_loading: bool, last_load: LoadId | None
    ) -> None:
        """The device was at the step for ``seconds``, behind the one that was completed before.

        ``is_loading``: some load is under way; ``last_load`` is the one that began last, which may
        be over.
        """
        # One that began and ended within the step is seen by its id alone.
        beside_loads = is_loading or self._was_loading or last_load != self._last_load
        self._was_loading, self._last_load = is_loading, last_load
        if plan.is_decode:
            self._num_decodes += 1
            self._decode_s += seconds
            self._decoded(plan, seconds, beside_loads)
        elif plan.chunks:
            self._num_prefills += 1
            self._prefill_s += seconds
        else:
            self._num_layers += 1
            self._layers_s += seconds

    def stats(self) -> StepStats:
        """All so far."""
        return StepStats(
            num_decodes=self._num_decodes,
            num_prefills=self._num_prefills,
            num_layers=self._num_layers,
            decode_seconds=self._decode_s,
            prefill_seconds=self._prefill_s,
            layers_seconds=self._layers_s,
            beside_loads=self._beside_loads.counts(),
            without_loads=self._without_loads.counts(),
            bystander_seconds=self._bystander_s,
            quiet_seconds=self._expected_s,
        )

    def _decoded(self, plan: StepPlan, seconds: float, beside_loads: bool) -> None:
        kind = len(plan.chunks) * _ADAPTER_CLASSES + len(plan.adapter_ids).bit_length()
        quiet_s = self._quiet_s.get(kind)
        if not beside_loads:
            self._without_loads.observe(seconds)
            before_s = seconds if quiet_s is None else quiet_s
            self._quiet_s[kind] = before_s + _NEWEST * (seconds - before_s)
            return
        self._beside_loads.observe(seconds)
        if quiet_s is not None:
            self._bystander_s += seconds
            self._expected_s += quiet_s
