"""How fast this machine is, and how long its device takes for something."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from tools.gpu_checks.arithmetic import merged_length

# Between the nodes of a graph the device idles for a microsecond or two, and waits for nobody.
_GRAPH_GAP_US = 5.0
_PRODUCTS_AT_ONCE = 20


def machine_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def median_seconds(device: torch.device, work: Callable[[], object], repeats: int) -> float:
    """Median time of ``work`` on the device, after three runs that do not count."""
    for _ in range(3):
        work()
    if device.type != "cuda":
        samples = []
        for _ in range(repeats):
            begin_s = time.perf_counter()
            work()
            samples.append(time.perf_counter() - begin_s)
        return statistics.median(samples)
    pairs = []
    for _ in range(repeats):
        begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        begin.record()
        work()
        end.record()
        pairs.append((begin, end))
    torch.cuda.synchronize(device)
    return statistics.median(float(begin.elapsed_time(end)) for begin, end in pairs) / 1000


def copy_bandwidth(device: torch.device, num_bytes: int) -> float:
    """Bytes a second of a copy within the device's memory, those read and those written."""
    source = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / median_seconds(device, lambda: target.copy_(source), 20)


def matmul_rate(device: torch.device, size: int) -> float:
    """Operations a second of a bfloat16 product of two random square matrices."""
    left, right = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    out = torch.empty_like(left)
    seconds = median_seconds(device, lambda: torch.mm(left, right, out=out), 20)
    return 2 * size**3 / seconds


def sustained_matmul_rate(device: torch.device, size: int, seconds: float) -> float:
    """As ``matmul_rate``, one product behind the other for ``seconds``.

    A GPU draws its full power then, and lowers its clocks.
    """
    left, right = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    out = torch.empty_like(left)
    num_products, begin_s = 0, time.perf_counter()
    while (passed_s := time.perf_counter() - begin_s) < seconds:
        for _ in range(_PRODUCTS_AT_ONCE):
            torch.mm(left, right, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        num_products += _PRODUCTS_AT_ONCE
    return 2 * size**3 * num_products / passed_s


def captured(device: torch.device, work: Callable[[], object]) -> Callable[[], object]:
    """``work`` as a CUDA graph's replay; itself on a CPU."""
    if device.type != "cuda":
        return work
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def matmul_graph_seconds(
    device: torch.device,
    weights: list[torch.Tensor],
    num_rows: int,
    repeats: int,
    num_empty_nodes: int = 0,
    linear: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
) -> float:
    """Time of a graph that multiplies ``num_rows`` rows with each of ``weights`` ``[out, in]``.

    ``num_empty_nodes`` kernels that do nothing stand between the products, evenly. ``linear`` takes
    rows and a weight (None: the library's product, into memory that is there).
    """
    inputs = {
        width: torch.randn(num_rows, width, device=device).to(weights[0].dtype)
        for width in {weight.shape[1] for weight in weights}
    }
    outputs = {
        height: torch.empty(num_rows, height, dtype=weights[0].dtype, device=device)
        for height in {weight.shape[0] for weight in weights}
    }

    is_gpu = device.type == "cuda"

    def products() -> None:
        for index, weight in enumerate(weights):
            height, width = weight.shape
            if linear is None:
                torch.mm(inputs[width], weight.T, out=outputs[height])
            else:
                linear(inputs[width], weight)
            before, after = (
                num_empty_nodes * place // len(weights) for place in (index, index + 1)
            )
            for _ in range((after - before) * is_gpu):
                torch.cuda._sleep(0)  # type: ignore[no-untyped-call]

    return median_seconds(device, captured(device, products), repeats)


def empty_nodes_seconds(device: torch.device, num_nodes: int, repeats: int) -> float:
    """Time of a graph of ``num_nodes`` kernels that do nothing, one behind the other."""
    if device.type != "cuda" or num_nodes <= 0:
        return 0.0

    def nothings() -> None:
        for _ in range(num_nodes):
            torch.cuda._sleep(0)  # type: ignore[no-untyped-call]

    return median_seconds(device, captured(device, nothings), repeats)


@dataclass(frozen=True, slots=True)
class DeviceEvent:
    """A kernel or a copy that the device ran, by the profiler's clock."""

    name: str
    begin_us: float
    end_us: float


def device_events(
    device: torch.device, work: Callable[[], object], repeats: int
) -> list[DeviceEvent] | None:
    """What the device did in ``repeats`` calls of ``work``; None on a CPU.

    The profiler slows the host and not the kernels.
    """
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(repeats):
            work()
        torch.cuda.synchronize(device)
    return [
        DeviceEvent(event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events() or ()
        if event.device_type.name == "CUDA"
    ]


def device_work(
    device: torch.device, step: Callable[[], object], num_steps: int
) -> tuple[float, float] | None:
    """Seconds a step in which the device is busy, and kernels a step; None on a CPU.

    Compare the first with the wall time of steps that nobody profiles.
    """
    events = device_events(device, step, num_steps)
    if events is None:
        return None
    intervals = [(event.begin_us, event.end_us) for event in events]
    num_kernels = sum(not event.name.startswith("Mem") for event in events)
    return merged_length(intervals, _GRAPH_GAP_US) / 1e6 / num_steps, num_kernels / num_steps
