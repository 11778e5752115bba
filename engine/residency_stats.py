"""What residency counts."""

from dataclasses import dataclass


@dataclass(slots=True)
class ResidencyStats:
    """Counters since the start; ``load_seconds`` runs from the reserved slot to the last byte."""

    num_loads: int = 0
    num_load_failures: int = 0
    load_seconds: float = 0.0
    loaded_bytes: int = 0
    num_evictions: int = 0
