"""The specification of the RPC service says what the code does."""

import re

import msgspec
import pytest

from engine.config import EngineConfig
from ipc.channel import MAX_FRAME_BYTES
from ipc.errors import ErrorCode, InvalidRequest
from ipc.messages import (
    MAX_CLIENT_MESSAGE_BYTES,
    MAX_METADATA_ENTRIES,
    MAX_SILENT_HEARTBEATS,
    ClientCall,
    ClientMessage,
    EngineMessage,
)
from tools.marked_text import replace_section
from tools.rpc_reference import DOCUMENT, EXAMPLE, written_document

TEXT = DOCUMENT.read_text()


def tag(kind: type[msgspec.Struct]) -> str:
    return str(kind.__struct_config__.tag)


def test_the_document_has_the_messages_as_they_are() -> None:
    assert written_document(TEXT) == TEXT, "run: python -m tools.rpc_reference"


def test_the_examples_frames_decode_to_the_messages() -> None:
    frames = re.findall(r"^([<>]) ([0-9a-f]+)$", TEXT, flags=re.MULTILINE)
    decoded = [
        msgspec.msgpack.decode(
            bytes.fromhex(payload), type=ClientMessage if arrow == ">" else EngineMessage
        )
        for arrow, payload in frames
    ]
    assert decoded == list(EXAMPLE)


def test_every_message_call_and_status_is_explained() -> None:
    specified, tables = TEXT.split("## Messages")
    for kind in (ClientMessage | EngineMessage).__args__:
        assert f"`{tag(kind)}`" in specified and f"**`{tag(kind)}`**" in tables
    calls = re.findall(r"^\| `(\w+)` \| `\w+` \|", specified, flags=re.MULTILINE)
    assert sorted(calls) == sorted(map(tag, ClientCall.__args__))
    statuses = re.findall(r"^\| `([A-Z_]+)` \|", specified, flags=re.MULTILINE)
    assert set(statuses) == {code.value for code in ErrorCode}


def test_its_numbers_are_those_of_the_code() -> None:
    words = " ".join(TEXT.split())
    config = EngineConfig(model="", served_model_name="")
    assert MAX_CLIENT_MESSAGE_BYTES == 16 << 20 and "more than 16 MiB is rejected" in words
    assert MAX_FRAME_BYTES == 64 << 20 and "more than 64 MiB ends the connection" in words
    assert MAX_SILENT_HEARTBEATS == 4 and "nothing came for four intervals" in words
    assert MAX_METADATA_ENTRIES == 32 and "up to 32 entries" in words
    assert f"more than {config.max_unread_tokens:,} tokens held back" in words


def test_a_document_without_its_markers_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="end of x"):
        replace_section("<!-- x -->\n", "x", "body")
    assert replace_section("a\n<!-- x -->\nold\n<!-- end of x -->\nb", "x", "new") == (
        "a\n<!-- x -->\nnew\n<!-- end of x -->\nb"
    )
