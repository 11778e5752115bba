"""Which adapters the pool can serve, and how their images are laid out there."""

from functools import lru_cache, partial

import msgspec

from engine.adapter_slots import AdapterSlots
from ipc.base_model import BaseModel
from ipc.errors import AdapterInvalid, Internal
from ipc.image import ImageLayout, layout_image
from ipc.messages import AdapterId, Manifest


class AdapterLayouts:
    """Lays out images for one base model and one pool."""

    def __init__(self, base: BaseModel, slots: AdapterSlots) -> None:
        self._slots = slots
        # A layout has hundreds of entries: adapters of one shape share it.
        self._lay_out = lru_cache(maxsize=64)(partial(layout_image, base))

    def lay_out(self, manifest: Manifest, pinned: bool, replaces: AdapterId | None) -> ImageLayout:
        """The layout of an adapter that can be served, and stay if it is to be pinned.

        ``replaces`` is an adapter that goes away for it.

        Raises:
            AdapterInvalid: its image is larger than the pool, or does not fit the base model.
            Overloaded: it is to be pinned, and the pinned ones leave too little room.
            Internal: the loader makes another image of it.
        """
        shape = tuple(msgspec.structs.replace(module, scaling=1.0) for module in manifest.modules)
        try:
            layout = self._lay_out(shape)
        except ValueError as error:
            raise AdapterInvalid(f"the adapter does not fit the base model: {error}") from error
        if layout.num_bytes != manifest.image_bytes:
            raise Internal(
                f"image of {manifest.path}: expected {layout.num_bytes} bytes,"
                f" the loader's manifest says {manifest.image_bytes}"
            )
        self._slots.check_fit(layout)
        if pinned:
            self._slots.check_pin(layout, replaces)
        return layout
