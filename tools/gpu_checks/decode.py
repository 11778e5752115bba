"""The decode step: the base model against its floor, and what adapters add to it."""

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from engine.models.ops import open_ops
from ipc.image import layout_image
from ipc.messages import AdapterId
from tools.gpu_checks.arithmetic import all_linear_modules, decode_step_bytes
from tools.gpu_checks.figures import Figure, Report
from tools.gpu_checks.live_engine import LiveEngine
from tools.gpu_checks.setting import Setting
from tools.gpu_checks.timing import (
    copy_bandwidth,
    device_work,
    empty_nodes_seconds,
    machine_name,
    matmul_graph_seconds,
)

CONTEXT = 128
_WARMUP_STEPS = 8
_PROFILED_STEPS = 20


@dataclass(frozen=True, slots=True)
class AdapterCase:
    """``num_adapters`` of ``rank`` on all linears share ``batch`` rows evenly."""

    num_adapters: int
    rank: int
    batch: int

    @property
    def name(self) -> str:
        plural = "adapters" if self.num_adapters > 1 else "adapter"
        return f"{self.num_adapters} {plural} of rank {self.rank}, batch {self.batch}"


CASES = (
    AdapterCase(32, 16, 32),
    AdapterCase(8, 64, 64),
    AdapterCase(7, 256, 32),
    AdapterCase(1, 256, 32),
)


@dataclass(frozen=True, slots=True)
class DecodeTimes:
    """One batch's steps: wall seconds of each in the median, and what the device does in one.

    ``busy_s`` and ``num_kernels`` are None on a CPU.
    """

    step_s: float
    mean_step_s: float
    busy_s: float | None
    num_kernels: float | None


def time_decode(
    engine: LiveEngine, batch: int, adapter_ids: Sequence[AdapterId | None], num_steps: int
) -> DecodeTimes:
    """Steps of ``batch`` rows around ``CONTEXT`` tokens, the adapters dealt out to them in turn."""
    rng = random.Random(batch)
    vocab_size = engine.compute.model.vocab_size
    prompt_tokens = max(1, CONTEXT - num_steps // 2 - _WARMUP_STEPS)
    prompts = [[rng.randrange(vocab_size) for _ in range(prompt_tokens)] for _ in range(batch)]
    owners = [adapter_ids[row % len(adapter_ids)] for row in range(batch)]
    max_tokens = num_steps + _PROFILED_STEPS + 4 * _WARMUP_STEPS
    requests = engine.ask(prompts, owners, max_tokens)
    engine.run_until(lambda: all(engine.answers[request].deltas for request in requests))
    for _ in range(_WARMUP_STEPS):
        engine.step()
    samples = []
    begin_s = time.perf_counter()
    for _ in range(num_steps):
        engine.step()
        end_s = time.perf_counter()
        samples.append(end_s - begin_s)
        begin_s = end_s
    work = device_work(engine.device.torch_device, engine.step, _PROFILED_STEPS)
    assert not any(engine.answers[request].is_finished for request in requests)
    engine.cancel_all()
    busy_s, num_kernels = work or (None, None)
    return DecodeTimes(statistics.median(samples), statistics.mean(samples), busy_s, num_kernels)


def check_decode(setting: Setting) -> Report:
    """Batches 1, 8, 32 of the base model; the four mixtures of adapters; the host's idle share."""
    engine = LiveEngine(setting.engine_config(setting.shape("llama-3.1-8b")))
    device = engine.device.torch_device
    report = Report("decode", machine_name(device))
    bandwidth = copy_bandwidth(device, setting.of(2 << 30, 1 << 20))
    report.details["bandwidth_bytes_s"] = bandwidth
    report.figures.append(Figure("device copy", bandwidth / 1e12, unit="TB/s"))

    num_steps = setting.of(64, 4)
    base: dict[int, DecodeTimes] = {}
    for batch in (1, 8, 32, 64):
        base[batch] = time_decode(engine, batch, [None], num_steps)
    for batch in (1, 8, 32):
        _add_base_figures(report, engine, setting, batch, base[batch], bandwidth)
    for case in CASES:
        chosen = case
        if setting.is_tiny:
            chosen = AdapterCase(min(case.num_adapters, 4), min(case.rank, 32), case.batch)
        _add_adapter_figures(report, engine, chosen, base[case.batch], bandwidth, num_steps)
    _add_idle_figure(report, engine, base[32])
    return report


def _add_base_figures(
    report: Report,
    engine: LiveEngine,
    setting: Setting,
    batch: int,
    times: DecodeTimes,
    bandwidth: float,
) -> None:
    model, base = engine.compute.model, engine.compute.base
    num_bytes = decode_step_bytes(model, base, batch, CONTEXT)
    weight_bytes = decode_step_bytes(model, base, batch, 0)
    weights = fused_weights(engine)
    repeats = setting.of(30, 2)
    graph_s = matmul_graph_seconds(engine.device.torch_device, weights, batch, repeats)
    num_others = max(0, round(times.num_kernels or 0) - len(weights))
    with_nodes_s = matmul_graph_seconds(
        engine.device.torch_device, weights, batch, repeats, num_others
    )
    ops = open_ops(engine.device, rms_norm_eps=1e-5)
    own_s = matmul_graph_seconds(
        engine.device.torch_device, weights, batch, repeats, linear=ops.linear
    )
    share = num_bytes / times.step_s / bandwidth
    graph_share = weight_bytes / graph_s / bandwidth
    name = f"base step, batch {batch}"
    report.details[name] = {
        **asdict(times),
        "bytes_read": num_bytes,
        "matmul_graph_s": graph_s,
        "num_other_nodes": num_others,
        "matmul_graph_with_empty_nodes_s": with_nodes_s,
        "own_matmul_graph_s": own_s,
    }
    # Where the library's products themselves stay below, the goal is to come close to them.
    goal = 0.80 if graph_share >= 0.87 else None
    report.figures += [
        Figure(f"{name}: time", 1000 * times.step_s, unit="ms"),
        Figure(f"{name}: of bandwidth", share, goal, at_most=False),
        Figure(f"{name}: graph of products alone, of bandwidth", graph_share),
        Figure(
            f"{name}: that graph's time over the step's",
            graph_s / times.step_s,
            0.92,
            at_most=False,
        ),
        Figure(
            f"{name}: the same, with {num_others} empty nodes between its products",
            with_nodes_s / times.step_s,
        ),
        Figure(f"{name}: the engine's own products alone over that graph", own_s / graph_s),
    ]


def fused_weights(engine: LiveEngine) -> list[torch.Tensor]:
    """Random matrices ``[out, in]`` of every product of a step, fused as the model fuses them."""
    model = engine.compute.model
    shapes = [
        (model.query_size + 2 * model.kv_size, model.hidden_size),
        (model.hidden_size, model.query_size),
        (2 * model.intermediate_size, model.hidden_size),
        (model.hidden_size, model.intermediate_size),
    ] * model.num_layers
    shapes.append((model.vocab_size, model.hidden_size))
    device = engine.device.torch_device
    return [
        torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(0.0, 0.02)
        for shape in shapes
    ]


def _add_adapter_figures(
    report: Report,
    engine: LiveEngine,
    case: AdapterCase,
    base: DecodeTimes,
    bandwidth: float,
    num_steps: int,
) -> None:
    adapter_ids = engine.add_adapters(case.rank, case.num_adapters)
    engine.ensure_resident(adapter_ids)
    times = time_decode(engine, case.batch, adapter_ids, num_steps)
    modules = all_linear_modules(engine.compute.base, case.rank, 1.0)
    num_bytes = case.num_adapters * layout_image(engine.compute.base, modules).num_bytes
    floor_s = num_bytes / bandwidth
    added_s = times.step_s - base.step_s
    num_nodes = round((times.num_kernels or 0.0) - (base.num_kernels or 0.0))
    nodes_s = empty_nodes_seconds(engine.device.torch_device, num_nodes, 50)
    report.details[case.name] = {
        **asdict(times),
        "adapter_bytes": num_bytes,
        "added_s": added_s,
        "num_added_nodes": num_nodes,
        "empty_nodes_s": nodes_s,
    }
    report.figures += [
        Figure(f"{case.name}: added", 1000 * added_s, unit="ms"),
        Figure(f"{case.name}: over reading them, raw", added_s / floor_s),
        Figure(
            f"{case.name}: over reading them, less {num_nodes} empty nodes",
            (added_s - nodes_s) / floor_s,
            1.6,
        ),
    ]


def _add_idle_figure(report: Report, engine: LiveEngine, base: DecodeTimes) -> None:
    name = "host idle, batch 32"
    if base.busy_s is None:
        report.figures.append(Figure(name, None, 3.0, unit="%", note="no GPU"))
        return
    times = time_decode(engine, 32, [None], 200)
    assert times.busy_s is not None
    report.details[name] = asdict(times)
    idle = 1 - times.busy_s / times.mean_step_s
    report.figures.append(Figure(name, 100 * max(0.0, idle), 3.0, unit="%"))
