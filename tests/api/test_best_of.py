"""Of more candidates than are wanted, the likeliest are answered."""

from collections.abc import Iterable

from ipc.messages import FinishReason, Generate, TokenDelta, TokenLogprobs
from tests.api.frontend import frontend, on_loop
from tools.tiny_model.tokenizer import EOS_ID

# By the number of the candidate: its text, and the logprob of each of its tokens.
CANDIDATES = {
    # Of these the last has the highest sum, and the second the highest mean.
    0: ("aaaa", -0.9),
    1: ("bbbbbbbb", -0.2),
    2: ("c", -0.5),
    3: ("dd", -0.5),
}


def drawn(request: Generate) -> Iterable[TokenDelta]:
    number = int(request.request_id.rpartition(".")[2]) % 4
    text, logprob = CANDIDATES[number]
    tokens = [*text.encode(), EOS_ID]
    for token in tokens:
        last = token == EOS_ID
        assert request.sampling.logprobs is not None
        yield TokenDelta(
            request.request_id,
            [token],
            [TokenLogprobs(token, logprob, ())],
            FinishReason.STOP if last else None,
        )


@on_loop
async def test_the_likeliest_by_logprob_per_token_are_answered_in_their_order() -> None:
    async with frontend(drawn) as front:
        for wanted, texts in ((1, ["bbbbbbbb"]), (3, ["bbbbbbbb", "c", "dd"])):
            body = (await front.complete(n=wanted, best_of=4, max_tokens=20)).json()
            assert [choice["text"] for choice in body["choices"]] == texts
            assert [choice["index"] for choice in body["choices"]] == list(range(wanted))
            assert all(choice["logprobs"] is None for choice in body["choices"])
            # All that were made are counted.
            assert body["usage"]["completion_tokens"] == 5 + 9 + 2 + 3
        assert len(front.engine.requests) == 8


@on_loop
async def test_each_prompt_has_its_own_best() -> None:
    async with frontend(drawn) as front:
        answer = await front.complete(["x", "yy"], best_of=4, echo=True, max_tokens=20, seed=5)
        seeds = [request.sampling.seed for request in front.engine.requests]
    assert [choice["text"] for choice in answer.json()["choices"]] == ["xbbbbbbbb", "yybbbbbbbb"]
    assert seeds == [5, 6, 7, 8] * 2


@on_loop
async def test_logprobs_are_reported_where_they_were_asked_for() -> None:
    async with frontend(drawn) as front:
        body = (await front.complete(best_of=4, logprobs=0, max_tokens=20)).json()
    assert body["choices"][0]["logprobs"]["token_logprobs"] == [-0.2] * 9
