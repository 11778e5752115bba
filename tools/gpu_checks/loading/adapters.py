"""The adapters of the measured servers: few files, under as many names as a workload asks for."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.models.config import read_model_config
from engine.slot_allocator import slot_bytes
from ipc.base_model import LINEAR_MODULES, DType
from ipc.image import AdapterModule, layout_image
from tools.shapes import link_adapters, write_adapter

ATTENTION_MODULES = LINEAR_MODULES[:4]


@dataclass(frozen=True, slots=True)
class Kind:
    """Adapters of one rank on the same linears: their files hold equal bytes."""

    rank: int
    modules: tuple[str, ...] = LINEAR_MODULES


@dataclass(frozen=True, slots=True)
class Family:
    """A ``--lora-dir``: the adapters ``prefix-000``, ``prefix-001``, … of each prefix.

    ``groups`` are ``(prefix, kinds)``, and have as many adapters as kinds.
    """

    name: str
    groups: tuple[tuple[str, tuple[Kind, ...]], ...]

    def names(self, prefix: str) -> list[str]:
        """The adapters of one prefix, in order. Raises ``KeyError`` for another family's."""
        return [_name(prefix, number) for number in range(len(dict(self.groups)[prefix]))]


class AdapterFolders:
    """Writes families below ``folder`` when they are first asked for."""

    def __init__(self, folder: Path, model: Path) -> None:
        self._folder = folder
        self._model = model
        self._base = read_model_config(model).base_model(DType.BFLOAT16)
        self._sources: dict[Kind, Path] = {}

    def slot_bytes(self, kind: Kind) -> int:
        """What one adapter takes of a pool."""
        modules = (
            AdapterModule(self._base.layer_stage(layer), module, kind.rank, 1.0)
            for layer in range(self._base.num_layers)
            for module in kind.modules
        )
        return slot_bytes(layout_image(self._base, modules).stage_bytes)

    def folder_of(self, family: Family) -> Path:
        """The family's folder, all adapters in it. They are hard links to one file a kind."""
        folder = self._folder / family.name
        if folder.is_dir():
            return folder
        for prefix, kinds in family.groups:
            by_kind: dict[Kind, list[str]] = {}
            for number, kind in enumerate(kinds):
                by_kind.setdefault(kind, []).append(_name(prefix, number))
            for kind, names in by_kind.items():
                link_adapters(self._source(kind), folder, names)
        return folder

    def _source(self, kind: Kind) -> Path:
        if kind not in self._sources:
            number = len(self._sources)
            folder = self._folder / "sources" / f"{number}-r{kind.rank}"
            self._sources[kind] = write_adapter(
                folder, self._model, kind.rank, kind.modules, seed=number
            )
        return self._sources[kind]


def in_turn(kinds: Sequence[Kind], count: int) -> tuple[Kind, ...]:
    """``count`` kinds that take turns."""
    return tuple(kinds[number % len(kinds)] for number in range(count))


def _name(prefix: str, number: int) -> str:
    return f"{prefix}-{number:04d}"
