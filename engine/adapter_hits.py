"""Where requests find their adapter when they come."""

from collections.abc import Iterable

from ipc.messages import AdapterId, Residency
from ipc.stats import AdapterHits


class HitCounts:
    """Counts each sequence once. Owned by the step thread, and told of the loader's memory."""

    def __init__(self) -> None:
        self._counts = dict.fromkeys(Residency, 0)
        self._in_host_tier: set[AdapterId] = set()

    def host_tier_changed(self, added: Iterable[AdapterId], removed: Iterable[AdapterId]) -> None:
        """Adapters came into the loader's memory, or left it."""
        self._in_host_tier.difference_update(removed)
        self._in_host_tier.update(added)

    def loader_lost(self) -> None:
        """Its memory went with it."""
        self._in_host_tier.clear()

    def is_in_host_tier(self, adapter_id: AdapterId) -> bool:
        """Whether the loader has said that it has the adapter in its memory."""
        return adapter_id in self._in_host_tier

    def asked(self, adapter_id: AdapterId, tier: Residency) -> None:
        """A sequence came for the adapter; ``tier`` is as ``AdapterResidency.tier`` says."""
        if tier is Residency.DISK and adapter_id in self._in_host_tier:
            tier = Residency.HOST
        self._counts[tier] += 1

    def counts(self) -> AdapterHits:
        """All so far."""
        return AdapterHits(
            gpu=self._counts[Residency.GPU],
            loading=self._counts[Residency.LOADING],
            host=self._counts[Residency.HOST],
            disk=self._counts[Residency.DISK],
        )
