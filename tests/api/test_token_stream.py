"""A stream's tokens reach its reader in order, however far behind it is."""

import asyncio

import pytest

from api.token_stream import TokenStream
from ipc.errors import DeadlineExceeded
from ipc.messages import FinishReason, RequestId, TokenDelta, TokenLogprobs
from tests.api.frontend import on_loop

FIRST, SECOND = RequestId("first"), RequestId("second")


def stream(granted: list[tuple[RequestId, int]] | None = None, window: int = 100) -> TokenStream:
    grants = [] if granted is None else granted
    return TokenStream(
        [FIRST, SECOND],
        lambda request_id, cancel: None,
        lambda request_id, num: grants.append((request_id, num)),
        window,
        10.0,
    )


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
async def test_credits_are_given_back_for_what_is_read_and_for_nothing_else() -> None:
    granted: list[tuple[RequestId, int]] = []
    tokens = stream(granted, window=4)
    for number in range(4):
        tokens.push(TokenDelta(FIRST, [number]))
    tokens.push(TokenDelta(SECOND, [9]))
    assert granted == []
    await anext(tokens)
    assert granted == [(FIRST, 4)]
    await anext(tokens)
    tokens.push(TokenDelta(SECOND, [10]))
    await anext(tokens)
    assert granted == [(FIRST, 4), (SECOND, 2)]


@on_loop
async def test_no_credit_is_given_to_a_request_that_has_ended() -> None:
    granted: list[tuple[RequestId, int]] = []
    tokens = stream(granted, window=1)
    tokens.push(TokenDelta(FIRST, [1], finish_reason=FinishReason.STOP))
    await anext(tokens)
    assert granted == []


@on_loop
async def test_a_stream_that_is_not_complete_in_time_ends_and_is_cancelled() -> None:
    ended: list[tuple[RequestId, bool]] = []
    tokens = TokenStream(
        [FIRST, SECOND],
        lambda request_id, cancel: ended.append((request_id, cancel)),
        lambda request_id, num: None,
        window=4,
        token_timeout_s=10.0,
        timeout_s=0.02,
    )
    async with tokens:
        tokens.push(TokenDelta(FIRST, [1], finish_reason=FinishReason.STOP))
        await anext(tokens)
        with pytest.raises(DeadlineExceeded, match=r"not complete within 0\.02 s"):
            await anext(tokens)
    assert ended == [(FIRST, False), (SECOND, True)]


@on_loop
async def test_a_stream_that_was_complete_in_time_is_read_to_its_end_whenever() -> None:
    tokens = TokenStream(
        [FIRST], lambda request_id, cancel: None, lambda request_id, num: None, 4, 10.0, 0.01
    )
    tokens.push(TokenDelta(FIRST, [1], finish_reason=FinishReason.STOP))
    await asyncio.sleep(0.02)
    assert (await anext(tokens))[1].token_ids == [1]
