"""Holds copies of the base's weights that an adapter's file has against the base's own.

PEFT writes the weight below each pair of an embedding or a head, and loads it over the base's. As
long as both are equal nothing has to be served of it, which saves a table of the vocabulary's size
for each such adapter.
"""

from collections.abc import Sequence

import numpy as np

from ipc.base_model import BaseModel
from ipc.errors import AdapterInvalid
from loader.base_weights import BaseWeights
from loader.floats import widen_as
from loader.plan import BaseCopy
from loader.scales import read_all
from loader.strict_json import shorten

# 16 MiB in float32, of which three are held at once.
_CHUNK_VALUES = 1 << 22


def check_copies(
    copies: Sequence[BaseCopy], fds: Sequence[int], base: BaseModel, weights: BaseWeights
) -> None:
    """Returns if each of ``copies``, in the adapter's open files ``fds``, is equal to the base's.

    Raises:
        AdapterInvalid: one is not, or a file of the adapter's was cut short.
        Unavailable: the base model can not be read.
        OSError: the adapter can not be read.
    """
    for copy in copies:
        _check_copy(copy, fds, base, weights)


def _check_copy(copy: BaseCopy, fds: Sequence[int], base: BaseModel, weights: BaseWeights) -> None:
    tensor = copy.stored.tensor
    shape = num_rows, width = base.vocab_size, base.hidden_size
    row_bytes, at_once = tensor.num_bytes // num_rows, max(1, _CHUNK_VALUES // width)
    for first in range(0, num_rows, at_once):
        last = min(first + at_once, num_rows)
        own = weights.read_rows(f"{copy.path}.weight", shape, first, last)
        payload = read_all(
            fds[copy.stored.file],
            tensor.offset + first * row_bytes,
            (last - first) * row_bytes,
            tensor.name,
        )
        stored = widen_as(payload, tensor.dtype, base.dtype).reshape(own.shape)
        differs = (stored != own).any(axis=1)
        if differs.any():
            row = first + int(np.argmax(differs))
            raise AdapterInvalid(
                f"{copy.stored.file_name}: row {row} of tensor {shorten(tensor.name, 160)} differs"
                f" from the base's {copy.path}.weight, which PEFT would put it in the place of; a"
                " changed table can be served as one of modules_to_save, and a copy of the base's"
                " own can be left out (save_pretrained with save_embedding_layers=False)"
            )
