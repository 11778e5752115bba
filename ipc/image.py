"""The layout of an adapter's image: the exact bytes that a pool slot will hold.

An image is a row of *stages*: ``embed``, the decoder layers ``0 … L-1``, ``head``. A stage is one
contiguous run of entries; it is also what the pool allocates as one extent and what becomes ready
as a whole. Both the loader, which fills an image, and the engine, which reads one, compute the
layout with ``layout_image`` from the same facts, so it never travels.

Inside a decoder layer's stage, for each group of ``LINEAR_GROUPS`` the A's stand together and are
followed by the B's, so that a fused projection reads one run. ``row_scale``, ``bias`` and
``whole`` entries follow behind all of them.

| kind        | shape                     | dtype         |
|-------------|---------------------------|---------------|
| `lora_a`    | `[padded_rank, in]`       | the model's   |
| `lora_b`    | `[out, padded_rank]`      | the model's   |
| `row_scale` | `[out]`                   | float32       |
| `bias`      | `[out]`                   | the model's   |
| `whole`     | `[out, in]`               | the model's   |

A module's output is ``g ⊙ (y + s · (x Aᵀ) Bᵀ) + bias``: ``y`` is what the base model's linear
computes, its own bias ``b`` included; ``g`` is ``row_scale``, 1 where there is none, and ``bias``
is 0 likewise. DoRA scales the product without ``b``, so beside a ``row_scale`` the ``bias`` entry
of a linear that has one holds ``b ⊙ (1 − g)``, plus what the adapter adds. Both kinds stand beside
a pair of their module, never alone.

The embedding is a linear whose ``x`` has a 1 at the token's index and zeros elsewhere: its ``in``
is the vocabulary. A ``whole`` entry is what the module computes with in the place of the base's
weight; the embedding's lies the other way around, ``[in, out]``, a row a token, as the base's does.

All are row-major. A rank is padded with zeros to a multiple of ``RANK_ALIGNMENT`` and every entry
starts at a multiple of ``ENTRY_ALIGNMENT`` bytes from its stage, as each stage does from the image.
"""

from collections.abc import Hashable, Iterable, Iterator
from enum import Enum

import msgspec

from ipc.base_model import EMBED_MODULE, HEAD_MODULE, LINEAR_GROUPS, BaseModel

RANK_ALIGNMENT = 8
ENTRY_ALIGNMENT = 128


class EntryKind(Enum):
    """What an entry of an image is."""

    LORA_A = "lora_a"
    LORA_B = "lora_b"
    ROW_SCALE = "row_scale"
    BIAS = "bias"
    WHOLE = "whole"


class AdapterModule(msgspec.Struct, frozen=True, array_like=True):
    """What one adapter adds to one module of one stage.

    ``rank`` is the file's own, 0 where the adapter brings no low-rank pair, 1 where that is one of
    zeros for the sake of a bias; ``scaling`` is the ``s`` of ``x Wᵀ + s · (x Aᵀ) Bᵀ``.
    """

    stage: int
    module: str
    rank: int
    scaling: float
    row_scale: bool = False
    bias: bool = False
    whole: bool = False


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """One tensor of an image: ``offset`` and ``num_bytes`` in bytes, from its stage's start."""

    kind: EntryKind
    module: str
    offset: int
    num_bytes: int
    rows: int
    columns: int


class StageLayout(msgspec.Struct, frozen=True, array_like=True):
    """One stage: ``offset`` from the image's start, ``num_bytes`` a multiple of 128 (or 0)."""

    offset: int
    num_bytes: int
    entries: tuple[Entry, ...]


class ImageLayout(msgspec.Struct, frozen=True, array_like=True):
    """Every stage of an image, also the empty ones; ``num_bytes`` is their sum."""

    num_bytes: int
    stages: tuple[StageLayout, ...]

    @property
    def stage_bytes(self) -> tuple[int, ...]:
        return tuple(stage.num_bytes for stage in self.stages)


def padded_rank(rank: int) -> int:
    """``rank`` rounded up to what the kernels' loads need."""
    return -(-rank // RANK_ALIGNMENT) * RANK_ALIGNMENT


def align(num_bytes: int) -> int:
    """``num_bytes`` rounded up to where the next entry may start."""
    return -(-num_bytes // ENTRY_ALIGNMENT) * ENTRY_ALIGNMENT


def layout_image(base: BaseModel, modules: Iterable[AdapterModule]) -> ImageLayout:
    """Where each entry of an adapter with these ``modules`` lies.

    The result depends on the set of modules alone, not on their order. Layers that are alike share
    their ``entries``.

    Raises:
        ValueError: a module is named twice in a stage, is unknown there, or has a negative rank.
    """
    by_stage: dict[int, dict[str, AdapterModule]] = {}
    for module in modules:
        if not 0 <= module.stage < base.num_stages:
            raise ValueError(
                f"stage {module.stage} of {module.module}: not in [0, {base.num_stages})"
            )
        if module.rank < 0:
            raise ValueError(f"rank {module.rank} of {module.module} is negative")
        in_stage = by_stage.setdefault(module.stage, {})
        if module.module in in_stage:
            raise ValueError(f"{module.module} is named twice in stage {module.stage}")
        in_stage[module.module] = module

    stages = []
    image_offset = 0
    layouts: dict[Hashable, tuple[tuple[Entry, ...], int]] = {}
    for stage in range(base.num_stages):
        in_stage = by_stage.get(stage, {})
        is_layer = 0 < stage < base.head_stage
        alike = None if is_layer else stage, frozenset(map(_without_stage, in_stage.values()))
        if alike not in layouts:
            layouts[alike] = _layout_stage(base, stage, in_stage)
        entries, num_bytes = layouts[alike]
        stages.append(StageLayout(image_offset, num_bytes, entries))
        image_offset += num_bytes
    return ImageLayout(image_offset, tuple(stages))


def _without_stage(module: AdapterModule) -> Hashable:
    """What entries depend on."""
    return module.module, module.rank, module.row_scale, module.bias, module.whole


def _layout_stage(
    base: BaseModel, stage: int, modules: dict[str, AdapterModule]
) -> tuple[tuple[Entry, ...], int]:
    entries: list[Entry] = []
    offset = 0
    unplaced = set(modules)
    for kind, name, rows, columns, itemsize in _stage_order(base, stage, modules):
        num_bytes = rows * columns * itemsize
        entries.append(Entry(kind, name, offset, num_bytes, rows, columns))
        offset = align(offset + num_bytes)
        unplaced.discard(name)
    if unplaced:
        raise ValueError(f"stage {stage} has no module called {', '.join(sorted(unplaced))}")
    return tuple(entries), offset


def _stage_order(
    base: BaseModel, stage: int, modules: dict[str, AdapterModule]
) -> Iterator[tuple[EntryKind, str, int, int, int]]:
    """Yields ``(kind, module, rows, columns, bytes per value)`` in the order of the bytes."""
    itemsize = base.dtype.num_bytes
    shapes, groups = _stage_modules(base, stage)
    for group in groups:
        present = [modules[name] for name in group if name in modules]
        ranked = [(module.module, padded_rank(module.rank)) for module in present if module.rank]
        for name, rank in ranked:
            yield EntryKind.LORA_A, name, rank, shapes[name][1], itemsize
        for name, rank in ranked:
            yield EntryKind.LORA_B, name, shapes[name][0], rank, itemsize
    for name, (rows, columns) in shapes.items():
        extra = modules.get(name)
        if extra is None:
            continue
        if extra.row_scale:
            yield EntryKind.ROW_SCALE, name, rows, 1, 4
        if extra.bias:
            yield EntryKind.BIAS, name, rows, 1, itemsize
        if extra.whole:
            # An embedding's table is stored [vocab, hidden]: a row a token.
            whole = (columns, rows) if stage == 0 else (rows, columns)
            yield EntryKind.WHOLE, name, *whole, itemsize


def _stage_modules(
    base: BaseModel, stage: int
) -> tuple[dict[str, tuple[int, int]], tuple[tuple[str, ...], ...]]:
    """``{module: (out, in)}`` of a stage and the groups its modules form.

    An embedding's pair is ``A [r, vocab]`` and ``B [hidden, r]``, as PEFT stores it.
    """
    if stage == 0:
        return {EMBED_MODULE: (base.hidden_size, base.vocab_size)}, ((EMBED_MODULE,),)
    if stage == base.head_stage:
        return {HEAD_MODULE: (base.vocab_size, base.hidden_size)}, ((HEAD_MODULE,),)
    shapes = {shape.name: (shape.out_features, shape.in_features) for shape in base.linears}
    return shapes, LINEAR_GROUPS
