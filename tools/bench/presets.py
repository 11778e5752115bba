"""Workloads that have a name.

Those of the rank-256 and rank-16 adapters come in pairs: one whose adapters all fit into the room
that the description names, and the same with more than fit.
"""

from dataclasses import dataclass

import msgspec

from tools.bench.popularity import Popularity, PopularityKind, num_adapters_of
from tools.bench.workload import TokenRange, Workload


@dataclass(frozen=True)
class Preset:
    """``about`` says what the server should have for the workload to mean what its name says."""

    about: str
    workload: Workload


_OVERLAP = Workload(
    num_requests=100,
    rate=4.0,
    num_adapters=16,
    input_tokens=TokenRange.exactly(2048),
    output_tokens=TokenRange.exactly(1024),
)
_S_LORA = Workload(
    num_requests=600,
    rate=2.0,
    num_adapters=200,
    popularity=Popularity(PopularityKind.POWER_LAW, 1.0),
    input_tokens=TokenRange(8, 512),
    output_tokens=TokenRange(8, 512),
)
_ROTATING = Workload(
    num_requests=240,
    rate=4.0,
    num_adapters=16,
    input_tokens=TokenRange.exactly(1024),
    output_tokens=TokenRange.exactly(64),
    num_bystanders=4,
)


def _punica(kind: PopularityKind, exponent: float = 0.0) -> Workload:
    num_requests, popularity = 256, Popularity(kind, exponent)
    num_adapters = num_adapters_of(popularity, num_requests)
    assert num_adapters is not None, kind
    # Punica's own lengths are those of recorded chats, which do not come with it.
    return Workload(
        num_requests=num_requests,
        rate=None,
        num_adapters=num_adapters,
        popularity=popularity,
        input_tokens=TokenRange.exactly(512),
        output_tokens=TokenRange.exactly(128),
        max_open=32,
    )


def _rotating(num_adapters: int, rate: float) -> Workload:
    return msgspec.structs.replace(
        _ROTATING, num_adapters=num_adapters, rate=rate, num_requests=round(60 * rate)
    )


PRESETS = {
    "overlap": Preset("SGLang's for overlapped loading: 16 adapters over room for 8", _OVERLAP),
    "overlap-large": Preset(
        "the same with copies of one adapter of more than 1 GB (rank 256 of an 8B model)", _OVERLAP
    ),
    "s-lora": Preset("S-LoRA's generator: power law, lengths of [8, 512)", _S_LORA),
    "punica-distinct": Preset(
        "Punica's, every request with an adapter of its own", _punica(PopularityKind.DISTINCT)
    ),
    "punica-uniform": Preset(
        "Punica's, all adapters equally often", _punica(PopularityKind.UNIFORM)
    ),
    "punica-zipf": Preset(
        "Punica's, each adapter 1.5 times as often as the next", _punica(PopularityKind.ZIPF, 1.5)
    ),
    "punica-identical": Preset("Punica's, one adapter for all", _punica(PopularityKind.IDENTICAL)),
    "rank-256-resident": Preset("7 adapters of rank 256, room for 8", _rotating(7, 4.0)),
    "rank-256-rotating": Preset("16 adapters of rank 256, room for 8", _rotating(16, 4.0)),
    "rank-16-resident": Preset("32 adapters of rank 16, room for 33", _rotating(32, 12.0)),
    "rank-16-rotating": Preset("66 adapters of rank 16, room for 33", _rotating(66, 12.0)),
    "churn": Preset(
        "8 adapters, and every second one more is registered and another forgotten",
        msgspec.structs.replace(_ROTATING, num_adapters=8, churn_interval_s=1.0),
    ),
}
