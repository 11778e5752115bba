"""``sidestream serve``: from the command line to three configurations, and to a running server."""

import argparse
import asyncio
import contextlib
import functools
import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import uvloop

from api.config import ApiConfig
from engine.config import EngineConfig, StartAdapter
from ipc import log
from ipc.endpoints import RunFolder, run_folder_parents
from ipc.errors import InvalidRequest, Unavailable
from ipc.remote_path import is_remote
from ipc.trace import create_trace
from loader.config import LoaderConfig
from loader.remote.address import SCHEMES, parse_address
from tools.child import ChildSpec
from tools.options.keys import add_key_options, admin_key_digests, api_key_digests
from tools.options.table import add_options, given_values
from tools.supervisor import ServerSpec, Supervisor
from tools.supervisor_config import SupervisorConfig
from tools.values import parse_name_and_path

# Beside the drain: to close connections and to leave.
_API_STOP_S = 5.0
_ENGINE_STOP_S = 10.0
_LOADER_STOP_S = 5.0
# The loader's own threads, which step back for others, share its work: numpy's would not step back.
_ONE_THREAD_FOR_A_PRODUCT = {"OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@dataclass(frozen=True)
class ServePlan:
    """The configurations of one server's processes."""

    loader: LoaderConfig
    engine: EngineConfig
    api: ApiConfig
    supervisor: SupervisorConfig

    def describe(self) -> str:
        """``model tiny, 4 adapters, further ones in /adapters``"""
        num_adapters = len(self.engine.adapters)
        parts = [
            f"model {self.engine.served_model_name}",
            f"{num_adapters} adapter{'' if num_adapters == 1 else 's'}",
        ]
        if self.engine.lora_dir is not None:
            parts.append(f"further ones in {self.engine.lora_dir}")
        return ", ".join(parts)


@dataclass(frozen=True)
class ReadyServer:
    """A server that answers at ``url``; ``stop`` asks it to end in order, from any thread."""

    url: str
    seconds: float
    stop: Callable[[], object]


def add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    """Every argument of ``sidestream serve``."""
    parser.add_argument(
        "model", metavar="MODEL", help="Folder of a model: config.json, safetensors, tokenizer."
    )
    parser.add_argument(
        "--served-model-name",
        metavar="NAME",
        help="What requests call the base model (default: the name of its folder).",
    )
    parser.add_argument(
        "--lora",
        action="append",
        default=[],
        type=parse_name_and_path,
        metavar="NAME=PATH",
        help="Serve the adapter in PATH, a folder or a GGUF file, or at hf://owner/name[@revision],"
        " s3://bucket/path or https://host/path, as NAME. May be given again.",
    )
    parser.add_argument(
        "--pin",
        action="append",
        default=[],
        metavar="NAME",
        help="Never evict this adapter of --lora or --lora-dir. May be given again.",
    )
    parser.add_argument(
        "--lora-dir",
        metavar="DIR",
        help="Every subfolder, and every NAME.gguf by the name NAME, is an adapter, looked at on"
        " first use.",
    )
    parser.add_argument(
        "--adapter-root",
        action="append",
        default=[],
        metavar="DIR",
        help="Adapters below DIR may be loaded while the server runs. May be given again.",
    )
    parser.add_argument(
        "--adapter-source",
        action="append",
        default=[],
        metavar="PREFIX",
        help="Adapters at hf://, s3:// and https:// addresses below PREFIX may be loaded while the"
        " server runs. May be given again.",
    )
    add_key_options(parser)
    add_options(parser)


def plan_server(arguments: argparse.Namespace) -> ServePlan:
    """The configurations that the command line asks for; every path in them is absolute.

    Raises:
        InvalidRequest: arguments that do not fit together, or a folder that is not there.
    """
    model = _folder(arguments.model, "MODEL")
    name = arguments.served_model_name or model.name
    lora_dir = _folder(arguments.lora_dir, "--lora-dir") if arguments.lora_dir else None
    adapters = _start_adapters(arguments.lora, arguments.pin, lora_dir, name)
    roots = [_folder(root, "--adapter-root") for root in arguments.adapter_root]
    # ``dict`` keeps the order and drops what is named twice.
    paths = [adapter.path for adapter in adapters]
    allowed = dict.fromkeys([*(path for path in paths if not is_remote(path)), *map(str, roots)])
    addresses = dict.fromkeys(filter(is_remote, paths))
    sources = dict.fromkeys(map(_source, arguments.adapter_source))
    supervisor = SupervisorConfig(**given_values(arguments, SupervisorConfig))
    try:
        loader = LoaderConfig(
            adapter_roots=tuple(allowed),
            adapter_sources=tuple(sources),
            adapter_addresses=tuple(addresses),
            lora_dir=str(lora_dir) if lora_dir else None,
            model=str(model),
            trace=supervisor.trace,
            **given_values(arguments, LoaderConfig),
        )
        return ServePlan(
            loader=loader,
            engine=EngineConfig(
                model=str(model),
                served_model_name=name,
                adapters=adapters,
                lora_dir=str(lora_dir) if lora_dir else None,
                trace=supervisor.trace,
                adapter_fetch_timeout_s=loader.adapter_fetch_timeout_s,
                **given_values(arguments, EngineConfig),
            ),
            api=ApiConfig(
                model=str(model),
                served_model_name=name,
                api_key_digests=api_key_digests(arguments, os.environ),
                admin_key_digests=admin_key_digests(arguments, os.environ),
                connect_timeout_s=supervisor.startup_timeout_s,
                **given_values(arguments, ApiConfig),
            ),
            supervisor=supervisor,
        )
    except ValueError as error:
        raise InvalidRequest(str(error)) from error


def server_spec(plan: ServePlan) -> ServerSpec:
    """The three children of ``plan``, each run as a module by this very interpreter."""
    start_s = plan.supervisor.startup_timeout_s

    def child(name: str, config: msgspec.Struct, stop_s: float) -> ChildSpec:
        return ChildSpec(name, (sys.executable, "-m", name), config, start_s, stop_s)

    loader = child("loader", plan.loader, _LOADER_STOP_S)
    return ServerSpec(
        loader=replace(loader, environment=_ONE_THREAD_FOR_A_PRODUCT),
        engine=child("engine", plan.engine, _ENGINE_STOP_S),
        api=child("api", plan.api, plan.api.drain_s + _API_STOP_S),
    )


def serve(plan: ServePlan, announce: Callable[[ReadyServer], None]) -> int:
    """Runs the server of ``plan`` until SIGINT, SIGTERM or ``ReadyServer.stop``; the exit status.

    ``announce`` is called once, on the event loop. Status 0: every process ended in its time;
    1: one had to be killed.

    Raises:
        InvalidRequest: the trace's file can not be written.
        Unavailable: the server could not start, and why.
    """
    level = plan.supervisor.log_level.value
    log.configure("supervisor", level)
    if plan.supervisor.trace is not None:
        create_trace(Path(plan.supervisor.trace))
    with reserve_port(plan.api.host, plan.api.port) as port:
        settled = replace(plan, api=msgspec.structs.replace(plan.api, port=port))

        async def run() -> bool:
            loop = asyncio.get_running_loop()

            def started(seconds: float) -> None:
                stop = functools.partial(loop.call_soon_threadsafe, supervisor.stop)
                announce(ReadyServer(_url(plan.api.host, port), seconds, stop))

            run_folder = RunFolder.create(run_folder_parents())
            supervisor = Supervisor(server_spec(settled), run_folder, level, started)
            return await supervisor.run()

        return 0 if uvloop.run(run()) else 1


@contextlib.contextmanager
def reserve_port(host: str, port: int) -> Iterator[int]:
    """Keeps a port of ``host`` for this server's own children, also while none of them listens.

    A socket that is bound and does not listen lets those bind that set SO_REUSEADDR, as every
    server does, but is never chosen for somebody else's port 0.

    Raises:
        Unavailable: the address is not ours, or another server listens there.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM
        )[0]
        reserved = socket.socket(family, kind, protocol)
    except OSError as error:
        raise Unavailable(f"can not listen at {host}:{port}: {error.strerror}") from error
    with reserved:
        try:
            reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            reserved.bind(address)
        except OSError as error:
            raise Unavailable(f"can not listen at {host}:{port}: {error.strerror}") from error
        yield int(reserved.getsockname()[1])


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _folder(text: str, argument: str) -> Path:
    path = Path(text).resolve()
    if not path.is_dir():
        raise InvalidRequest(f"{argument}: expected a folder, but there is none at {path}")
    return path


def _source(prefix: str) -> str:
    """What addresses of adapters may begin with; a scheme alone allows all of it."""
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
    return str(_folder(text, argument))


def _path_in(lora_dir: Path, name: str) -> Path | None:
    """Where the adapter called ``name`` lies, if it is there."""
    folder, file = lora_dir / name, lora_dir / f"{name}.gguf"
    if folder.is_dir() and file.is_file():
        raise InvalidRequest(f"--pin {name}: {lora_dir} has {name}/ and {name}.gguf: expected one")
    return folder.resolve() if folder.is_dir() else file if file.is_file() else None


def _start_adapters(
    named_paths: Sequence[tuple[str, str]], pins: Sequence[str], lora_dir: Path | None, base: str
) -> tuple[StartAdapter, ...]:
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
