"""What clients may send to both endpoints that generate text, and to ``/v1/completions``.

OpenAI's fields and the extra ones of vLLM and SGLang that are served here. A field that is absent
or null has the default that is given here. Fields that are not declared are the affair of
``refused_fields``.
"""

from typing import Annotated

import msgspec
from msgspec import Meta

from ipc.errors import InvalidRequest
from ipc.messages import SamplingParams

# OpenAI's default for the older endpoint.
COMPLETION_MAX_TOKENS = 16

_INT32_MAX = 2**31 - 1

AtLeastOne = Annotated[int, Meta(ge=1)]
TokenId = Annotated[int, Meta(ge=0)]
# The engine's own ranges, so that clients are told of them beforehand.
Temperature = Annotated[float, Meta(ge=0.0, le=1000.0)]
Fraction = Annotated[float, Meta(ge=0.0, le=1.0)]
TopP = Annotated[float, Meta(gt=0.0, le=1.0)]
TopK = Annotated[int, Meta(ge=-1, le=_INT32_MAX)]
Penalty = Annotated[float, Meta(ge=-2.0, le=2.0)]
RepetitionPenalty = Annotated[float, Meta(gt=0.0, le=1000.0)]
Bias = Annotated[float, Meta(ge=-100.0, le=100.0)]
BiasByToken = Annotated[
    dict[int, Bias],
    Meta(extra_json_schema={"propertyNames": {"pattern": "^(0|[1-9][0-9]*)$"}}),
]
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]


class StreamOptions(msgspec.Struct, frozen=True):
    """What a stream tells besides text."""

    include_usage: Annotated[
        bool | None,
        Meta(description="Adds one chunk without choices, with the usage, before the end."),
    ] = None
    continuous_usage_stats: Annotated[
        bool | None, Meta(description="Tells in every chunk of the usage up to then.")
    ] = None


class GenerationRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The fields that both endpoints have in common."""

    model: Annotated[
        str, Meta(description="The base model, an adapter, or an adapter as `base:adapter`.")
    ]
    n: Annotated[
        AtLeastOne | None, Meta(description="How many choices to make of each prompt (1).")
    ] = None
    stream: Annotated[
        bool | None, Meta(description="Sends text as it comes, as server-sent events.")
    ] = None
    stream_options: Annotated[
        StreamOptions | None, Meta(description="Only together with `stream`.")
    ] = None

    temperature: Annotated[
        Temperature | None, Meta(description="0 always takes the likeliest token (1).")
    ] = None
    top_p: Annotated[
        TopP | None, Meta(description="Draws from the likeliest tokens that have this share (1).")
    ] = None
    top_k: Annotated[
        TopK | None, Meta(description="Draws from this many likeliest tokens; 0 or -1: from all.")
    ] = None
    min_p: Annotated[
        Fraction | None,
        Meta(description="Draws from tokens at least this likely, over the likeliest one (0)."),
    ] = None
    seed: Annotated[
        Seed | None,
        Meta(description="Makes the tokens repeatable; each further choice takes the next seed."),
    ] = None
    presence_penalty: Annotated[
        Penalty | None, Meta(description="Taken from the logits of tokens generated before (0).")
    ] = None
    frequency_penalty: Annotated[
        Penalty | None,
        Meta(description="Taken from a token's logit for each time it was generated (0)."),
    ] = None
    repetition_penalty: Annotated[
        RepetitionPenalty | None,
        Meta(description="Above 1, makes tokens of prompt and answer less likely (1)."),
    ] = None
    logit_bias: Annotated[
        BiasByToken | None, Meta(description="Added to the logits of these token ids.")
    ] = None

    min_tokens: Annotated[
        Annotated[int, Meta(ge=0, le=_INT32_MAX)] | None,
        Meta(description="Neither end of text nor any stop before this many tokens (0)."),
    ] = None
    ignore_eos: Annotated[
        bool | None, Meta(description="Goes on beyond the model's end of text.")
    ] = None
    stop: Annotated[
        str | list[str] | None, Meta(description="Strings at which the answer ends, without them.")
    ] = None
    stop_token_ids: Annotated[
        list[TokenId] | None, Meta(description="Tokens at which the answer ends.")
    ] = None
    include_stop_str_in_output: Annotated[
        bool | None, Meta(description="Shows the stop string or token that ended the answer.")
    ] = None
    skip_special_tokens: Annotated[
        bool | None, Meta(description="Leaves control tokens out of the text (true).")
    ] = None
    return_token_ids: Annotated[
        bool | None, Meta(description="Adds the token ids of prompt and answer.")
    ] = None

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def num_candidates(self) -> int:
        """How many the engine makes of each prompt, of which ``num_choices`` are answered."""
        return self.num_choices

    @property
    def stop_strings(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def sampling_params(
        self, *, max_tokens: int | None, logprobs: int | None, choice: int
    ) -> SamplingParams:
        """What the engine is asked for; each ``choice`` of a seeded request has its own seed."""
        top_k = self.top_k or 0
        return SamplingParams(
            max_tokens=max_tokens,
            min_tokens=self.min_tokens or 0,
            temperature=_or(self.temperature, 1.0),
            top_p=_or(self.top_p, 1.0),
            # vLLM's -1 means, like 0, that the filter is off.
            top_k=0 if top_k == -1 else top_k,
            min_p=_or(self.min_p, 0.0),
            seed=None if self.seed is None else _next_seed(self.seed, choice),
            presence_penalty=_or(self.presence_penalty, 0.0),
            frequency_penalty=_or(self.frequency_penalty, 0.0),
            repetition_penalty=_or(self.repetition_penalty, 1.0),
            logit_bias=self.logit_bias or None,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            logprobs=logprobs,
        )

    def check_options(self, max_choices: int, max_stops: int, max_stop_chars: int) -> None:
        """Raises ``InvalidRequest`` for what the fields' types alone can not tell."""
        if self.num_candidates > max_choices:
            param = "n" if self.num_choices > max_choices else "best_of"
            raise InvalidRequest(
                f"{param}: expected at most {max_choices}, got {self.num_candidates}", param=param
            )
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest(
                "stream_options: expected only together with stream true", param="stream_options"
            )
        if len(self.stop_strings) > max_stops:
            raise InvalidRequest(
                f"stop: expected at most {max_stops} strings, got {len(self.stop_strings)}",
                param="stop",
            )
        for stop in self.stop_strings:
            if not 1 <= len(stop) <= max_stop_chars:
                raise InvalidRequest(
                    f"stop: expected strings of [1, {max_stop_chars}] characters,"
                    f" got one of {len(stop)}",
                    param="stop",
                )


class CompletionRequest(GenerationRequest, frozen=True, kw_only=True):
    """Prompts that the model is to continue."""

    prompt: Annotated[
        str | list[int | str | list[int]],
        Meta(description="A text, texts, token ids, or arrays of token ids."),
    ]
    max_tokens: Annotated[
        AtLeastOne | None,
        Meta(description="Longest answer; null: as long as the model allows."),
    ] = COMPLETION_MAX_TOKENS
    logprobs: Annotated[
        int | None, Meta(description="Reports each token's logprob, and those of as many others.")
    ] = None
    echo: Annotated[
        bool | None, Meta(description="Begins the answer with the prompt; not with `logprobs`.")
    ] = None
    best_of: Annotated[
        AtLeastOne | None,
        Meta(
            description="How many to make of each prompt; the likeliest `n` by logprob per token"
            " are answered. Not streamed (`n`)."
        ),
    ] = None
    add_special_tokens: Annotated[
        bool | None, Meta(description="Begins texts as the tokenizer does, with its BOS (true).")
    ] = None
    lora_path: Annotated[
        str | list[str | None] | None,
        Meta(description="SGLang's name for the adapter, or one for each prompt; null: the base."),
    ] = None

    @property
    def num_candidates(self) -> int:
        return self.best_of or self.num_choices

    def prompts(self) -> list[str | list[int]]:
        """One entry a prompt. Raises ``InvalidRequest`` when kinds of prompt are mixed."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        tokens = [item for item in self.prompt if isinstance(item, int)]
        if tokens and len(tokens) == len(self.prompt):
            return [tokens]
        prompts = [item for item in self.prompt if not isinstance(item, int)]
        kinds = {type(item) for item in self.prompt}
        if len(kinds) != 1:
            raise InvalidRequest(
                "prompt: expected a string, an array of strings, an array of token ids or an array"
                f" of arrays of token ids, got {_describe_mixture(kinds)}",
                param="prompt",
            )
        return prompts

    def check_supported(self) -> None:
        """Raises ``InvalidRequest`` for combinations that are not served."""
        if self.num_candidates < self.num_choices:
            raise InvalidRequest(
                f"best_of: expected at least n ({self.num_choices}), got {self.best_of}",
                param="best_of",
            )
        if self.stream and self.num_candidates > self.num_choices:
            raise InvalidRequest(
                f"best_of: expected n ({self.num_choices}) together with stream true, for none is"
                f" known to be best before all have ended; got {self.best_of}",
                param="best_of",
            )
        if self.echo and self.logprobs is not None:
            raise InvalidRequest(
                "echo: expected false together with logprobs, got true: the prompt's own are not"
                " computed",
                param="echo",
            )


def _describe_mixture(kinds: set[type]) -> str:
    if not kinds:
        return "an empty array"
    names = {int: "token ids", str: "strings", list: "arrays"}
    return "a mixture of " + " and ".join(sorted(names[kind] for kind in kinds))


def _next_seed(seed: int, choice: int) -> int:
    """The ``choice``-th seed after ``seed``; the smallest follows the largest."""
    return (seed + choice + 2**63) % 2**64 - 2**63


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
