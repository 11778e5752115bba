"""Which adapters a server starts with, and where it may read others."""

from collections.abc import Sequence
from pathlib import Path

from engine.config import StartAdapter
from ipc.errors import InvalidRequest
from ipc.remote_path import is_remote
from loader.remote.address import SCHEMES, parse_address


def existing_folder(text: str, argument: str) -> Path:
    """``text`` without symbolic links. Raises ``InvalidRequest``, which names ``argument``."""
    path = Path(text).resolve()
    if not path.is_dir():
        raise InvalidRequest(f"{argument}: expected a folder, but there is none at {path}")
    return path


def source_prefix(prefix: str) -> str:
    """What addresses of adapters may begin with; a scheme alone allows all of it.

    Raises:
        InvalidRequest: it is no such address.
    """
    if prefix.rstrip("/") in [f"{scheme}:" for scheme in SCHEMES]:
        return f"{prefix.rstrip('/')}//"
    try:
        return str(parse_address(prefix)) if is_remote(prefix) else _refuse_source(prefix)
    except InvalidRequest:
        owner = prefix.removeprefix("hf://").strip("/")
        # All repositories of an owner: one of them stands for what it may be called.
        if not prefix.startswith("hf://") or "/" in owner:
            raise
        parse_address(f"hf://{owner}/any")
        return f"hf://{owner}/"


def _refuse_source(prefix: str) -> str:
    raise InvalidRequest(
        f"--adapter-source {prefix}: expected hf://, s3:// or https:// and what may stand behind;"
        " for folders of this machine there is --adapter-root"
    )


def _adapter_path(text: str, argument: str) -> str:
    """A folder, or a GGUF file, absolute; the folders on its way are no symbolic links. Or an
    address on another machine."""
    if is_remote(text):
        return str(parse_address(text))
    path = Path(text)
    if path.suffix == ".gguf" and path.is_file():
        # What it is a link to may be called by a hash.
        return str(path.parent.resolve() / path.name)
    return str(existing_folder(text, argument))


def _path_in(lora_dir: Path, name: str) -> Path | None:
    """Where the adapter called ``name`` lies, if it is there."""
    folder, file = lora_dir / name, lora_dir / f"{name}.gguf"
    if folder.is_dir() and file.is_file():
        raise InvalidRequest(f"--pin {name}: {lora_dir} has {name}/ and {name}.gguf: expected one")
    return folder.resolve() if folder.is_dir() else file if file.is_file() else None


def start_adapters(
    named_paths: Sequence[tuple[str, str]], pins: Sequence[str], lora_dir: Path | None, base: str
) -> tuple[StartAdapter, ...]:
    """The adapters of ``--lora``, and those of ``--lora-dir`` that ``--pin`` names.

    Raises:
        InvalidRequest: a name twice, one of no adapter, or a folder that is not there.
    """
    adapters: dict[str, StartAdapter] = {}
    for name, path in named_paths:
        if name == base:
            raise InvalidRequest(f"--lora {name}: the base model is called {name} already")
        if name in adapters:
            raise InvalidRequest(f"--lora {name}: this name was given twice")
        place = _adapter_path(path, f"--lora {name}")
        adapters[name] = StartAdapter(name, place, pinned=name in pins)
    for name in pins:
        if name in adapters:
            continue
        found = None if lora_dir is None else _path_in(lora_dir, name)
        if found is None:
            raise InvalidRequest(f"--pin {name}: no adapter of --lora or --lora-dir has this name")
        adapters[name] = StartAdapter(name, str(found), pinned=True)
    return tuple(adapters.values())
