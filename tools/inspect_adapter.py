"""``sidestream adapters inspect``: what a server would make of an adapter, without a server."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ipc.base_model import EMBED_MODULE, HEAD_MODULE, LINEAR_MODULES, BaseModel, DType
from ipc.image import align, layout_image
from ipc.messages import AdapterId, AdapterSource, Manifest
from ipc.trace import NO_TRACE
from loader.adapter_files import AdapterFolders
from loader.config import LoaderConfig
from loader.derived_store import DerivedStore, default_folder
from loader.deriver import Deriver
from loader.inspector import Inspector
from loader.load_trace import LoadTrace
from loader.plan import AdapterPlan
from tools.adapter_base import DEFAULT_DTYPE, base_of_adapter, base_of_model
from tools.options.adapters import ADAPTERS
from tools.values import choices, parse_choice

_MAX_LORA_RANK, _HOST_TIER_MEMORY, _ROW_SCALE_CACHE = (
    next(option for option in ADAPTERS if option.flag == flag)
    for flag in ("--max-lora-rank", "--host-tier-memory", "--row-scale-cache")
)


_MODULES = (EMBED_MODULE, *LINEAR_MODULES, HEAD_MODULE)


@dataclass(frozen=True)
class ModuleRow:
    """What an adapter adds to one kind of module, in all ``layers`` in which it adds the same.

    Embedding and head are in none. ``rank`` is 0 where the module is brought along whole.
    ``pool_bytes`` is what that takes in the pool, in all these layers together.
    """

    module: str
    layers: tuple[int, ...]
    rank: int
    scaling: float
    pool_bytes: int


@dataclass(frozen=True)
class Facts:
    """What a manifest does not say: the base's folder if one was given, how the adapter's tensors
    are written (see ``encodings``), and ``further`` lines by what they are about."""

    model: Path | None
    written: str
    further: Mapping[str, str] = field(default_factory=dict)


def add_inspect_arguments(parser: argparse.ArgumentParser) -> None:
    """Every argument of ``sidestream adapters inspect``."""
    parser.description = (
        "Says what an adapter is and what it would take, or why a server would refuse it; exit"
        " status 1 then. No server has to run."
    )
    parser.add_argument(
        "path", type=Path, metavar="PATH", help="The adapter's folder, or GGUF file."
    )
    parser.add_argument(
        "--model",
        type=Path,
        metavar="FOLDER",
        help="The base model to check it against (default: what the adapter's own tensors tell).",
    )
    parser.add_argument(
        "--dtype",
        type=parse_choice(DType),
        metavar=choices(DType),
        help="What the model computes in (default: the model's own dtype, without a model"
        f" {DEFAULT_DTYPE.value}).",
    )
    parser.add_argument("--json", action="store_true", help="Print one JSON document instead.")
    for option in (_MAX_LORA_RANK, _HOST_TIER_MEMORY, _ROW_SCALE_CACHE):
        parser.add_argument(option.flag, **option.argparse_keywords)


def run_inspect(arguments: argparse.Namespace, console: Console) -> int:
    """Prints the adapter's manifest.

    Raises:
        SidestreamError: a server would refuse the adapter, or there is no such adapter or model.
    """
    path = str(arguments.path.absolute())
    # A server's roots keep tenants apart; whoever runs this may read what they may read.
    folders = AdapterFolders(["/"], None)
    if arguments.model is None:
        base = base_of_adapter(folders, path, arguments.dtype)
    else:
        base = base_of_model(arguments.model, arguments.dtype)
    max_lora_rank, host_tier_bytes = (
        getattr(arguments, option.dest, option.default)
        for option in (_MAX_LORA_RANK, _HOST_TIER_MEMORY)
    )
    inspector = Inspector(folders, base, max_lora_rank, host_tier_bytes)
    manifest = inspector.inspect(AdapterId(0), path)
    source = AdapterSource(manifest.path, manifest.generation)
    adapter = inspector.open(source)
    adapter.files.close()
    further = {}
    if any(module.row_scale for module in manifest.modules):
        cache = getattr(arguments, _ROW_SCALE_CACHE.dest, _ROW_SCALE_CACHE.default)
        further["row scales"] = _row_scales(inspector, source, arguments.model, cache)
    if num_biases := sum(module.bias for module in manifest.modules):
        further["biases"] = f"of {num_biases} modules"
    if adapter.plan.copies:
        further["copies"] = _copies(inspector, manifest, arguments.model)
    facts = Facts(arguments.model, encodings(adapter.plan), further)
    if arguments.json:
        print(_as_json(manifest, base, facts))
    else:
        print_manifest(manifest, base, facts, console)
    return 0


def _as_json(manifest: Manifest, base: BaseModel, facts: Facts) -> str:
    """What ``print_manifest`` prints, as one document; sizes in bytes."""
    document = {
        "path": manifest.path,
        "format": manifest.format,
        "written": facts.written,
        "num_layers": base.num_layers,
        "dtype": base.dtype.value,
        "file_bytes": manifest.file_bytes,
        "pool_bytes": manifest.image_bytes,
        "modules": module_rows(manifest, base),
        "further": facts.further,
    }
    return msgspec.json.format(msgspec.json.encode(document), indent=2).decode()


def _row_scales(
    inspector: Inspector, source: AdapterSource, model: Path | None, cache: str | None
) -> str:
    """Whether a server would have to compute them."""
    if model is None:
        return "computed with the base model's weights; --model tells whether they are"
    folder = default_folder() if cache is None else Path(cache)
    store = DerivedStore(folder, LoaderConfig().row_scale_cache_bytes)
    adapter = Deriver(inspector, str(model), store, 1, LoadTrace(NO_TRACE)).open(source)
    adapter.files.close()
    if adapter.is_complete:
        return f"ready, in {folder}"
    return "pending: computed with the base model's weights when the adapter is first wanted"


def _copies(inspector: Inspector, manifest: Manifest, model: Path | None) -> str:
    """Whether the base's tables that the adapter has as well are equal to the base's own."""
    if model is None:
        return "of the base's own tables; --model tells whether they are equal"
    store = DerivedStore(default_folder(), LoaderConfig().row_scale_cache_bytes)
    Deriver(inspector, str(model), store, 1, LoadTrace(NO_TRACE)).check(manifest)
    return "of the base's own tables, equal to them"


def encodings(plan: AdapterPlan) -> str:
    """How its tensors are written: ``float16, int8 with scales``."""
    found = {
        tensor.format.name.lower() + ("" if tensor.scales is None else " with scales")
        for tensor in plan.tensors
        if tensor.rows and not tensor.is_derived
    }
    return ", ".join(sorted(found))


def module_rows(manifest: Manifest, base: BaseModel) -> list[ModuleRow]:
    """The adapter's modules, in the order of ``_MODULES``, alike ones together."""
    num_bytes = {
        (stage, module): sum(align(e.num_bytes) for e in layout.entries if e.module == module)
        for stage, layout in enumerate(layout_image(base, manifest.modules).stages)
        for module in _MODULES
    }
    ordered = sorted(
        (_MODULES.index(module.module), -module.rank, module.scaling, module.stage)
        for module in manifest.modules
    )
    rows = []
    for (index, negative_rank, scaling), alike in groupby(ordered, lambda each: each[:3]):
        stages = [stage for *_, stage in alike]
        name = _MODULES[index]
        pool_bytes = sum(num_bytes[stage, name] for stage in stages)
        in_layers = (stage for stage in stages if 0 < stage < base.head_stage)
        layers = tuple(stage - base.layer_stage(0) for stage in in_layers)
        rows.append(ModuleRow(name, layers, -negative_rank, scaling, pool_bytes))
    return rows


def print_manifest(manifest: Manifest, base: BaseModel, facts: Facts, console: Console) -> None:
    """Prints what the adapter is, then a row for each kind of module."""
    rows = module_rows(manifest, base)
    lines = Table(box=None, pad_edge=False, show_header=False)
    lines.add_column("")
    lines.add_column("", overflow="fold")
    of_base = "as its tensors tell; --model checks it" if facts.model is None else str(facts.model)
    ranks = sorted({row.rank for row in rows if row.rank})
    for name, value in (
        ("adapter", manifest.path),
        ("format", f"{manifest.format}, {facts.written}"),
        ("base", f"{base.num_layers} layers, {of_base}"),
        ("modules", str(len(manifest.modules))),
        ("ranks", str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"),
        ("on disk", f"{format_bytes(manifest.file_bytes)} of tensors"),
        ("in the pool", f"{format_bytes(manifest.image_bytes)} in {base.dtype.value}"),
        *facts.further.items(),
    ):
        lines.add_row(name, escape(value))
    console.print(lines)
    console.print()
    table = Table(box=None, pad_edge=False)
    table.add_column("module")
    table.add_column("layers", overflow="fold")
    for title in ("rank", "scaling", "in the pool"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.module,
            format_ranges(row.layers),
            str(row.rank) if row.rank else "whole",
            f"{row.scaling:g}" if row.rank else "",
            format_bytes(row.pool_bytes),
        )
    console.print(table)


def format_bytes(num_bytes: int) -> str:
    """``83.9 MB``, ``1.3 GB``, ``640 B``."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.1f} {unit}"
    return f"{num_bytes} B"


def format_ranges(numbers: tuple[int, ...]) -> str:
    """``0-3, 7`` for rising ``numbers``."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][-1] + 1:
            ranges[-1].append(number)
        else:
            ranges.append([number])
    return ", ".join(str(each[0]) if len(each) == 1 else f"{each[0]}-{each[-1]}" for each in ranges)
