"""A placer on its thread, driven by hand: by a loader's end, and by what the step thread says."""

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from engine.commands import Command
from engine.config import DeviceKind
from engine.device import CpuDevice, Device, Event, open_device
from engine.lora.placer import Placement, Placer
from engine.lora.pool import AdapterPool
from ipc.base_model import LINEAR_MODULES, BaseModel, DType, LinearShape
from ipc.image import AdapterModule, ImageLayout, layout_image
from ipc.messages import LoadId
from tests.engine.loader_end import LoaderEnd

CHUNK_BYTES = 1000
POISON = 0xAB
DEADLINE_S = 10.0


def base_model() -> BaseModel:
    linears = tuple(LinearShape(name, name, 24, 16) for name in LINEAR_MODULES)
    return BaseModel("LlamaForCausalLM", 3, 24, 40, 2, 1, DType.FLOAT32, linears)


def layout_of_rank(rank: int, *names: str) -> ImageLayout:
    modules = [AdapterModule(stage, name, rank, 1.0) for stage in (1, 2, 3) for name in names]
    return layout_image(base_model(), modules)


def extents_from(start: int, layout: ImageLayout) -> tuple[int, ...]:
    """Scattered extents in falling order of address, with a gap behind each."""
    extents = []
    for stage in layout.stages:
        start -= stage.num_bytes + 128
        extents.append(start)
    return tuple(extents)


def image_of(layout: ImageLayout, seed: int) -> bytes:
    return random.Random(seed).randbytes(layout.num_bytes)


class Rig:
    """A placer on its thread, with the test as loader and step thread at once."""

    def __init__(
        self,
        num_chunks: int,
        pool_bytes: int,
        device: Device | None = None,
        reports_stages: bool = False,
    ) -> None:
        self.device = open_device(DeviceKind.AUTO) if device is None else device
        self.pool = AdapterPool(base_model(), pool_bytes, self.device)
        self.pool.extent_view(0, pool_bytes).fill_(POISON)
        self.loader = LoaderEnd(self.device, num_chunks, CHUNK_BYTES)
        self.commands: list[Command] = []
        # Called on the placer's thread, before anybody hears of the command.
        self.at_post: Callable[[Command], None] = lambda command: None
        self._changed = threading.Condition()
        self.placer = Placer(
            self.device,
            self.pool,
            self.loader.ring,
            self._post,
            reports_stages=reports_stages,
        )
        self.placer.connect(self.loader.engine_end)
        self._thread = threading.Thread(target=self.placer.run)

    def start(self) -> None:
        self._thread.start()

    def _post(self, command: Command) -> None:
        self.at_post(command)
        with self._changed:
            self.commands.append(command)
            self._changed.notify_all()

    def wait_for(self, *commands: Command) -> None:
        with self._changed:
            reported = self._changed.wait_for(
                lambda: all(command in self.commands for command in commands), DEADLINE_S
            )
            assert reported, self.commands

    def wait_for_one(self) -> Command:
        with self._changed:
            assert self._changed.wait_for(lambda: bool(self.commands), DEADLINE_S)
            return self.commands[0]

    def begin(self, load_id: int, layout: ImageLayout, extents: tuple[int, ...]) -> None:
        fence: Event = self.device.record_forward_event()
        self.placer.begin(Placement(LoadId(load_id), layout, extents, fence))

    def slot(self, layout: ImageLayout, extents: tuple[int, ...]) -> bytes:
        pieces = [
            bytes(self.pool.extent_view(extent, stage.num_bytes).cpu().numpy())
            for stage, extent in zip(layout.stages, extents, strict=True)
            if stage.num_bytes
        ]
        return b"".join(pieces)

    def close(self) -> None:
        self.placer.stop()
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive()
        self.loader.close()


class Fence:
    """An event with a name, long since done."""

    def __init__(self, number: int) -> None:
        self.number = number

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


class Held:
    """The end of a copy that takes until ``done`` is set."""

    def __init__(self) -> None:
        self.waited_for = threading.Event()
        self.done = threading.Event()
        self.done.set()

    def synchronize(self) -> None:
        self.waited_for.set()
        assert self.done.wait(DEADLINE_S)

    def query(self) -> bool:
        return self.done.is_set()


class WatchedDevice(CpuDevice):
    """Writes down what the load stream is given; its copies end when the test says so.

    ``at_copy`` is called on the placer's thread whenever a copy was enqueued.
    """

    def __init__(self) -> None:
        self.log: list[str] = []
        self.held = Held()
        self.at_copy: Callable[[], None] = lambda: None
        self._num_fences = 0

    def load_stream_copy(self, target: int, source: int, num_bytes: int) -> None:
        self.log.append("copy")
        super().load_stream_copy(target, source, num_bytes)
        self.at_copy()

    def new_load_event(self) -> Event:
        return self.held

    def record_forward_event(self) -> Event:
        self._num_fences += 1
        return Fence(self._num_fences)

    def load_stream_wait(self, event: Event) -> None:
        assert isinstance(event, Fence)
        self.log.append(f"wait {event.number}")


class WatchedRig(Rig):
    device: WatchedDevice

    @contextmanager
    def copy_under_way(self, load_id: int, image: bytes) -> Iterator[None]:
        """Sends the load's first chunk; meanwhile the placer waits for its copy."""
        held = self.device.held
        held.done.clear()
        held.waited_for.clear()
        self.loader.send(load_id, image, 0)
        assert held.waited_for.wait(DEADLINE_S)
        yield
        held.done.set()
