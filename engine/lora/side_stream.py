"""A stream beside the current one, for as long as two pieces of work do not need each other."""

from contextlib import AbstractContextManager, nullcontext

import torch


class SideStream:
    """Owns the stream. Between a ``fork`` and its ``join``, both streams run side by side.

    In a graph that is captured meanwhile they become branches, and the edges across them full
    dependencies: nothing behind one begins before all of what stands ahead of it is done. On a CPU
    there is nothing beside the calls, which happen in their order.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def fork(self) -> AbstractContextManager[object]:
        """Within it, work goes to this stream, behind all that the current one was given so far.

        The memory of tensors that are made there is used again only there: behind a later fork, and
        so behind all that the current stream was given while they were in use.
        """
        if self._stream is None:
            return nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(self._stream)

    def join(self) -> None:
        """What the current stream is given from now on begins behind what this one was given."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
