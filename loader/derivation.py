"""Computes what an image holds of a linear that no file does: row scales and biases.

With ``W`` and ``b`` the base's, ``A``, ``B`` and ``s`` the adapter's, ``m`` the magnitudes of DoRA
and ``t`` a trained bias, ``[out]`` each, 1 and ``b`` where the adapter has none:

    row_scale:  g = m / ‖W + s·BA‖       the norm of each row, over the input dimension
    bias:       t − g ⊙ b                what is added to g ⊙ (x Wᵀ + b + s · (x Aᵀ) Bᵀ)

``W``, ``b``, ``A`` and ``B`` are those that are served, rounded to the model's dtype: so that each
row of the weight that is served has the norm ``m``, which is what DoRA means. Norms are computed in
float32. PEFT computes them in the model's dtype, out of the values that its model holds; in float32
both are the same.

``W + s·BA`` is summed up before it is squared, some rows at a time. To expand the square, so that
``‖W‖²`` could be kept for all adapters, would take as many operations: ``W Aᵀ`` is a product of the
same size as ``BA``. And where rows nearly cancel, the expanded terms lose all of their digits.

Source: ``DoraLinearLayer`` of PEFT 0.21.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from ipc.base_model import BaseModel
from ipc.errors import AdapterInvalid
from ipc.image import AdapterModule, layout_image
from ipc.messages import Generation
from loader.base_weights import BaseWeights
from loader.blocks import cut
from loader.floats import Floats, widen, widen_image
from loader.host_tier import HostImage
from loader.inspector import OpenAdapter
from loader.plan import AdapterPlan, LinearDerivation
from loader.scales import StoredTensor
from loader.shared_blocks import BlockReader, SharedBlocks

FORMULA = 1
"""Counts up with every change of what is computed here: what was kept before is not used then."""

# Values of a weight that are taken at a time: 4 MiB in float32, the most that a thread holds of
# the base, next to a product of the same size.
_CHUNK_VALUES = 1 << 20
_BLOCK_BYTES = 8 << 20


def derive_row_scales(
    derivation: LinearDerivation,
    adapter: OpenAdapter,
    generation: Generation,
    base: BaseModel,
    weights: BaseWeights,
    reader: BlockReader,
    check: Callable[[], None],
) -> Floats:
    """``g`` of one linear that DoRA changes: ``[out]`` float32.

    ``check`` is called before every chunk of the base's weight, and may raise.

    Raises:
        AdapterInvalid: a value of the adapter's is not finite, or a row scale would not be.
        Unavailable: the base model can not be read.
        OSError: the adapter can not be read.
    """
    assert derivation.magnitude is not None
    shape = base.linear(derivation.module)
    a, b = _read_pair(derivation, adapter, generation, base, reader)

    def read_rows(first: int, last: int) -> Floats:
        check()
        weight_shape = (shape.out_features, shape.in_features)
        return weights.read_rows(f"{derivation.path}.weight", weight_shape, first, last)

    norms = row_norms(read_rows, a, b, derivation.scaling)
    magnitudes = _read_vector(derivation.magnitude, adapter.files.fds)
    return row_scales(magnitudes, norms, derivation.path)


def derive_bias(
    derivation: LinearDerivation,
    row_scale: Floats | None,
    adapter: OpenAdapter,
    base: BaseModel,
    weights: BaseWeights,
) -> Floats:
    """``t − g ⊙ b`` of one linear that ``adds_bias``: ``[out]`` float32, ``g = 1`` without a scale.

    Raises:
        AdapterInvalid: a value of the adapter's is not finite.
        Unavailable: the base model can not be read.
        OSError: the adapter can not be read.
    """
    rows = base.linear(derivation.module).out_features
    bias = weights.read_rows(f"{derivation.path}.bias", (rows,), 0, rows)
    trained = bias
    if derivation.trained_bias is not None:
        trained = _read_vector(derivation.trained_bias, adapter.files.fds)
    scaled = bias.astype(np.float64)
    if row_scale is not None:
        scaled *= row_scale
    return (trained - scaled).astype(np.float32)


def row_norms(
    read_rows: Callable[[int, int], Floats], a: Floats, b: Floats, scaling: float
) -> Floats:
    """``‖W + s·BA‖`` of each row: ``[out]`` float32.

    ``read_rows(first, last)`` gives rows of ``W [out, in]``; ``a`` is ``[r, in]``, ``b`` ``[out,
    r]``.
    """
    num_rows, at_once = len(b), max(1, _CHUNK_VALUES // a.shape[1])
    scaled = b * np.float32(scaling)
    norms = np.empty(num_rows, np.float32)
    # Whoever divides by a norm looks at it.
    with np.errstate(over="ignore", invalid="ignore"):
        for first in range(0, num_rows, at_once):
            last = min(first + at_once, num_rows)
            total = read_rows(first, last)
            total += scaled[first:last] @ a
            np.square(total, out=total)
            np.sqrt(total.sum(axis=1), out=norms[first:last])
    return norms


def row_scales(magnitudes: Floats, norms: Floats, path: str) -> Floats:
    """``m / ‖W + s·BA‖`` of the linear at ``path``: ``[out]`` float32.

    Raises:
        AdapterInvalid: a norm is 0, or it or its scale is infinite or not a number.
    """
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        scales = magnitudes / norms
    wrong = ~(np.isfinite(scales) & np.isfinite(norms))
    if wrong.any():
        row = int(wrong.argmax())
        raise AdapterInvalid(
            f"row {row} of {path}: its row scale would be {magnitudes[row]:g} / {norms[row]:g}, the"
            " magnitude over the norm of W + s·BA; expected a finite number"
        )
    return scales


def _read_pair(
    derivation: LinearDerivation,
    adapter: OpenAdapter,
    generation: Generation,
    base: BaseModel,
    reader: BlockReader,
) -> tuple[Floats, Floats]:
    """``A`` and ``B`` as an image holds them, padding included: ``[r, in]``, ``[out, r]``."""
    stage, module = derivation.stage, derivation.module
    tensors = [
        tensor
        for tensor in adapter.plan.tensors
        if (tensor.stage, tensor.entry.module) == (stage, module) and not tensor.is_derived
    ]
    alone = AdapterModule(stage, module, tensors[0].rows, derivation.scaling)
    layout = layout_image(base, [alone])
    entries = layout.stages[stage].entries
    plan = AdapterPlan(
        adapter.plan.format,
        (alone,),
        layout,
        base.dtype,
        tuple(replace(each, entry=entry) for each, entry in zip(tensors, entries, strict=True)),
    )
    memory = memoryview(bytearray(layout.num_bytes))
    image = HostImage(generation, layout, {stage: 0}, memory, layout.num_bytes)
    reader.read(SharedBlocks(cut(plan, _BLOCK_BYTES)), image, adapter.files, plan)
    a, b = (
        widen_image(memory[entry.offset : entry.offset + entry.num_bytes], base.dtype).reshape(
            entry.rows, entry.columns
        )
        for entry in entries
    )
    return a, b


def _read_vector(stored: StoredTensor, fds: Sequence[int]) -> Floats:
    values = widen(stored.read(fds), stored.tensor.dtype)
    if not np.isfinite(values).all():
        raise AdapterInvalid(
            f"tensor {stored.tensor.name!r} has a value that is infinite or not a number"
        )
    return values
