"""How long a process that died waits before it is started again."""

from dataclasses import dataclass

FIRST_DELAY_S = 0.25
MAX_DELAY_S = 8.0
# A process that lived this long died of something else than its start.
STABLE_S = 30.0


@dataclass
class Backoff:
    """The first restart is due at once, each that follows a short life after twice the last wait.

    A life of ``stable_s`` makes the next death a first one again.
    """

    first_delay_s: float = FIRST_DELAY_S
    max_delay_s: float = MAX_DELAY_S
    stable_s: float = STABLE_S
    _next_delay_s: float = 0.0

    def after(self, lived_s: float) -> float:
        """Seconds to wait before the restart of a process that has lived ``lived_s``."""
        delay_s = 0.0 if lived_s >= self.stable_s else self._next_delay_s
        self._next_delay_s = min(max(2 * delay_s, self.first_delay_s), self.max_delay_s)
        return delay_s
