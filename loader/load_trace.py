"""Records what becomes of each adapter in the loader: its reads, and its way into the ring."""

import threading
from pathlib import PurePath

from ipc.messages import AdapterId, LoadId
from ipc.trace import Args, Flow, Recorder


class LoadTrace:
    """Called from any of the loader's threads. An adapter is called as its folder is."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._lock = threading.Lock()
        # When the last read of each track ended: reads overlap, the spans of a track must not.
        self._tracks_end_s: list[float] = []
        self._unstaged: set[AdapterId] = set()

    def read(
        self, folder: str, adapter_id: AdapterId, num_bytes: int, begin_s: float, end_s: float
    ) -> None:
        """The whole adapter was read, from its first block to its last."""
        if not self._recorder.enabled:
            return
        with self._lock:
            number = self._free_track(begin_s)
            self._tracks_end_s[number] = end_s
            self._unstaged.add(adapter_id)
        track = f"read {number + 1}"
        name = PurePath(folder).name
        args: Args = {"adapter": name, "adapter_id": adapter_id, "bytes": num_bytes}
        self._recorder.span(track, f"read {name}", begin_s, end_s, args)
        self._recorder.flow(track, "read", adapter_id, Flow.BEGIN, begin_s)

    def derived(self, folder: str, adapter_id: AdapterId, begin_s: float, end_s: float) -> None:
        """The adapter's row scales were computed, all of them."""
        name = PurePath(folder).name
        args: Args = {"adapter": name, "adapter_id": adapter_id}
        self._recorder.span("row scales", f"row scales of {name}", begin_s, end_s, args)

    def staged(
        self,
        load_id: LoadId,
        path: str,
        adapter_id: AdapterId,
        chunk: int,
        image_range: tuple[int, int],
        begin_s: float,
        end_s: float,
    ) -> None:
        """Image bytes ``[start, stop)`` of a load were copied into a chunk of the ring."""
        if not self._recorder.enabled:
            return
        start, stop = image_range
        track, name = f"ring chunk {chunk}", PurePath(path).name
        args: Args = {
            "adapter": name,
            "adapter_id": adapter_id,
            "load": load_id,
            "image_offset": start,
            "bytes": stop - start,
        }
        self._recorder.span(track, f"stage {name}", begin_s, end_s, args)
        with self._lock:
            was_read = adapter_id in self._unstaged
            self._unstaged.discard(adapter_id)
        if was_read:
            self._recorder.flow(track, "read", adapter_id, Flow.END, begin_s)
        if start == 0:
            self._recorder.flow(track, "load", load_id, Flow.BEGIN, begin_s)

    def _free_track(self, begin_s: float) -> int:
        for number, end_s in enumerate(self._tracks_end_s):
            if end_s <= begin_s:
                return number
        self._tracks_end_s.append(0.0)
        return len(self._tracks_end_s) - 1
