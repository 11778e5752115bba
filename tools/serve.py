"""``sidestream serve``: from the command line to three configurations, and to a running server."""

import argparse
import asyncio
import contextlib
import errno
import functools
import os
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import uvloop

from api.config import ApiConfig
from engine.config import EngineConfig
from ipc import log
from ipc.endpoints import RunFolder, run_folder_parents
from ipc.errors import InvalidRequest, Unavailable
from ipc.remote_path import is_remote
from ipc.trace import create_trace
from loader.config import LoaderConfig
from tools.child import ChildSpec
from tools.options.keys import admin_key_digests, api_key_digests
from tools.options.table import given_values
from tools.served_paths import existing_folder, source_prefix, start_adapters
from tools.supervisor import ServerSpec, Supervisor
from tools.supervisor_config import SupervisorConfig

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


def plan_server(arguments: argparse.Namespace) -> ServePlan:
    """The configurations that the command line asks for; every path in them is absolute.

    Raises:
        InvalidRequest: arguments that do not fit together, or a folder that is not there.
    """
    model = existing_folder(arguments.model, "MODEL")
    name = arguments.served_model_name or model.name
    lora_dir = existing_folder(arguments.lora_dir, "--lora-dir") if arguments.lora_dir else None
    adapters = start_adapters(arguments.lora, arguments.pin, lora_dir, name)
    roots = [existing_folder(root, "--adapter-root") for root in arguments.adapter_root]
    # ``dict`` keeps the order and drops what is named twice.
    paths = [adapter.path for adapter in adapters]
    allowed = dict.fromkeys([*(path for path in paths if not is_remote(path)), *map(str, roots)])
    addresses = dict.fromkeys(filter(is_remote, paths))
    sources = dict.fromkeys(map(source_prefix, arguments.adapter_source))
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
            hint = "; --port 0 takes one that is free" if error.errno == errno.EADDRINUSE else ""
            raise Unavailable(f"can not listen at {host}:{port}: {error.strerror}{hint}") from error
        yield int(reserved.getsockname()[1])


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
