"""Copies staged chunks into pool slots, on a thread and a stream of its own.

The thread hears the loader over the connection for chunks, and the engine's other threads over a
mailbox. What is put into the mailbox before the loader is asked for a load lies there when a chunk
of it comes: so the mailbox is emptied between reading a chunk and looking at it.

It shares the interpreter with the step loop, so a chunk is to cost it little more than a few calls
that give the interpreter's lock away: to wait for the chunk, to read the message, one for each
place that its bytes go to, to wait for their end, to give the chunk back. It is waited for at once:
its copies take a fraction of the time in which the bus fills the next one.
"""

import select
import time
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import assert_never

import torch

from engine.commands import Command, LoadAbandoned, LoadBroken, LoadPlaced, StagesPlaced
from engine.device import Device, Event
from engine.lora.pool import AdapterPool
from engine.mailbox import Mailbox
from engine.trace_tracks import LOAD_TRACK
from ipc.chunk_channel import ChunkChannel
from ipc.errors import Internal
from ipc.image import ImageLayout
from ipc.messages import ChunkReady, ChunkReleased, LoadId
from ipc.ring import RingReader
from ipc.trace import NO_TRACE, Args, Flow, Recorder


@dataclass(slots=True)
class Placement:
    """One load on its way into a slot: ``extents[i]`` is the arena offset of stage ``i``.

    ``fence`` is the event behind the last launched step that could still read these extents for
    the adapter that was there before; None: no such step is left. ``next_offset`` is the placer's.
    """

    load_id: LoadId
    layout: ImageLayout
    extents: tuple[int, ...]
    fence: Event | None
    next_offset: int = 0


@dataclass(frozen=True, slots=True)
class _Connect:
    channel: ChunkChannel[ChunkReleased, ChunkReady]


@dataclass(frozen=True, slots=True)
class _Abandon:
    load_id: LoadId


@dataclass(frozen=True, slots=True)
class _Reclaim:
    done: Callable[[], None]


@dataclass(frozen=True, slots=True)
class _Stop:
    pass


@dataclass(slots=True)
class _Load:
    """A placement and where its next bytes go.

    ``runs`` are pairs of an image offset and an address: bytes before that offset, and not before
    the run before's, go to the address plus their own offset in the image. ``next_run`` is the one
    of ``placement.next_offset``. ``stage_ends`` are image offsets, ``num_stages`` those reported.
    ``place_s`` is the sum of its copies so far.
    """

    placement: Placement
    runs: list[tuple[int, int]]
    stage_ends: list[int]
    next_run: int = 0
    num_stages: int = 0
    place_s: float = 0.0


_Item = _Connect | Placement | _Abandon | _Reclaim | _Stop


class Placer:
    """Moves bytes from the ring to the pool and reports; decides nothing.

    ``post`` takes a command for the step thread; it is called on this thread and must not block.
    With ``reports_stages`` it hears of each chunk that completes stages of a load, not only of its
    end. What it hears of is in device memory: work that is enqueued later needs no event to see it.
    ``adapter_name`` tells ``recorder`` what a load brings.
    """

    def __init__(
        self,
        device: Device,
        pool: AdapterPool,
        ring: tuple[torch.Tensor, ...],
        post: Callable[[Command], None],
        recorder: Recorder = NO_TRACE,
        adapter_name: Callable[[LoadId], str] = lambda load_id: "",
        reports_stages: bool = False,
    ) -> None:
        self._device = device
        self._reports_stages = reports_stages
        self._post = post
        self._recorder = recorder
        self._adapter_name = adapter_name
        self._arena_bytes = pool.num_bytes
        self._arena_address = pool.extent_view(0, pool.num_bytes).data_ptr()
        self._chunk_bytes = [chunk.numel() for chunk in ring]
        self._chunk_addresses = [chunk.data_ptr() for chunk in ring]
        # The end of the copies out of the chunk that was taken last.
        self._copied = device.new_load_event()
        self._ledger = RingReader(len(ring))
        self._mailbox: Mailbox[_Item] = Mailbox()
        self._poll = select.poll()
        self._poll.register(self._mailbox, select.POLLIN)
        self._channel: ChunkChannel[ChunkReleased, ChunkReady] | None = None
        self._loads: dict[LoadId, _Load] = {}

    # --- From any thread --------------------------------------------------------------------

    def connect(self, channel: ChunkChannel[ChunkReleased, ChunkReady]) -> None:
        """The ring was granted to the loader at the other end; every chunk is free."""
        self._mailbox.put(_Connect(channel))

    def begin(self, placement: Placement) -> None:
        """Chunks of this load may follow, and go where ``placement`` says."""
        self._mailbox.put(placement)

    def abandon(self, load_id: LoadId) -> None:
        """Copy no more of this load; ``LoadAbandoned`` follows when none is under way."""
        self._mailbox.put(_Abandon(load_id))

    def reclaim(self, done: Callable[[], None]) -> None:
        """The loader is dead: take every chunk back, then call ``done`` (on this thread)."""
        self._mailbox.put(_Reclaim(done))

    def stop(self) -> None:
        """Ends ``run`` after what was asked for before."""
        self._mailbox.put(_Stop())

    # --- The thread -------------------------------------------------------------------------

    def run(self) -> None:
        """The thread's body."""
        with self._device.load_stream():
            while self._turn():
                pass
        self._hang_up()

    def _turn(self) -> bool:
        """Waits for something to do, and does it; False at the end."""
        channel, chunk = self._channel, None
        for fd, _ in self._poll.poll():
            if fd == self._mailbox.fileno():
                self._mailbox.acknowledge()
            elif channel is not None and (chunk := channel.receive()) is None:
                self._hang_up()
        # Also without having been woken: what was said before the chunk comes before it.
        while (item := self._mailbox.take()) is not None:
            if isinstance(item, _Stop):
                return False
            self._carry_out(item)
        # A chunk of a loader that turned out to be dead is nobody's, and may be granted again.
        if chunk is not None and channel is self._channel:
            self._take(chunk)
        return True

    def _carry_out(self, item: _Connect | Placement | _Abandon | _Reclaim) -> None:
        match item:
            case Placement():
                ends = [stage.offset + stage.num_bytes for stage in item.layout.stages]
                self._loads[item.load_id] = _Load(item, self._runs(item), ends)
            case _Abandon():
                self._loads.pop(item.load_id, None)
                self._post(LoadAbandoned(item.load_id))
            case _Connect():
                assert self._channel is None, "the ring is granted to one loader at a time"
                self._channel = item.channel
                self._poll.register(item.channel, select.POLLIN)
            case _Reclaim():
                still_held = self._ledger.reclaim()
                assert not still_held, still_held
                self._hang_up()
                item.done()
            case _:
                assert_never(item)

    def _hang_up(self) -> None:
        """No message of this loader is heard any more. What it had announced stays announced."""
        if self._channel is not None:
            self._poll.unregister(self._channel)
            self._channel.close()
            self._channel = None

    # --- Chunks -----------------------------------------------------------------------------

    def _take(self, ready: ChunkReady) -> None:
        self._ledger.ready(ready.chunk)
        load = self._loads.get(ready.load_id)
        if load is None:
            # It was abandoned while this chunk was on its way.
            self._give_back(ready.chunk)
            return
        problem = _misfit(load.placement, ready, self._chunk_bytes[ready.chunk])
        if problem is not None:
            del self._loads[ready.load_id]
            self._give_back(ready.chunk)
            self._post(LoadBroken(ready.load_id, Internal(problem).info))
            return
        self._ledger.copying(ready.chunk)
        begin_s = time.monotonic()
        self._copy(load, ready)
        end_s = time.monotonic()
        load.place_s += end_s - begin_s
        self._record(ready, begin_s, end_s)
        self._give_back(ready.chunk)
        if load.placement.next_offset == load.placement.layout.num_bytes:
            del self._loads[ready.load_id]
            self._post(LoadPlaced(ready.load_id, load.place_s))
        elif self._reports_stages:
            self._report_stages(load)

    def _report_stages(self, load: _Load) -> None:
        num_stages = bisect_right(load.stage_ends, load.placement.next_offset)
        if num_stages > load.num_stages:
            load.num_stages = num_stages
            self._post(StagesPlaced(load.placement.load_id, num_stages))

    def _copy(self, load: _Load, ready: ChunkReady) -> None:
        """One contiguous copy for every run of the load that the chunk touches."""
        position = load.placement.next_offset
        if position == 0 and load.placement.fence is not None:
            # Only now, when it has most likely passed: other loads' copies stand behind it, too.
            self._device.load_stream_wait(load.placement.fence)
        end = position + ready.num_bytes
        source = self._chunk_addresses[ready.chunk] - position
        while position < end:
            run_end, target = load.runs[load.next_run]
            until = min(end, run_end)
            self._device.load_stream_copy(target + position, source + position, until - position)
            position = until
            if until == run_end:
                load.next_run += 1
        self._device.record_load_event(self._copied)
        self._copied.synchronize()
        load.placement.next_offset = end

    def _record(self, ready: ChunkReady, begin_s: float, end_s: float) -> None:
        if not self._recorder.enabled:
            return
        name = self._adapter_name(ready.load_id)
        args: Args = {
            "adapter": name,
            "load": ready.load_id,
            "image_offset": ready.image_offset,
            "bytes": ready.num_bytes,
        }
        self._recorder.span(LOAD_TRACK, f"copy {name}", begin_s, end_s, args)
        if ready.image_offset == 0:
            self._recorder.flow(LOAD_TRACK, "load", ready.load_id, Flow.STEP, begin_s)

    def _runs(self, placement: Placement) -> list[tuple[int, int]]:
        """Stages whose extents touch as they do in the image are one run."""
        runs: list[tuple[int, int]] = []
        for stage, extent in zip(placement.layout.stages, placement.extents, strict=True):
            if not stage.num_bytes:
                continue
            assert 0 <= extent <= self._arena_bytes - stage.num_bytes, (extent, stage.num_bytes)
            target = self._arena_address + extent - stage.offset
            if runs and runs[-1][1] == target:
                runs.pop()
            runs.append((stage.offset + stage.num_bytes, target))
        return runs

    def _give_back(self, chunk: int) -> None:
        self._ledger.free(chunk)
        # A loader that can not hear it is about to be found dead, or to start over.
        if self._channel is not None:
            self._channel.send(ChunkReleased(chunk))


def _misfit(placement: Placement, ready: ChunkReady, chunk_bytes: int) -> str | None:
    """Why the chunk can not be the next of its load; None if it can."""
    if ready.image_offset != placement.next_offset:
        return (
            f"load {ready.load_id}: expected image offset {placement.next_offset},"
            f" got {ready.image_offset}"
        )
    left = placement.layout.num_bytes - ready.image_offset
    if not 0 < ready.num_bytes <= min(left, chunk_bytes):
        return (
            f"load {ready.load_id}: expected a chunk of at most {min(left, chunk_bytes)} bytes,"
            f" got {ready.num_bytes}"
        )
    return None
