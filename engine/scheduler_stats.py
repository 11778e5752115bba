"""What the scheduler counts."""

from dataclasses import dataclass


@dataclass(slots=True)
class SchedulerStats:
    """Counters since the start. A preempted sequence's prompt counts once.

    ``num_held_steps`` are those that could have begun a prefill which was held back for a cohort.
    """

    num_prompt_tokens: int = 0
    num_cached_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    num_preemptions: int = 0
    num_held_steps: int = 0
