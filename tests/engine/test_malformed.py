"""Whatever comes instead of a message is answered, by its own call or stream where it names one."""

from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.malformed import answer_to_malformed
from ipc.channel import UNREADABLE
from ipc.messages import (
    CallFailed,
    ClientMessage,
    EngineMessage,
    MessageRejected,
    StepOutputs,
)

TAGS = [str(kind.__struct_config__.tag) for kind in ClientMessage.__args__]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
DECODER = msgspec.msgpack.Decoder(ClientMessage)
ANSWERS = msgspec.msgpack.Decoder(EngineMessage)


def answered(payload: bytes) -> EngineMessage | None:
    """What the client hears; None if the message can be read after all."""
    try:
        DECODER.decode(payload)
    except UNREADABLE as error:
        answer = answer_to_malformed([payload], str(error))
        # As the client hears it: it can be sent, and read.
        assert ANSWERS.decode(msgspec.msgpack.encode(answer)) == answer
        return answer
    return None


@settings(max_examples=300, derandomize=True, database=None, deadline=None)
@given(st.binary(max_size=64))
def test_any_bytes_are_answered(payload: bytes) -> None:
    assert isinstance(answered(payload), CallFailed | MessageRejected | StepOutputs | None)


@settings(max_examples=300, derandomize=True, database=None, deadline=None)
@given(
    kind=st.sampled_from(TAGS) | st.text() | VALUES,
    call_id=st.integers(0, 2**63 - 1) | VALUES,
    request_id=st.text(max_size=300) | VALUES,
    others=st.dictionaries(st.text(max_size=8), VALUES, max_size=3),
)
def test_a_malformed_message_fails_its_own_call_or_stream_and_no_other(
    kind: Any, call_id: Any, request_id: Any, others: dict[str, Any]
) -> None:
    message = {**others, "type": kind, "call_id": call_id, "request_id": request_id}
    answer = answered(msgspec.msgpack.encode(message))
    match answer:
        case CallFailed():
            assert answer.call_id == call_id and kind != "generate"
        case StepOutputs([delta]):
            assert kind == "generate" and delta.request_id == request_id
            assert 0 < len(request_id) <= 256
        case _:
            assert answer is None or isinstance(answer, MessageRejected)
