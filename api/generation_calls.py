"""From a client's call, whose prompts are token ids by now, to what the engine is asked."""

from collections.abc import Sequence

from api.chat_requests import ChatRequest
from api.engine_client import NO_OPTIONS, CallOptions, EngineClient, Prompt
from api.generation import TextGeneration, TextOptions
from api.metrics import RequestMetrics
from api.openai_requests import CompletionRequest
from api.tokenizer import TextTokenizer

GenerationCall = CompletionRequest | ChatRequest


def text_generation(
    engine: EngineClient,
    tokenizer: TextTokenizer | None,
    metrics: RequestMetrics,
    call: GenerationCall,
    *,
    name: str,
    prompts: Sequence[list[int]],
    adapters: Sequence[str | None],
    max_tokens: int | None,
    logprobs: int | None,
    call_options: CallOptions = NO_OPTIONS,
) -> TextGeneration:
    """All that ``call`` asks of the engine for ``prompts``, with one adapter a prompt; nothing is
    sent yet. ``name`` begins the requests' ids."""
    if logprobs is None and call.num_candidates > call.num_choices:
        # The best ones are to be found.
        logprobs = 0
    return TextGeneration(
        engine=engine,
        tokenizer=tokenizer,
        metrics=metrics,
        name=name,
        prompts=[
            [
                Prompt(
                    prompt,
                    call.sampling_params(max_tokens=max_tokens, logprobs=logprobs, choice=choice),
                    adapter,
                )
                for choice in range(call.num_candidates)
            ]
            for prompt, adapter in zip(prompts, adapters, strict=True)
        ],
        options=TextOptions(
            stops=call.stop_strings,
            include_stop=bool(call.include_stop_str_in_output),
            skip_special_tokens=call.skip_special_tokens is not False,
            min_tokens=call.min_tokens or 0,
            stop_token_ids=tuple(call.stop_token_ids or ()),
        ),
        call_options=call_options,
    )
