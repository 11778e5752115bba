"""Hands out ranges of an arena, first fit, and merges what comes back."""

from bisect import bisect_left


class FreeList:
    """The free ranges ``[start, stop)`` of ``[0, num_bytes)``, in order, no two touching."""

    def __init__(self, num_bytes: int) -> None:
        self._free: list[tuple[int, int]] = [(0, num_bytes)] if num_bytes else []
        self.num_free = num_bytes

    def allocate(self, num_bytes: int) -> int | None:
        """The start of ``num_bytes`` bytes that are now taken; None if no free range has them."""
        assert num_bytes > 0
        for index, (start, stop) in enumerate(self._free):
            if stop - start < num_bytes:
                continue
            if stop - start == num_bytes:
                del self._free[index]
            else:
                self._free[index] = (start + num_bytes, stop)
            self.num_free -= num_bytes
            return start
        return None

    def free(self, start: int, num_bytes: int) -> None:
        """Takes back ``num_bytes`` bytes from ``start`` on, all of which were handed out."""
        stop = start + num_bytes
        index = bisect_left(self._free, (start, stop))
        before = self._free[index - 1] if index > 0 else None
        after = self._free[index] if index < len(self._free) else None
        assert before is None or before[1] <= start, "freed twice"
        assert after is None or stop <= after[0], "freed twice"
        first, last = index, index
        if before is not None and before[1] == start:
            first, start = index - 1, before[0]
        if after is not None and after[0] == stop:
            last, stop = index + 1, after[1]
        self._free[first:last] = [(start, stop)]
        self.num_free += num_bytes
