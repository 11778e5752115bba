"""What the engine counts, as it tells it: plain numbers, from which the frontend makes metrics.

Counters begin at 0 with every start of the engine. Seconds are of monotonic clocks.
"""

import msgspec


class HistogramCounts(msgspec.Struct, frozen=True, array_like=True):
    """How many observations there were up to each bound.

    ``counts[i]`` were above ``bounds[i - 1]`` and not above ``bounds[i]``; the last one of
    ``counts``, which has one more, those above all bounds. ``sum`` is that of all observations.
    """

    bounds: tuple[float, ...] = ()
    counts: tuple[int, ...] = (0,)
    sum: float = 0.0


class AdapterHits(msgspec.Struct, frozen=True):
    """Where sequences found their adapter when they were accepted, each counted once.

    ``loading`` was already on its way into the pool, ``host`` in the loader's memory only, and
    ``disk`` in no memory.
    """

    gpu: int = 0
    loading: int = 0
    host: int = 0
    disk: int = 0


class LoadStats(msgspec.Struct, frozen=True):
    """Loads into the pool, each counted once when it is over, by what became of it.

    ``load_seconds`` are those that were placed, from the slot's reservation to the last byte in it;
    ``place_seconds``, of the same, the sum of their copies from the ring. Loads that failed ran
    into an error or out of time; cancelled ones were wanted by nobody any more; lost ones went with
    their loader, and are tried again with the next. ``num_evictions`` counts adapters that left
    the pool to make room for others.
    """

    load_seconds: HistogramCounts = HistogramCounts()
    place_seconds: HistogramCounts = HistogramCounts()
    loaded_bytes: int = 0
    num_failed: int = 0
    num_cancelled: int = 0
    num_lost: int = 0
    num_evictions: int = 0


class StepStats(msgspec.Struct, frozen=True):
    """Steps that are complete, and for how long they kept the device busy, by their kind.

    A step of decodes has one token of each sequence. A layers step has a group of layers of one
    prefill and nothing else, all others are prefill steps. A decode step is *beside loads* if one
    was under way at any time between the end of the step before and its own.

    ``bystander_seconds`` is the device time of decode steps beside loads; ``quiet_seconds`` what
    the same steps were expected to take: for each, the running mean of those not beside loads with
    as many sequences, and about as many adapters. Steps for which no such mean is known yet are in
    neither. What loads cost everybody else is the difference of the two; it may be negative for a
    while, as each step is a little longer or shorter than the mean.
    """

    num_decodes: int = 0
    num_prefills: int = 0
    num_layers: int = 0
    decode_seconds: float = 0.0
    prefill_seconds: float = 0.0
    layers_seconds: float = 0.0
    beside_loads: HistogramCounts = HistogramCounts()
    without_loads: HistogramCounts = HistogramCounts()
    bystander_seconds: float = 0.0
    quiet_seconds: float = 0.0


class LoaderStats(msgspec.Struct, frozen=True):
    """What the engine's loaders have told so far, whichever of them it was.

    ``epoch`` is that of the one which is connected, or was last; 0 before the first. Of each load
    that was sent to its end, ``queue_seconds`` is how long it took until its adapter was being
    read, or copied if it lay in the host tier, and ``copy_seconds`` the sum of its copies into the
    staging ring. Of each image that was made of files, also ahead of any load, ``read_seconds`` and
    ``dequantize_seconds`` together are how long that took, divided as its threads' time was between
    reading and converting.
    """

    epoch: int = 0
    num_connections: int = 0
    host_tier_bytes: int = 0
    host_tier_bytes_used: int = 0
    num_host_evictions: int = 0
    file_bytes_read: int = 0
    bytes_copied_from_host: int = 0
    bytes_copied_from_disk: int = 0
    queue_seconds: HistogramCounts = HistogramCounts()
    read_seconds: HistogramCounts = HistogramCounts()
    dequantize_seconds: HistogramCounts = HistogramCounts()
    copy_seconds: HistogramCounts = HistogramCounts()
