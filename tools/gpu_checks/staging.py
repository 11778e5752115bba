"""What loads cost the others: decode steps while adapters are staged without pause, and in quiet.

The bystanders are a batch of base-model rows that decode through the real step loop. Meanwhile a
real loader stages one large adapter after the other out of its host tier, at the rate of the bus.

No request asks for these adapters: its prefill would lengthen the bystanders' steps by work of its
own, which is not what loading costs. They come in as pinned ones do. Between two steps the rotation
pins the next adapter as soon as one is placed, and unpins that one. All that follows is the
engine's own: residency evicts the least recently used, reserves its slot, the placer fills it, the
table takes it in. Two loads are always asked for, as several waiting requests would.

A phase is some hundred steps, in rounds: each begins anew with the same prompts, so that contexts
do not grow from phase to phase. Quiet and staging phases take turns.
"""

import math
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec
import torch
import uvloop

from engine.__main__ import SWITCH_INTERVAL_S
from engine.config import EngineConfig, MiB
from engine.device import Device
from engine.models.config import read_model_config
from ipc.base_model import DType
from ipc.endpoints import RunFolder
from ipc.image import layout_image
from ipc.messages import TokenDelta
from loader.config import LoaderConfig
from tools.gpu_checks.arithmetic import all_linear_modules
from tools.gpu_checks.bystanders import (
    NUM_ADAPTERS,
    NUM_SLOTS,
    Bystanders,
    Phase,
    Plan,
    Rotation,
    StepClock,
)
from tools.gpu_checks.figures import Figure, Report
from tools.gpu_checks.setting import Setting
from tools.gpu_checks.staged_engine import StagedEngine, refuse_errors
from tools.load_baselines import GB, copy_rate
from tools.load_path import TIMEOUT_S
from tools.shapes import link_adapters, write_adapter


def plan_for(setting: Setting) -> Plan:
    """Adapters of 1.34 GB beside a batch of 32 between 128 and 1,024 tokens; or toys."""
    if setting.is_tiny:
        return Plan(
            rank=16,
            chunk_bytes=64 * 1024,
            batch=4,
            shortest_prompt=16,
            longest_prompt=64,
            steps_per_round=10,
            rounds_per_phase=2,
            num_alternations=1,
        )
    return Plan(
        rank=256,
        chunk_bytes=32 * MiB,
        batch=32,
        shortest_prompt=128,
        longest_prompt=896,
        steps_per_round=100,
        rounds_per_phase=4,
        num_alternations=5,
    )


@dataclass(frozen=True, slots=True)
class Measured:
    """Phases in the order in which they were run, in pairs; ``copy_rate`` in GB/s."""

    plan: Plan
    image_bytes: int
    copy_rate: float
    quiet: list[Phase]
    staging: list[Phase]


def write_adapters(folder: Path, model: Path, rank: int) -> list[Path]:
    """Folders of adapters whose files are one and the same, and on their disk."""
    source = write_adapter(folder / "adapter", model, rank)
    for path in source.iterdir():
        with path.open("rb") as file:
            # So that no write-back disturbs the measurement.
            os.fdatasync(file.fileno())
    return link_adapters(source, folder, [f"adapter-{number}" for number in range(NUM_ADAPTERS)])


def pinned_copy_rate(device: Device, num_bytes: int, chunk_bytes: int) -> float:
    """GB/s of a copy to the device with nothing else to do."""
    is_gpu = device.torch_device.type == "cuda"
    buffer = torch.ones(num_bytes, dtype=torch.uint8, pin_memory=is_gpu)
    return copy_rate(device, buffer, chunk_bytes)


def image_bytes_of(model: Path, rank: int) -> int:
    """Of an adapter in bfloat16 on every linear."""
    base = read_model_config(model).base_model(DType.BFLOAT16)
    return layout_image(base, all_linear_modules(base, rank, 1.0)).num_bytes


async def measure(
    config: EngineConfig, plan: Plan, folders: Sequence[Path], run_folder: RunFolder
) -> Measured:
    """Alternating phases of one engine and one loader."""
    clock = StepClock(plan.batch, plan.settle_steps)
    rotations: list[Rotation] = []

    def step_done(deltas: Mapping[bytes, list[TokenDelta]]) -> None:
        refuse_errors(deltas)
        clock.step(deltas)
        for rotation in rotations:
            rotation.turn()

    engine = StagedEngine(config, run_folder, step_done, clock.fail)
    image_bytes = image_bytes_of(Path(config.model), plan.rank)
    rate = pinned_copy_rate(engine.device, image_bytes, plan.chunk_bytes)
    loader_config = LoaderConfig(
        host_tier_bytes=(NUM_ADAPTERS + 1) * image_bytes + MiB,
        adapter_roots=(str(folders[0].parent),),
    )
    children = []
    try:
        async with engine.running():
            children.append(engine.path.start_loader(loader_config))
            await engine.path.link.wait_connected(TIMEOUT_S)
            manifests = [await engine.register(folder) for folder in folders]
            assert all(manifest.image_bytes == image_bytes for manifest in manifests)
            rotation = Rotation(
                engine.residency, [manifest.generation.counter for manifest in manifests]
            )
            rotations.append(rotation)
            bystanders = Bystanders(engine, clock, rotation, plan)
            await bystanders.warm_up()
            quiet, staging = [], []
            for _ in range(plan.num_alternations):
                quiet.append(await bystanders.phase(staging=False))
                staging.append(await bystanders.phase(staging=True))
    finally:
        for child in children:
            await child.stop()
            child.close()
    return Measured(plan, image_bytes, rate, quiet, staging)


def percentile(samples: Sequence[float], share: float) -> float:
    """The smallest sample that at least ``share`` of them do not exceed."""
    return sorted(samples)[math.ceil(share * len(samples)) - 1]


def add_figures(report: Report, measured: Measured) -> None:
    """Percentiles are of all steps of a kind; the goals are those of the bystanders."""
    quiet = [sample for phase in measured.quiet for sample in phase.samples_s]
    staging = [sample for phase in measured.staging for sample in phase.samples_s]
    for name, samples in (("quiet", quiet), ("while staging", staging)):
        for label, value in (
            ("p50", percentile(samples, 0.5)),
            ("p99", percentile(samples, 0.99)),
            ("max", max(samples)),
        ):
            figure = Figure(f"bystanders' step, {name}: {label}", 1000 * value, unit="ms")
            report.figures.append(figure)
    pairs = list(zip(measured.quiet, measured.staging, strict=True))
    ratios = [
        percentile(loud.samples_s, 0.99) / percentile(still.samples_s, 0.99)
        for still, loud in pairs
    ]
    rates = [rate for phase in measured.staging if (rate := phase.rate(measured.image_bytes))]
    num_loads = sum(len(phase.placed_s) for phase in measured.staging)
    num_chunks = num_loads * -(-measured.image_bytes // measured.plan.chunk_bytes)
    rate = statistics.median(rates) / GB if rates else None
    note = f"{len(quiet)} steps each; single pairs {min(ratios):.3f} to {max(ratios):.3f}"
    report.figures += [
        Figure(
            "bystanders' step: p99 while staging over quiet",
            percentile(staging, 0.99) / percentile(quiet, 0.99),
            1.08,
            note=note,
        ),
        Figure(
            "bystanders' step: p50 while staging over quiet",
            percentile(staging, 0.5) / percentile(quiet, 0.5),
        ),
        Figure("staging meanwhile", rate, unit="GB/s", note=f"{num_loads} adapters"),
        Figure(
            "staging meanwhile, over a pinned copy",
            None if rate is None else rate / measured.copy_rate,
            0.95,
            at_most=False,
        ),
        *_processor_figures(measured, num_chunks),
    ]
    report.details["staging"] = {
        "plan": asdict(measured.plan),
        "image_bytes": measured.image_bytes,
        "copy_gb_s": measured.copy_rate,
        "num_chunks": num_chunks,
        "p99_ratios": ratios,
        "quiet": [asdict(phase) for phase in measured.quiet],
        "staging": [asdict(phase) for phase in measured.staging],
    }


def _processor_figures(measured: Measured, num_chunks: int) -> list[Figure]:
    """Of a chunk: the placer's thread, and what the whole process spends more than in quiet."""

    def total(phases: Sequence[Phase], name: str) -> float:
        return math.fsum(getattr(phase, name) for phase in phases)

    if not num_chunks:
        return []
    # A thread that waits for the GPU spends time as it passes, so quiet is counted by the second.
    quiet_share = total(measured.quiet, "process_s") / total(measured.quiet, "wall_s")
    expected_s = quiet_share * total(measured.staging, "wall_s")
    added_s = total(measured.staging, "process_s") - expected_s
    return [
        Figure(
            "processor time a chunk: placer's thread",
            1e6 * total(measured.staging, "placer_s") / num_chunks,
            unit="µs",
            note="the kernel's and the driver's included",
        ),
        Figure(
            "processor time a chunk: added to the process", 1e6 * added_s / num_chunks, unit="µs"
        ),
    ]


def check_staging(report: Report, setting: Setting) -> None:
    """Adds the figures of bystanders to ``report``."""
    plan = plan_for(setting)
    model = setting.shape("llama-3.1-8b")
    config = setting.engine_config(model)
    folders = write_adapters(setting.work / "adapters", model, plan.rank)
    config = msgspec.structs.replace(
        config,
        max_adapter_bytes=NUM_SLOTS * image_bytes_of(model, plan.rank),
        staging_chunk_bytes=plan.chunk_bytes,
    )
    switch_interval_s = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    run_folder = RunFolder.create([setting.work])
    try:
        measured = uvloop.run(measure(config, plan, folders, run_folder))
    finally:
        run_folder.remove()
        sys.setswitchinterval(switch_interval_s)
    add_figures(report, measured)
