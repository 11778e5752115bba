"""``sidestream serve`` as who starts it sees it."""

import argparse

from rich.console import Console
from rich.markup import escape

from ipc.errors import InvalidRequest
from tools.command_parser import fail
from tools.serve import ReadyServer, ServePlan, plan_server, serve


def run_serve(arguments: argparse.Namespace) -> int:
    """Serves until it is stopped; the exit status. Raises as ``tools.serve.serve``."""
    try:
        plan = plan_server(arguments)
    except InvalidRequest as error:
        return fail(error.message, status=2)
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print(f"Starting loader, engine and api for {escape(plan.describe())}. Ctrl-C stops.")
    return serve(plan, lambda server: print_ready(plan, server))


def print_ready(plan: ServePlan, server: ReadyServer) -> None:
    """Prints where the server answers and what to do next, on standard output."""
    console = Console(soft_wrap=True, highlight=False)
    details = f"({plan.describe()}, took {server.seconds:.1f} s)"
    console.print(f"[bold green]Sidestream is ready[/] at {server.url} {escape(details)}")
    if not console.is_terminal:
        return
    for name, value in (
        ("API", f"{server.url}/v1, explained at {server.url}/docs"),
        ("page", f"{server.url}/"),
        ("try", f"sidestream chat --url {server.url}"),
        ("stop", "Ctrl-C; a second one ends it at once"),
    ):
        console.print(f"  [dim]{name:<5}[/] {escape(value)}")
