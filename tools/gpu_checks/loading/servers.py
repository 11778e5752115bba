"""The servers that are measured, one after the other: how each starts, and what is asked of it."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import msgspec

from engine.config import AdapterLoading, EngineConfig, LoadFormat
from ipc.image import align
from tools.bench.popularity import Popularity, PopularityKind
from tools.bench.warm_up import WarmUp
from tools.bench.workload import TokenRange, Workload
from tools.gpu_checks.loading.adapters import (
    ATTENTION_MODULES,
    AdapterFolders,
    Family,
    Kind,
    in_turn,
)
from tools.gpu_checks.loading.loads import Load, cold_then_warm, in_groups
from tools.gpu_checks.setting import GiB, Setting

DEFAULT_MODE: AdapterLoading = next(
    field.default
    for field in msgspec.structs.fields(EngineConfig)
    if field.name == "adapter_loading"
)

# Names of loads; those of the servers with adapters of rank 256 are names of loading modes.
# All of them are also names of files.
RESIDENT, ROTATING = "7-resident", "16-rotating"
RESIDENT_LONG, ROTATING_LONG, FIRST_TOUCH = "8-resident-long", "16-rotating-long", "first-touch"
PAIRS = "cold-then-warm"
TRACED, TRACED_FREE, PULL_REQUEST = "traced", "traced-loads-for-nothing", "pull-request"
TENTH, ALL_RESIDENT, POWER_LAW = "room-for-a-tenth", "room-for-all", "power-law"
COHORTS, NO_COHORTS, COHORTS_BLOCKING = "cohorts", "no-cohorts", "no-cohorts-blocking"
GROUPS = "groups-of-4"

_START_S = 40.0
_GROUP_SIZE = 4
# Of a pool, for what its coalescing free lists can not use at the edge of a fit.
_SLACK = 1.02


@dataclass(frozen=True, slots=True)
class ServerPlan:
    """One server. ``options`` are those of ``sidestream serve`` beside the common ones."""

    name: str
    family: Family
    pool_bytes: int
    kv_cache_bytes: int
    loads: tuple[Load, ...]
    options: tuple[str, ...] = ()
    is_traced: bool = False

    @property
    def expected_s(self) -> float:
        return _START_S + sum(load.expected_s for load in self.loads)

    def only(self, names: Iterable[str]) -> "ServerPlan":
        """The same with the loads of these names alone."""
        return replace(self, loads=tuple(load for load in self.loads if load.name in names))


def all_servers(setting: Setting, folders: AdapterFolders) -> list[ServerPlan]:
    """Every server of every row."""
    return [
        *_rank_256_servers(setting, folders),
        *_traced_servers(setting, folders),
        *_power_law_servers(setting, folders),
        *_cohort_servers(setting, folders),
    ]


def _large(setting: Setting) -> Kind:
    return Kind(setting.of(256, 8))


def _rank_256(setting: Setting) -> Family:
    """16 adapters over room for 8; of those to be touched for the first time, all there are."""
    kind = _large(setting)
    num_touched = _rotating_long(setting).num_requests
    return Family("rank-256", (("lora", (kind,) * 16), ("touch", (kind,) * num_touched)))


def _rotating(setting: Setting) -> Workload:
    return _paced(
        setting,
        rate=4.0,
        num_adapters=16,
        input_tokens=TokenRange.exactly(setting.of(1024, 16)),
        output_tokens=TokenRange.exactly(setting.of(64, 4)),
        num_bystanders=setting.of(4, 1),
        bystander_output_tokens=setting.of(2048, 32),
    )


def _rotating_long(setting: Setting) -> Workload:
    return msgspec.structs.replace(
        _rotating(setting),
        input_tokens=TokenRange.exactly(setting.of(2048, 32)),
        num_bystanders=0,
    )


def _rank_256_servers(setting: Setting, folders: AdapterFolders) -> list[ServerPlan]:
    """One server for each mode: all loads for the default, those that compare for the others."""
    short, long = _rotating(setting), _rotating_long(setting)
    rehearsed = setting.of(20, 4)
    pairs = Load(
        PAIRS,
        Workload(
            num_requests=setting.of(64, 34),
            rate=None,
            num_adapters=16,
            input_tokens=TokenRange.exactly(setting.of(2048, 32)),
            output_tokens=TokenRange.exactly(1),
            max_open=1,
        ),
        "lora",
        # One whole turn: the adapters of the first pairs are not in the pool when it begins.
        rehearsed=32,
        arrange=cold_then_warm,
    )
    rotating = Load(ROTATING, short, "lora", rehearsed)
    loads = {
        DEFAULT_MODE: (
            Load(RESIDENT, msgspec.structs.replace(short, num_adapters=7), "lora", rehearsed),
            rotating,
            pairs,
            Load(RESIDENT_LONG, msgspec.structs.replace(long, num_adapters=8), "lora", rehearsed),
            Load(ROTATING_LONG, long, "lora", rehearsed),
            Load(
                FIRST_TOUCH,
                msgspec.structs.replace(long, num_adapters=long.num_requests),
                "touch",
                rehearsed=0,
                warm_up=WarmUp.BASE,
            ),
        ),
        AdapterLoading.BLOCKING: (rotating, pairs),
    }
    return [
        ServerPlan(
            mode.value,
            _rank_256(setting),
            8 * folders.slot_bytes(_large(setting)),
            32 * GiB,
            loads.get(mode, (pairs,)),
            ("--adapter-loading", mode.value),
        )
        for mode in (DEFAULT_MODE, *(mode for mode in AdapterLoading if mode is not DEFAULT_MODE))
    ]


def _traced_servers(setting: Setting, folders: AdapterFolders) -> list[ServerPlan]:
    """Pull request 15512's workload over slots for half of its adapters."""
    workload = Workload(
        num_requests=setting.of(100, 8),
        rate=float(setting.of(4, 20)),
        num_adapters=16,
        input_tokens=TokenRange.exactly(setting.of(2048, 32)),
        output_tokens=TokenRange.exactly(setting.of(1024, 8)),
    )
    load = Load(PULL_REQUEST, workload, "lora", setting.of(16, 4))
    server = ServerPlan(
        TRACED,
        _rank_256(setting),
        8 * folders.slot_bytes(_large(setting)),
        32 * GiB,
        (load,),
        is_traced=True,
    )
    free = ("--adapter-load-format", LoadFormat.DUMMY.value)
    return [server, replace(server, name=TRACED_FREE, options=free)]


def _power_law_servers(setting: Setting, folders: AdapterFolders) -> list[ServerPlan]:
    """S-LoRA's generator, with so many adapters that a tenth of them is a pool of its own."""
    num_adapters = setting.of(1000, 20)
    kinds = tuple(Kind(rank, ATTENTION_MODULES) for rank in (32, 16, 8, 4))
    registered = in_turn(kinds, num_adapters)
    total_bytes = sum(map(folders.slot_bytes, registered))
    workload = _paced(
        setting,
        rate=8.0,
        num_adapters=num_adapters,
        popularity=Popularity(PopularityKind.POWER_LAW, 1.0),
        input_tokens=TokenRange(8, setting.of(512, 32)),
        output_tokens=TokenRange(8, setting.of(512, 16)),
    )
    load = Load(POWER_LAW, workload, "lora", setting.of(40, 4))
    server = ServerPlan(
        TENTH,
        Family("power-law", (("lora", registered),)),
        align(total_bytes // 10),
        12 * GiB,
        (load,),
    )
    return [
        server,
        replace(server, name=ALL_RESIDENT, pool_bytes=align(round(_SLACK * total_bytes))),
    ]


def _cohort_servers(setting: Setting, folders: AdapterFolders) -> list[ServerPlan]:
    """Four adapters at a time, never those in the pool; three load quickly, the fourth does not."""
    quick, slow = Kind(8), Kind(setting.of(64, 16))
    group = (quick, quick, quick, slow)
    workload = _paced(
        setting,
        rate=20.0,
        num_adapters=2 * _GROUP_SIZE,
        input_tokens=TokenRange.exactly(setting.of(64, 16)),
        output_tokens=TokenRange.exactly(1),
    )
    load = Load(GROUPS, workload, "lora", setting.of(80, 8), arrange=in_groups(_GROUP_SIZE))
    server = ServerPlan(
        NO_COHORTS,
        Family("cohorts", (("lora", group + group),)),
        align(round(_SLACK * sum(map(folders.slot_bytes, group)))),
        12 * GiB,
        (load,),
    )
    blocking = ("--adapter-loading", AdapterLoading.BLOCKING.value)
    return [
        replace(server, options=("--no-adapter-cohorts",)),
        replace(server, name=COHORTS),
        replace(server, name=COHORTS_BLOCKING, options=blocking),
    ]


def _paced(setting: Setting, *, rate: float, **numbers: object) -> Workload:
    """As many requests as arrive in the time that a server is to be measured."""
    num_requests = max(1, round(rate * setting.duration_s))
    if setting.is_tiny:
        # More than adapters, so that each comes back.
        num_requests, rate = 20, 40.0
    return msgspec.convert({"num_requests": num_requests, "rate": rate, **numbers}, type=Workload)
