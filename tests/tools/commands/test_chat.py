"""``sidestream chat``: what is said, what is sent, and what is kept."""

from collections.abc import Callable, Iterable, Iterator

import pytest

from tests.tools.fake_server import ADAPTERS, MODELS, FakeServer, chat_events, serving
from tools.cli import main
from tools.client_commands import GenerateOptions, Message
from tools.commands.chat import Chat, Conversation
from tools.http_client import HttpClient

CHAT = "/v1/chat/completions"


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with serving() as server:
        server.answers = {
            "/v1/models": (200, MODELS),
            "/v1/adapters": (200, ADAPTERS),
            CHAT: (200, chat_events("Hel", "lo")),
        }
        yield server


def typed(lines: Iterable[str | type[BaseException]]) -> Callable[[str], str]:
    """What a person types: lines, or an exception in the place of one; then Ctrl-D."""
    left = iter(lines)

    def read(prompt: str) -> str:
        line = next(left, EOFError)
        if isinstance(line, str):
            return line
        raise line

    return read


def chat(server: FakeServer, *lines: str | type[BaseException], model: str = "tiny") -> Chat:
    client = HttpClient(server.url, 10.0)
    done = Chat(client, Conversation(model, None), GenerateOptions(), typed(lines))
    done.run()
    return done


def sent(server: FakeServer) -> list[list[tuple[str, str]]]:
    """Roles and contents of each request."""
    return [
        [(message["role"], message["content"]) for message in body["messages"]]
        for _, body in server.asked
    ]


def test_every_message_is_sent_with_all_that_was_said_before(
    server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    chat(server, "hi", "", "more")
    assert capsys.readouterr().out == "Hello\nHello\n"
    assert sent(server) == [
        [("user", "hi")],
        [("user", "hi"), ("assistant", "Hello"), ("user", "more")],
    ]


def test_reset_keeps_the_system_message_and_system_forgets_everything(server: FakeServer) -> None:
    chat(server, "/system be brief", "hi", "/reset", "again", "/system", "bare")
    assert sent(server) == [
        [("system", "be brief"), ("user", "hi")],
        [("system", "be brief"), ("user", "again")],
        [("user", "bare")],
    ]


def test_the_model_changes_in_the_middle_of_a_conversation(
    server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    chat(server, "hi", "/model shout", "more", "/model")
    assert [body["model"] for _, body in server.asked] == ["tiny", "shout"]
    assert len(sent(server)[1]) == 3
    assert capsys.readouterr().out.endswith("model: shout\n")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/model shuot", "expected the base model or an adapter, got 'shuot'; did you mean shout?"),
        ("/rest", "got /rest; did you mean /reset?"),
    ],
)
def test_a_mistyped_command_is_said_and_the_chat_goes_on(
    server: FakeServer, capsys: pytest.CaptureFixture[str], line: str, message: str
) -> None:
    done = chat(server, line, "hi")
    output = capsys.readouterr()
    assert message in output.err and output.err.count("\n") == 1
    assert output.out == "Hello\n"
    assert done.num_failures == 1


def test_what_was_not_answered_was_not_said(
    server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    good = server.answers[CHAT]
    lines = iter(["lost", "kept"])

    def read(prompt: str) -> str:
        line = next(lines, None)
        if line is None:
            raise EOFError
        server.answers[CHAT] = good if line == "kept" else (503, '{"error": {"message": "away"}}')
        return line

    Chat(HttpClient(server.url, 10.0), Conversation("tiny", None), GenerateOptions(), read).run()
    assert capsys.readouterr().err == "sidestream: away\n"
    assert sent(server)[-1] == [("user", "kept")]


def test_ctrl_c_ends_the_answer_and_keeps_what_came_of_it(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*arguments: object) -> Iterator[str]:
        yield "Hel"
        raise KeyboardInterrupt

    conversation = Conversation("tiny", None)
    client = HttpClient(server.url, 10.0)
    with monkeypatch.context() as patched:
        patched.setattr("tools.commands.chat.answer", interrupted)
        Chat(client, conversation, GenerateOptions(), typed(["hi"])).run()
    assert conversation.messages == [Message("user", "hi"), Message("assistant", "Hel")]
    assert capsys.readouterr().out == "Hel\n"


def test_ctrl_c_drops_a_line_and_exit_ends(server: FakeServer) -> None:
    chat(server, KeyboardInterrupt, "hi", "/exit", "never")
    assert sent(server) == [[("user", "hi")]]


def test_a_model_that_is_not_there_is_refused_before_anything_is_typed(
    server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["chat", "--model", "shuot", "--url", server.url]) == 1
    assert "--model: expected the base model or an adapter, got 'shuot'" in capsys.readouterr().err
