"""One delta in the place of several."""

from collections.abc import Sequence

from ipc.messages import TokenDelta


def join_deltas(deltas: Sequence[TokenDelta]) -> TokenDelta:
    """What ``deltas``, of one request and in their order, say together. There is at least one."""
    if len(deltas) == 1:
        return deltas[0]
    logprobs = [logprob for delta in deltas for logprob in delta.logprobs or ()]
    return TokenDelta(
        deltas[0].request_id,
        [token_id for delta in deltas for token_id in delta.token_ids],
        logprobs=logprobs or None,
        finish_reason=deltas[-1].finish_reason,
        error=deltas[-1].error,
        num_cached_tokens=sum(delta.num_cached_tokens for delta in deltas),
    )
