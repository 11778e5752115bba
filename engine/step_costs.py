"""How long a step takes by the tokens that it computes, learnt from the steps that ran."""

from bisect import bisect_left

# The weight of the newest step among those of about as many tokens.
_NEWEST = 0.2


class StepCosts:
    """A curve through measured steps: one point for each power of two of tokens.

    A step has a floor, since it reads all weights however few its tokens are, and from some number
    of tokens on it grows with them. In between, where prefills batch for nothing, lies what is
    to be known; so points are kept apart rather than fitted by a line.
    """

    def __init__(self) -> None:
        # By ``num_tokens.bit_length()``: mean tokens, mean seconds.
        self._points: dict[int, tuple[float, float]] = {}
        self._curve: tuple[list[float], list[float]] | None = None

    def observe(self, num_tokens: int, seconds: float) -> None:
        """A step of so many tokens took so long."""
        assert num_tokens > 0 and seconds >= 0.0, (num_tokens, seconds)
        bucket = num_tokens.bit_length()
        tokens, mean_s = self._points.get(bucket, (float(num_tokens), seconds))
        self._points[bucket] = (
            tokens + _NEWEST * (num_tokens - tokens),
            mean_s + _NEWEST * (seconds - mean_s),
        )
        self._curve = None

    def predict(self, num_tokens: int) -> float | None:
        """Seconds of a step of so many tokens; None before any was observed.

        Between two points a line; below the first the first; beyond the last in proportion, as
        where a step is bound by arithmetic.
        """
        if not self._points:
            return None
        tokens, seconds = self._rising_curve()
        after = bisect_left(tokens, num_tokens)
        if after == 0:
            return seconds[0]
        if after == len(tokens):
            return seconds[-1] * num_tokens / tokens[-1]
        share = (num_tokens - tokens[after - 1]) / (tokens[after] - tokens[after - 1])
        return seconds[after - 1] + share * (seconds[after] - seconds[after - 1])

    def _rising_curve(self) -> tuple[list[float], list[float]]:
        """The points in order; more tokens never take less time, whatever one slow step says."""
        if self._curve is None:
            tokens, seconds = [], []
            highest = 0.0
            for _, (mean_tokens, mean_s) in sorted(self._points.items()):
                highest = max(highest, mean_s)
                tokens.append(mean_tokens)
                seconds.append(highest)
            self._curve = tokens, seconds
        return self._curve
