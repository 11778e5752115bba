"""Reads an adapter's image as the loader does, on this thread."""

from ipc.messages import AdapterSource, Manifest
from loader.blocks import cut
from loader.host_tier import HostTier
from loader.inspector import Inspector, OpenAdapter
from loader.shared_blocks import BlockReader, SharedBlocks

HOST_TIER_BYTES = 1 << 22
_BLOCK_BYTES = 10_000


def source_of(manifest: Manifest) -> AdapterSource:
    """What the engine would ask for, once it has the manifest."""
    return AdapterSource(manifest.path, manifest.generation)


def read_image(inspector: Inspector, manifest: Manifest) -> bytes:
    """The image of the adapter that ``inspector`` has inspected."""
    return read_open(inspector.open(source_of(manifest)), manifest)


def read_open(adapter: OpenAdapter, manifest: Manifest) -> bytes:
    """The image of an adapter that was opened; closes its files."""
    try:
        image = HostTier(HOST_TIER_BYTES).reserve(manifest.generation, adapter.plan.layout, [])
        assert image is not None
        blocks = SharedBlocks(cut(adapter.plan, _BLOCK_BYTES))
        BlockReader().read(blocks, image, adapter.files, adapter.plan)
        return b"".join(image.views(0, image.num_bytes))
    finally:
        adapter.files.close()
