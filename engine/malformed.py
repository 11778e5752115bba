"""What a client hears of a message that could not be read."""

import msgspec

from ipc.channel import UNREADABLE
from ipc.errors import InvalidRequest, SidestreamError, Unimplemented
from ipc.messages import (
    MAX_CLIENT_MESSAGE_BYTES,
    MAX_REQUEST_ID_CHARS,
    CallFailed,
    CallId,
    ClientCall,
    ClientMessage,
    EngineMessage,
    Generate,
    MessageRejected,
    RequestId,
    StepOutputs,
    TokenDelta,
)


def _tags(union: object) -> frozenset[str]:
    return frozenset(str(kind.__struct_config__.tag) for kind in union.__args__)  # type: ignore[attr-defined]


_CALL_TAGS = _tags(ClientCall)
_TAGS = _tags(ClientMessage)
_GENERATE_TAG = str(Generate.__struct_config__.tag)


class _Address(msgspec.Struct, frozen=True):
    """As much of any message as says what it was to be, and whose answer is missing."""

    type: object = None
    call_id: object = None
    request_id: object = None


_ADDRESS = msgspec.msgpack.Decoder(_Address)


def answer_to_malformed(frames: list[bytes], reason: str) -> EngineMessage:
    """The failure of the call or stream that the message names; ``MessageRejected`` without one.

    ``reason`` says what is wrong with the message, field first.
    """
    address = _address(frames)
    error = _error(address, reason)
    request_id = address.request_id
    if address.type == _GENERATE_TAG and isinstance(request_id, str):
        # A longer one would be no stream's.
        if 0 < len(request_id) <= MAX_REQUEST_ID_CHARS:
            return StepOutputs([TokenDelta(RequestId(request_id), error=error.info)])
        return MessageRejected(error.info)
    if not isinstance(address.type, str):
        return MessageRejected(error.info)
    is_call = address.type in _CALL_TAGS or address.type not in _TAGS
    if is_call and type(address.call_id) is int:
        return CallFailed(CallId(address.call_id), error.info)
    return MessageRejected(error.info)


def _address(frames: list[bytes]) -> _Address:
    # A frame that is too large is not gone through, not even for its address.
    if len(frames) == 1 and len(frames[0]) <= MAX_CLIENT_MESSAGE_BYTES:
        try:
            return _ADDRESS.decode(frames[0])
        except UNREADABLE:
            pass
    return _Address()


def _error(address: _Address, reason: str) -> SidestreamError:
    if isinstance(address.type, str) and address.type not in _TAGS:
        known = ", ".join(sorted(_TAGS))
        return Unimplemented(
            f"type: expected one of {known}; got {address.type[:64]!r}", param="type"
        )
    return InvalidRequest(f"malformed message: {reason}")
