"""What one engine step costs in Python, without the model: ``python -m tools.bench_step_overhead``.

Runs the real step loop's parts with decoding requests of several adapters: scheduling, residency,
laying out the inputs, taking in the sampled tokens, encoding what the clients get. In place of the
model stands a runner that draws the same token for every row. The bound is 3 ms for 64 requests on
one core, so that a step of a small model is not mostly Python.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec
import numpy as np
import torch
from rich.console import Console

from engine.adapter_actions import BeginLoad, InstallAdapter
from engine.adapter_demand import AdapterDemand
from engine.adapter_slots import AdapterSlots
from engine.batch import flatten, to_device
from engine.block_manager import BlockManager
from engine.commands import AddAdapter, AddRequest, LoaderConnected, LoadPlaced
from engine.config import AdapterLoading
from engine.core import EngineCore, Runner
from engine.device import CpuDevice
from engine.drawn_tokens import DrawnStep, DrawnTokens
from engine.plan import LaunchedStep, StepPlan, nothing_between
from engine.residency import AdapterResidency
from engine.scheduler import Scheduler
from engine.scheduler_limits import SchedulerLimits
from engine.slot_allocator import SlotAllocator
from engine.step_trace import DeviceTimes, LoadNames, TracedRunner
from ipc.base_model import LINEAR_MODULES, BaseModel, DType, LinearShape
from ipc.image import AdapterModule, layout_image
from ipc.messages import (
    AdapterId,
    FileIdentity,
    Generation,
    LoadId,
    Manifest,
    RequestId,
    SamplingParams,
    StepOutputs,
    TokenDelta,
)
from ipc.trace import Recorder, open_recorder

BOUND_MS = 3.0
BLOCK_SIZE = 16
PROMPT_TOKENS = 100
TOKEN_ID = 7


class FixedRunner:
    """Does all of a model runner's work on the host, and none of the model's."""

    def __init__(self) -> None:
        self._device = CpuDevice()

    def launch(self, plan: StepPlan, between: Callable[[], None] = nothing_between) -> LaunchedStep:
        to_device(flatten(plan, BLOCK_SIZE), self._device)
        num_sampled = sum(chunk.samples for chunk in plan.chunks)
        tokens = DrawnTokens(torch.full((num_sampled,), TOKEN_ID))
        return DrawnStep(tokens, self._device, self._device.record_timed_event())


class InstantSlots:
    """Notes the loads that begin; the benchmark reports each as placed."""

    def __init__(self) -> None:
        self.begun: list[LoadId] = []

    def begin(self, load: BeginLoad) -> None:
        self.begun.append(load.load_id)

    def abandon(self, load_id: LoadId) -> None:
        raise AssertionError(f"load {load_id} was given up")

    def install(self, adapter: InstallAdapter) -> None:
        pass

    def remove(self, adapter_id: AdapterId) -> None:
        pass


class Clients:
    """Encodes what each step has for them, as the I/O thread does."""

    def __init__(self) -> None:
        self._encoder = msgspec.msgpack.Encoder()
        self.num_bytes = 0

    def deliver(self, deltas: Mapping[bytes, list[TokenDelta]]) -> None:
        for of_client in deltas.values():
            self.num_bytes += len(self._encoder.encode(StepOutputs(of_client)))


def base_model() -> BaseModel:
    """The shape of Llama-3.1-8B."""
    sizes = ((4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096))
    sizes_of_mlp = ((4096, 14336), (4096, 14336), (14336, 4096))
    linears = tuple(
        LinearShape(name, name, *size)
        for name, size in zip(LINEAR_MODULES, sizes + sizes_of_mlp, strict=True)
    )
    return BaseModel("LlamaForCausalLM", 32, 4096, 128256, 32, 8, DType.BFLOAT16, linears)


def manifest(base: BaseModel, adapter_id: AdapterId) -> Manifest:
    """An adapter of rank 16 on every linear of every layer."""
    modules = tuple(
        AdapterModule(base.layer_stage(layer), name, 16, 1.0)
        for layer in range(base.num_layers)
        for name in LINEAR_MODULES
    )
    num_bytes = layout_image(base, modules).num_bytes
    files = (FileIdentity("adapter_model.safetensors", 0, 0, num_bytes, 0),)
    generation = Generation(adapter_id, files, "")
    return Manifest("/adapter", generation, "peft", modules, 16, num_bytes, num_bytes)


def measure(
    num_requests: int, num_adapters: int, num_steps: int, recorder: Recorder | None = None
) -> dict[str, float]:
    """Milliseconds per step: median, 99th percentile and largest; of traced ones if recorded."""
    base = base_model()
    slots = AdapterSlots(SlotAllocator(num_adapters * manifest(base, AdapterId(0)).image_bytes))
    residency = AdapterResidency(base, slots)
    blocks = BlockManager(
        num_requests * (PROMPT_TOKENS + num_steps + 2 * BLOCK_SIZE) // BLOCK_SIZE, BLOCK_SIZE, True
    )
    longest = PROMPT_TOKENS + num_steps + BLOCK_SIZE
    limits = SchedulerLimits(num_requests, 8192, longest, 2.0, frozenset(), AdapterLoading.OVERLAP)
    scheduler = Scheduler(limits, blocks, residency, AdapterDemand(residency, slots, 60.0))
    clients, pool = Clients(), InstantSlots()
    runner: Runner = FixedRunner()
    if recorder is not None:
        runner = TracedRunner(runner, LoadNames(), recorder, None, DeviceTimes(recorder))
    core = EngineCore(
        scheduler,
        residency,
        blocks,
        runner,
        pool,
        overlap_steps=False,
        max_waiting=num_requests,
        seed=0,
        deliver=clients.deliver,
        send_to_loader=lambda message: None,
        adapter_failed=lambda adapter_id, error: None,
    )
    core.carry_out(LoaderConnected())
    for number in range(num_adapters):
        adapter_id = AdapterId(number + 1)
        core.carry_out(
            AddAdapter(adapter_id, manifest(base, adapter_id), False, None, lambda error: None)
        )
    for number in range(num_requests):
        core.carry_out(
            AddRequest(
                client=b"client",
                request_id=RequestId(f"request-{number}"),
                adapter_id=AdapterId(number % num_adapters + 1) if num_adapters else None,
                prompt_token_ids=list(range(number, number + PROMPT_TOKENS)),
                max_tokens=num_steps + 2,
                sampling=SamplingParams(temperature=0.0),
                arrival_s=0.0,
            )
        )
    while scheduler.num_running < num_requests:
        core.step(time.monotonic())
        for load_id in pool.begun:
            core.carry_out(LoadPlaced(load_id))
        pool.begun.clear()
    samples = np.empty(num_steps - 10)
    for index in range(len(samples)):
        begin_s = time.perf_counter()
        core.step(begin_s)
        samples[index] = 1000 * (time.perf_counter() - begin_s)
    assert scheduler.num_running == num_requests, "requests ended while they were measured"
    p50, p99, largest = np.percentile(samples, (50, 99, 100))
    return {"p50_ms": float(p50), "p99_ms": float(p99), "max_ms": float(largest)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--requests", type=int, default=64, help="running requests (%(default)s)")
    parser.add_argument("--adapters", type=int, default=16, help="adapters (%(default)s)")
    parser.add_argument("--steps", type=int, default=1000, help="measured steps (%(default)s)")
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    parser.add_argument("--trace", help="record the steps in this file, to measure what it costs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    recorder = open_recorder(options.trace, "bench")
    result = measure(options.requests, options.adapters, options.steps, recorder)
    if recorder is not None:
        recorder.close()
    if options.out is not None:
        options.out.write_text(json.dumps({**vars(options), **result}, default=str) + "\n")
    Console(highlight=False, soft_wrap=True).print(
        f"{options.requests} running requests, {options.adapters} adapters:"
        f" {result['p50_ms']:.2f} ms a step in the median, {result['p99_ms']:.2f} ms at the 99th"
        f" percentile; {result['p50_ms'] / BOUND_MS:.2f} of the bound of {BOUND_MS:g} ms"
    )
    return 0 if result["p50_ms"] < BOUND_MS else 1


if __name__ == "__main__":
    sys.exit(main())
