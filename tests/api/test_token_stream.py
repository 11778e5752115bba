"""A stream's tokens reach its reader in order, however far behind it is."""

import pytest

from api.token_stream import TokenStream
from ipc.errors import Overloaded
from ipc.messages import FinishReason, RequestId, TokenDelta, TokenLogprobs
from tests.api.frontend import on_loop

FIRST, SECOND = RequestId("first"), RequestId("second")


def stream(max_pending: int = 100) -> TokenStream:
    return TokenStream([FIRST, SECOND], lambda request_id, cancel: None, max_pending, 10.0)


@on_loop
async def test_steps_that_were_not_read_in_time_come_as_one() -> None:
    tokens = stream()
    for number in range(3):
        logprob = TokenLogprobs(number, -0.5, ())
        tokens.push(TokenDelta(FIRST, [number], logprobs=[logprob], num_cached_tokens=4 - number))
        tokens.push(TokenDelta(SECOND, [10 + number]))
    tokens.push(TokenDelta(FIRST, [3], finish_reason=FinishReason.LENGTH))
    index, delta = await anext(tokens)
    assert (index, delta.token_ids, delta.finish_reason) == (0, [0, 1, 2, 3], FinishReason.LENGTH)
    assert [each.token_id for each in delta.logprobs or ()] == [0, 1, 2]
    assert delta.num_cached_tokens == 4 + 3 + 2
    index, delta = await anext(tokens)
    assert (index, delta) == (1, TokenDelta(SECOND, [10, 11, 12]))


@on_loop
async def test_steps_that_are_read_as_they_come_stay_as_they_were() -> None:
    tokens = stream()
    for number in range(3):
        sent = TokenDelta(FIRST, [number])
        tokens.push(sent)
        assert await anext(tokens) == (0, sent)


@on_loop
async def test_what_is_read_counts_no_more_against_the_reader() -> None:
    tokens = stream(max_pending=4)
    for _ in range(5):
        for number in range(4):
            tokens.push(TokenDelta(FIRST, [number]))
        assert (await anext(tokens))[1].token_ids == [0, 1, 2, 3]
    for number in range(5):
        tokens.push(TokenDelta(FIRST, [number]))
    with pytest.raises(Overloaded, match="4 undelivered steps"):
        await anext(tokens)
