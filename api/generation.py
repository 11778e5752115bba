"""From the engine's tokens to the text of one request's choices, over HTTP or in a client.

The life of a request here:

1. ``TextGeneration.pieces`` asks the engine once for every choice of every prompt.
2. Each delta becomes a ``Piece``: text as far as it may be shown, tokens, logprobs.
3. A stop string ends a choice on this side: it is cancelled in the engine, late tokens dropped.
4. The generator ends after every choice's last piece, or raises. Closing it early cancels.
"""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

from api.detokenizer import Detokenizer
from api.engine_client import NO_OPTIONS, CallOptions, EngineClient, Prompt
from api.metrics import RequestMetrics
from api.tokenizer import TextTokenizer
from ipc.errors import InvalidRequest
from ipc.messages import FinishReason, TokenDelta, TokenLogprobs


@dataclass(frozen=True)
class TextOptions:
    """How tokens become text."""

    stops: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """What one engine step adds to one choice. The last piece alone has a ``finish_reason``."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs]
    finish_reason: str | None
    stop_reason: str | int | None


@dataclass
class TokenCounts:
    """Counts up while the pieces come. ``prompt`` counts each prompt once."""

    prompt: int
    completion: int = 0
    cached: int = 0


class Choice:
    """One choice while it grows."""

    def __init__(self, index: int, tokenizer: TextTokenizer | None, options: TextOptions) -> None:
        if tokenizer is None and options.stops:
            raise InvalidRequest(
                "stop: expected it absent: the model's folder has no tokenizer.json, so that its"
                " answers are token ids (stop_token_ids are served)",
                param="stop",
            )
        self.index = index
        self._stop_token_ids = frozenset(options.stop_token_ids)
        self._detokenizer: Detokenizer | None = None
        if tokenizer is not None:
            self._detokenizer = Detokenizer(
                tokenizer,
                stops=options.stops,
                include_stop=options.include_stop,
                skip_special_tokens=options.skip_special_tokens,
                min_tokens=options.min_tokens,
            )

    def take(self, delta: TokenDelta) -> Piece:
        """The piece for ``delta``; with a stop string's end, it is the last one."""
        tokens, logprobs = delta.token_ids, delta.logprobs or []
        reason = delta.finish_reason
        text, stop_reason = "", None
        if self._detokenizer is not None:
            shown = self._detokenizer.push(
                tokens, last=reason is not None, hide_final=reason is FinishReason.STOP
            )
            text, stop_reason = shown.text, shown.stop
            tokens, logprobs = tokens[: shown.num_tokens], logprobs[: shown.num_tokens]
        if stop_reason is not None:
            return Piece(self.index, text, tokens, logprobs, "stop", stop_reason)
        finish_reason = None if reason is None else reason.value
        return Piece(
            self.index, text, tokens, logprobs, finish_reason, self._stop_token(tokens, reason)
        )

    def _stop_token(self, tokens: Sequence[int], reason: FinishReason | None) -> int | None:
        """Which of the request's own stop tokens ended it; None for the model's end of text."""
        if reason is FinishReason.STOP and tokens and tokens[-1] in self._stop_token_ids:
            return tokens[-1]
        return None


@dataclass
class TextGeneration:
    """All that one request for text asks of the engine.

    ``prompts`` has, for each prompt, one entry a choice; choices are numbered through.
    """

    engine: EngineClient
    tokenizer: TextTokenizer | None
    metrics: RequestMetrics
    name: str
    prompts: Sequence[Sequence[Prompt]]
    options: TextOptions
    call_options: CallOptions = NO_OPTIONS
    counts: TokenCounts = field(init=False)

    def __post_init__(self) -> None:
        self.counts = TokenCounts(sum(len(choices[0].token_ids) for choices in self.prompts))

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """Every choice's pieces, as they come. To be closed by whoever stops reading early.

        Raises:
            SidestreamError: what the engine answered, or that it is away.
        """
        wanted = [prompt for choices in self.prompts for prompt in choices]
        first_choices = self._first_choices()
        choices = [Choice(index, self.tokenizer, self.options) for index in range(len(wanted))]
        adapters = {prompt.adapter for prompt in wanted}
        with self.metrics.follow(adapters, len(wanted)) as follower:
            async with self.engine.generate(self.name, wanted, self.call_options) as stream:
                async for index, delta in stream:
                    follower.tokens(index, len(delta.token_ids))
                    piece = choices[index].take(delta)
                    self.counts.completion += len(piece.token_ids)
                    if index in first_choices:
                        self.counts.cached += delta.num_cached_tokens
                    if piece.finish_reason is not None:
                        stream.stop(index)
                        follower.finished(piece.finish_reason)
                    yield piece

    def _first_choices(self) -> frozenset[int]:
        """The indices of each prompt's first choice, which alone counts for the prompt."""
        first, indices = 0, []
        for choices in self.prompts:
            indices.append(first)
            first += len(choices)
        return frozenset(indices)
