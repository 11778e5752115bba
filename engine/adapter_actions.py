"""What residency asks the core to carry out, in this order and before the next step is launched."""

from dataclasses import dataclass

from ipc.errors import SidestreamError
from ipc.image import ImageLayout
from ipc.messages import AdapterId, AdapterSource, Forget, LoadId, Manifest, Warm


@dataclass(frozen=True, slots=True)
class BeginLoad:
    """A slot is reserved: tell the placer, then send the loader ``Stage``.

    ``extents`` are bytes from the arena's start, one for each stage of ``layout``. With
    ``follows_steps`` one that was launched before may still read what lay there: the first copy
    into them waits for it.
    """

    load_id: LoadId
    adapter_id: AdapterId
    source: AdapterSource
    layout: ImageLayout
    extents: tuple[int, ...]
    follows_steps: bool


@dataclass(frozen=True, slots=True)
class AbandonLoad:
    """Tell the placer, and send the loader ``CancelLoad`` if there is one.

    The placer answers exactly once, with ``AdapterResidency.load_abandoned``, when nothing writes
    into the slot any more; also when the load was complete already.
    """

    load_id: LoadId


@dataclass(frozen=True, slots=True)
class InstallAdapter:
    """Enter the adapter into the pool's table: ``extents`` hold its image.

    Once for each load: as soon as whole layers lie there, of which alone steps may make use, or
    when all of it does.
    """

    adapter_id: AdapterId
    manifest: Manifest
    layout: ImageLayout
    extents: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RemoveAdapter:
    """Take the adapter out of the pool's table: no step to come uses it."""

    adapter_id: AdapterId


@dataclass(frozen=True, slots=True)
class FailRequests:
    """Take the adapter's waiting sequences (``Scheduler.fail_adapter``), answer with ``error``."""

    adapter_id: AdapterId
    error: SidestreamError


AdapterAction = (
    BeginLoad | AbandonLoad | InstallAdapter | RemoveAdapter | FailRequests | Warm | Forget
)
"""``Warm`` goes to the loader as it is; ``Forget`` too, and ``BlockManager.forget_adapter``."""
