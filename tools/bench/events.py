"""Server-sent events out of the pieces in which they arrive."""

from tools.bench.http_exchange import BadAnswer

_MAX_LINE_BYTES = 1 << 24


class EventDecoder:
    """Joins pieces to events. Fields other than ``data``, and comments, are left out.

    Source: the HTML standard, section "Server-sent events".
    """

    def __init__(self) -> None:
        self._unfinished = b""
        self._data: list[bytes] = []

    def feed(self, piece: bytes) -> list[bytes]:
        """The data of every event that ``piece`` completes, in order.

        Raises:
            BadAnswer: a line of more than 16 MiB.
        """
        lines = (self._unfinished + piece).split(b"\n")
        self._unfinished = lines.pop()
        if len(self._unfinished) > _MAX_LINE_BYTES:
            raise BadAnswer(f"a line of more than {_MAX_LINE_BYTES} bytes")
        events = []
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                events.append(b"\n".join(self._data))
                self._data.clear()
        return events
