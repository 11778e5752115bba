"""Reads an adapter's image as the loader does, on this thread."""

from ipc.messages import AdapterSource, Manifest
from loader.blocks import cut
from loader.host_tier import HostTier
from loader.inspector import Inspector
from loader.shared_blocks import BlockReader, SharedBlocks

HOST_TIER_BYTES = 1 << 22
_BLOCK_BYTES = 10_000


def read_image(inspector: Inspector, manifest: Manifest) -> bytes:
    """The image of the adapter that ``inspector`` has inspected."""
    adapter = inspector.open(AdapterSource(manifest.path, manifest.generation))
    try:
        image = HostTier(HOST_TIER_BYTES).reserve(manifest.generation, adapter.plan.layout, [])
        assert image is not None
        blocks = SharedBlocks(cut(adapter.plan, _BLOCK_BYTES))
        BlockReader().read(blocks, image, adapter.files, adapter.plan)
        return b"".join(image.views(0, image.num_bytes))
    finally:
        adapter.files.close()
