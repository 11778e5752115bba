"""Captures launches into CUDA graphs that share one memory."""

from collections.abc import Callable

import torch

Replay = Callable[[], None]
Capture = Callable[[Callable[[], object]], Replay]
"""Makes of what is launched by a call what launches it again, on the same memory."""


class GraphCapture:
    """Owns the memory in which captured launches keep what they compute.

    What one graph leaves there lasts until the next replay of any. All are replayed on one stream.
    """

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, launches: Callable[[], object]) -> Replay:
        """What ``launches`` gives to the current stream, as a graph to be launched again and again.

        Nothing in it may need compiling, and nothing else may use the device meanwhile.
        """
        graph = torch.cuda.CUDAGraph()
        # Not ``torch.cuda.graph``, which synchronizes and gives the allocator's memory back: there
        # are thousands of captures.
        graph.capture_begin(pool=self._pool)
        try:
            launches()
        finally:
            graph.capture_end()
        return graph.replay
