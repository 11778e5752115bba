"""``sidestream chat``: a conversation with a running server's model, or with its adapters.

The conversation lies in this process's memory alone.

| while …             | Ctrl-C                                     | Ctrl-D |
|---------------------|--------------------------------------------|--------|
| a line is written   | drops the line                             | ends   |
| an answer comes     | ends the answer; what came of it stays     |        |
"""

import argparse
import contextlib
import sys
from collections.abc import Callable

from rich.console import Console

from ipc.errors import InvalidRequest, SidestreamError
from tools.client_commands import (
    GenerateOptions,
    Message,
    answer,
    base_model,
    list_adapters,
    list_models,
)
from tools.command_parser import did_you_mean, fail
from tools.commands.adapters import print_adapters
from tools.commands.connection import add_connection_arguments, client_of, table_console
from tools.commands.generate import add_sampling_arguments, options_of
from tools.http_client import HttpClient

_HELP = {
    "/model NAME": "go on with the base model or an adapter; without NAME: say which it is",
    "/adapters": "list the server's adapters",
    "/system TEXT": "begin anew with this system message; without TEXT: with none",
    "/reset": "forget what was said",
    "/help": "show this",
    "/exit": "end; so does Ctrl-D",
}


class Conversation:
    """What was said so far, and to whom. ``messages`` begins with the system's, if there is one."""

    def __init__(self, model: str, system: str | None) -> None:
        self.model = model
        self.messages: list[Message] = []
        self.begin(system)

    def begin(self, system: str | None) -> None:
        """Forgets everything, the earlier system message included."""
        self.system = system
        self.messages = [] if system is None else [Message("system", system)]


class Chat:
    """Reads lines and commands, and prints answers as they come.

    ``read`` returns the next line, and raises ``EOFError`` at the end; it gets the prompt.
    """

    def __init__(
        self,
        client: HttpClient,
        conversation: Conversation,
        options: GenerateOptions,
        read: Callable[[str], str],
    ) -> None:
        self._client = client
        self._conversation = conversation
        self._options = options
        self._read = read
        self.num_failures = 0

    def run(self) -> None:
        """Returns at ``/exit`` and at the input's end. What fails is said, and the chat goes on."""
        while True:
            try:
                line = self._read(f"{self._conversation.model}> ").strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                print()
                continue
            if line == "/exit":
                return
            if not line:
                continue
            try:
                if line.startswith("/"):
                    self._command(line)
                else:
                    self._say(line)
            except SidestreamError as error:
                self.num_failures += 1
                fail(error.message)

    def _say(self, text: str) -> None:
        """Asks for an answer. Without any part of one, it is as if nothing had been said."""
        conversation = self._conversation
        asked = [*conversation.messages, Message("user", text)]
        pieces: list[str] = []
        try:
            with contextlib.suppress(KeyboardInterrupt):
                for piece in answer(self._client, conversation.model, asked, self._options):
                    pieces.append(piece)
                    print(piece, end="", flush=True)
        finally:
            if pieces:
                print()
                conversation.messages = [*asked, Message("assistant", "".join(pieces))]

    def _command(self, line: str) -> None:
        command, _, rest = line.partition(" ")
        value = rest.strip()
        match command:
            case "/model":
                if value:
                    self._change_model(value)
                print(f"model: {self._conversation.model}")
            case "/adapters":
                print_adapters(list_adapters(self._client), table_console())
            case "/system":
                self._conversation.begin(value or None)
                print("system message set" if value else "no system message")
            case "/reset":
                self._conversation.begin(self._conversation.system)
                print("forgotten")
            case "/help":
                for usage, about in _HELP.items():
                    print(f"{usage:<13} {about}")
            case _:
                known = [usage.split()[0] for usage in _HELP]
                raise InvalidRequest(
                    f"expected one of {', '.join(known)}, got {command}"
                    f"{did_you_mean(command, known)}"
                )

    def _change_model(self, name: str) -> None:
        known = [model.id for model in list_models(self._client)]
        if name not in known:
            raise InvalidRequest(
                f"/model: expected the base model or an adapter, got {name!r}"
                f"{did_you_mean(name, known)}"
            )
        self._conversation.model = name


def add_chat_arguments(parser: argparse.ArgumentParser) -> None:
    """Every argument of ``sidestream chat``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "in the chat:\n" + "\n".join(
        f"  {usage:<13} {about}" for usage, about in _HELP.items()
    )
    add_sampling_arguments(parser)
    parser.add_argument("--system", metavar="TEXT", help="The system message.")
    add_connection_arguments(parser)
    parser.set_defaults(run=_chat)


def _chat(arguments: argparse.Namespace) -> int:
    client = client_of(arguments)
    known = [model.id for model in list_models(client)]
    model = arguments.model if arguments.model is not None else base_model(client)
    if model not in known:
        raise InvalidRequest(
            f"--model: expected the base model or an adapter, got {model!r}"
            f"{did_you_mean(model, known)}"
        )
    chat = Chat(client, Conversation(model, arguments.system), options_of(arguments), _reader())
    chat.run()
    return 1 if chat.num_failures and not sys.stdin.isatty() else 0


def _reader() -> Callable[[str], str]:
    """Lines of a person, who can edit them and go back to earlier ones; or lines of a pipe."""
    if not sys.stdin.isatty():
        return lambda prompt: input()
    with contextlib.suppress(ImportError):
        # From here on ``input`` edits lines; no history is ever written to a file.
        import readline  # noqa: F401
    console = Console(highlight=False)
    console.print("[dim]/help lists what can be typed beside messages; Ctrl-D ends.[/]")
    return input
