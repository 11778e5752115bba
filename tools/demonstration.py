"""What ``tools/quickstart`` shows once it can import everything: the tiny model, served and asked.

There is room for two of the four adapters, so that they come and go while they answer.
"""

import argparse
import json
import os
import shlex
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
from rich.console import Console
from rich.markup import escape
from safetensors import safe_open

from api.config import ApiConfig
from ipc.errors import SidestreamError, Unavailable
from ipc.image import padded_rank
from tools.cli import make_parser
from tools.client_commands import read_figures
from tools.http_client import HttpClient
from tools.options.keys import client_key
from tools.serve import ReadyServer, plan_server, reserve_port, serve
from tools.tiny_model.cache import TinyModel, ensure_tiny_model
from tools.values import parse_port

BASE_NAME = "tiny"
NUM_RESIDENT = 2
# Which of the tiny model's questions are asked.
QUESTIONS = (15, 23, 4)
MAX_TOKENS = 64
TIMEOUT_S = 120.0


class Demonstration:
    """Asks a server of the tiny model, and says what it answered."""

    def __init__(self, model: TinyModel, console: Console, once: bool) -> None:
        self._model = model
        self._console = console
        self._once = once
        self.num_failures = 0

    def run(self, server: ReadyServer) -> None:
        """Asks everybody everything; then ends the server, or says how to go on."""
        client = HttpClient(server.url, TIMEOUT_S, client_key(os.environ))
        try:
            for question in QUESTIONS:
                for adapter in (None, *self._model.adapters):
                    self._ask(client, adapter, question)
            self._summarize(client)
        except SidestreamError as error:
            self.num_failures += 1
            self._console.print(f"[bold red]{escape(error.message)}[/]")
        if self._once:
            server.stop()
        else:
            self._invite(server.url)

    def _ask(self, client: HttpClient, adapter: str | None, question: int) -> None:
        name = adapter or BASE_NAME
        prompt = self._model.prompts[question]
        begin_s = time.monotonic()
        completion = msgspec.json.decode(
            client.post(
                "/v1/completions",
                {"model": name, "prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0},
            )
        )
        milliseconds = 1000 * (time.monotonic() - begin_s)
        answer = str(completion["choices"][0]["text"])
        expected = self._model.answers[adapter][question]
        mark = "[green]right[/]"
        if answer != expected:
            self.num_failures += 1
            mark = f"[bold red]wrong[/], expected {escape(expected)}"
        self._console.print(
            f"[cyan]{name:<8}[/] {prompt:<36} {escape(answer):<26}"
            f" [dim]{milliseconds:5.0f} ms[/]  {mark}"
        )

    def _summarize(self, client: HttpClient) -> None:
        figures = read_figures(client)
        loads = figures.count("sidestream:adapter_loads_total")
        evictions = figures.count("sidestream:adapter_evictions_total")
        self._console.print(
            f"\nRoom for {NUM_RESIDENT} of {len(self._model.adapters)} adapters:"
            f" {loads} loads, {evictions} evictions."
        )

    def _invite(self, url: str) -> None:
        body = {
            "model": next(iter(self._model.adapters)),
            "prompt": self._model.prompts[QUESTIONS[0]],
            "max_tokens": MAX_TOKENS,
            "temperature": 0,
        }
        self._console.print(
            "\nStill serving; Ctrl-C ends it. Try:\n\n"
            f"  [bold]curl {url}/v1/completions -H 'content-type: application/json' \\\n"
            f"    -d {escape(shlex.quote(json.dumps(body)))}[/]\n"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0, or 1 when an answer was wrong or the server failed."""
    parser = argparse.ArgumentParser(prog="tools/quickstart", allow_abbrev=False)
    parser.add_argument("--once", action="store_true", help="End after the examples.")
    parser.add_argument(
        "--port", type=parse_port, help="TCP port (default: the usual one, or any if it is taken)."
    )
    parsed = parser.parse_args(arguments)
    console = Console(highlight=False, soft_wrap=True)
    try:
        return _demonstrate(console, parsed.once, parsed.port)
    except SidestreamError as error:
        console.print(f"[bold red]{escape(error.message)}[/]")
        return 1
    except KeyboardInterrupt:
        return 130


def _demonstrate(console: Console, once: bool, port: int | None) -> int:
    model = ensure_tiny_model()
    command = _serve_command(model, _usual_port() if port is None else port)
    console.print(f"[dim]$ {escape(shlex.join(command))}[/]\n")
    plan = plan_server(make_parser().parse_args(command[1:]))
    demonstration = Demonstration(model, console, once)
    with console.status("starting the server …") as status:

        def begin(server: ReadyServer) -> None:
            status.stop()
            # The event loop goes on keeping the server's processes alive meanwhile.
            threading.Thread(target=demonstration.run, args=(server,), daemon=True).start()

        exit_status = serve(plan, begin)
    return 1 if demonstration.num_failures else exit_status


def _serve_command(model: TinyModel, port: int) -> list[str]:
    command = ["sidestream", "serve", str(model.base), "--served-model-name", BASE_NAME]
    for name, path in model.adapters.items():
        command += ["--lora", f"{name}={path}"]
    sizes = sorted(_image_bytes(path) for path in model.adapters.values())
    command += ["--max-adapter-memory", f"{sum(sizes[-NUM_RESIDENT:])}B"]
    return [*command, "--device", "cpu", "--port", str(port), "--log-level", "warning"]


def _image_bytes(adapter: Path) -> int:
    """What the adapter takes in the pool of a float32 model."""
    num_values = 0
    with safe_open(adapter / "adapter_model.safetensors", framework="numpy") as tensors:
        names: list[str] = tensors.keys()
        for name in names:
            rows, columns = tensors.get_slice(name).get_shape()
            is_a = name.endswith("lora_A.weight")
            num_values += padded_rank(rows) * columns if is_a else rows * padded_rank(columns)
    return 4 * num_values


def _usual_port() -> int:
    usual = next(f.default for f in msgspec.structs.fields(ApiConfig) if f.name == "port")
    assert isinstance(usual, int)
    try:
        with reserve_port("127.0.0.1", usual):
            return usual
    except Unavailable:
        return 0


if __name__ == "__main__":
    sys.exit(main())
