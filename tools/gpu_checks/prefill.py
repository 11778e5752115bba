"""Prefill: what adapters cost it, and how much of the matrix units the base model's uses."""

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial

from ipc.messages import AdapterId
from tools.gpu_checks.arithmetic import (
    prefill_attention_flops,
    prefill_flops,
    prefill_norm_bytes,
    prefill_product_flops,
    prefill_rope_bytes,
    prefill_silu_bytes,
)
from tools.gpu_checks.breakdown import (
    ATTENTION,
    NORMS,
    PRODUCTS,
    ROPE,
    SILU,
    breakdown_figures,
    longest_names,
    time_by_kind,
)
from tools.gpu_checks.figures import Figure, Report
from tools.gpu_checks.live_engine import LiveEngine
from tools.gpu_checks.setting import Setting
from tools.gpu_checks.timing import (
    copy_bandwidth,
    device_events,
    machine_name,
    matmul_rate,
    sustained_matmul_rate,
)

NUM_PROMPTS = 8
# Throughput with 8 adapters of this rank over the base model's.
GOALS = {16: 0.90, 256: 0.80}


def time_prefill(
    engine: LiveEngine,
    adapter_ids: Sequence[AdapterId | None],
    num_tokens: int,
    repeats: int,
    rng: random.Random,
) -> float:
    """Median seconds from ``NUM_PROMPTS`` new prompts to the first token of the last of them."""
    # The first warms up.
    samples = [_prefill(engine, adapter_ids, num_tokens, rng) for _ in range(repeats + 1)]
    return statistics.median(samples[1:])


def _prefill(
    engine: LiveEngine,
    adapter_ids: Sequence[AdapterId | None],
    num_tokens: int,
    rng: random.Random,
) -> float:
    vocab_size = engine.compute.model.vocab_size
    owners = [adapter_ids[row % len(adapter_ids)] for row in range(NUM_PROMPTS)]
    prompts = [[rng.randrange(vocab_size) for _ in range(num_tokens)] for _ in range(NUM_PROMPTS)]
    begin_s = time.perf_counter()
    requests = engine.ask(prompts, owners, max_tokens=1)
    engine.run_until(partial(engine.are_finished, requests))
    seconds = max(engine.answers[request].times_s[0] for request in requests) - begin_s
    engine.cancel_all()
    return seconds


def check_prefill(setting: Setting) -> Report:
    """8 prompts of 2,048 tokens: base model, 8 adapters of rank 16, 8 of rank 256."""
    num_tokens = setting.of(2048, 48)
    repeats = setting.of(5, 1)
    # Twice 8,192 tokens: as many as a step of a server for throughput has.
    config = setting.engine_config(
        setting.shape("llama-3.1-8b"),
        max_num_batched_tokens=setting.of(8192, 256),
        max_adapter_bytes=14 << 30,
    )
    engine = LiveEngine(config)
    device = engine.device.torch_device
    report = Report("prefill", machine_name(device))
    size = setting.of(8192, 64)
    rate = matmul_rate(device, size)
    rng = random.Random(0)
    base_s = time_prefill(engine, [None], num_tokens, repeats, rng)
    model, base = engine.compute.model, engine.compute.base
    flops = prefill_flops(model, base, NUM_PROMPTS, num_tokens)
    report.details |= {"matmul_flops_s": rate, "base_s": base_s, "base_flops": flops}
    title = f"prefill {NUM_PROMPTS} × {num_tokens}"
    report.figures += [
        Figure("bfloat16 product 8192³", rate / 1e12, unit="TFLOP/s"),
        Figure(f"{title}, base", 1000 * base_s, unit="ms"),
        Figure(f"{title}, base: of that rate", flops / base_s / rate, 0.80, at_most=False),
    ]
    # What limits any work that lasts as long: power, and the clocks that it leaves.
    sustained = sustained_matmul_rate(device, size, base_s)
    report.details["sustained_matmul_flops_s"] = sustained
    report.figures += [
        Figure("bfloat16 product 8192³, for as long", sustained / 1e12, unit="TFLOP/s"),
        Figure(f"{title}, base: of that rate", flops / base_s / sustained),
    ]
    bandwidth = copy_bandwidth(device, setting.of(2 << 30, 1 << 20))
    _add_breakdown(report, engine, num_tokens, rate, bandwidth, rng)
    report.details["max_num_batched_tokens"] = config.max_num_batched_tokens
    for rank, goal in GOALS.items():
        adapter_ids = engine.add_adapters(setting.of(rank, min(rank, 32)), NUM_PROMPTS)
        engine.ensure_resident(adapter_ids)
        seconds = time_prefill(engine, adapter_ids, num_tokens, repeats, rng)
        report.details[f"rank_{rank}_s"] = seconds
        name = f"{title}, 8 adapters of rank {rank}: throughput over base"
        report.figures.append(Figure(name, base_s / seconds, goal, at_most=False))
    return report


def _add_breakdown(
    report: Report,
    engine: LiveEngine,
    num_tokens: int,
    matmul_flops_s: float,
    bandwidth_bytes_s: float,
    rng: random.Random,
) -> None:
    """Where the time of one prefill by the base model goes; nothing on a CPU.

    Products and attention are bound by the rate of a large product, the others by reading and
    writing what they must.
    """
    device = engine.device.torch_device
    events = device_events(device, lambda: _prefill(engine, [None], num_tokens, rng), 1)
    if events is None:
        return
    model, base = engine.compute.model, engine.compute.base
    num_rows = NUM_PROMPTS * num_tokens
    product_flops = prefill_product_flops(model, base, NUM_PROMPTS, num_tokens)
    floors_s = {
        PRODUCTS: product_flops / matmul_flops_s,
        ATTENTION: prefill_attention_flops(model, NUM_PROMPTS, num_tokens) / matmul_flops_s,
        NORMS: prefill_norm_bytes(model, base, num_rows) / bandwidth_bytes_s,
        ROPE: prefill_rope_bytes(model, base, num_rows) / bandwidth_bytes_s,
        SILU: prefill_silu_bytes(model, base, num_rows) / bandwidth_bytes_s,
    }
    times = time_by_kind(events)
    title = f"prefill {NUM_PROMPTS} × {num_tokens}, base"
    report.figures += breakdown_figures(title, times, floors_s)
    report.details["base_breakdown"] = {
        "kinds": {kind: asdict(found) for kind, found in times.items()},
        "floors_s": floors_s,
        "product_flops_s": product_flops / times[PRODUCTS].seconds,
        "bandwidth_bytes_s": bandwidth_bytes_s,
        # Two norms a layer and one before the head.
        "num_forward_passes": times[NORMS].num_launches / (2 * model.num_layers + 1),
        "num_launches": sum(found.num_launches for found in times.values()),
        "longest": longest_names(events, 16),
    }
