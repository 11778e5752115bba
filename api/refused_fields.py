"""Which fields of a request are refused, and why all others are not.

| a field is    | then                                                                         |
|---------------|------------------------------------------------------------------------------|
| served        | it is declared in ``openai_requests`` and honoured exactly                   |
| listed here   | it would change the answer and can not be honoured: refused, unless its      |
|               | value asks for nothing                                                       |
| anything else | it is ignored, as OpenAI and vLLM do: ``user``, ``priority``, ``metadata``,  |
|               | ``store``, ``service_tier``, fields of other servers                         |
"""

from typing import Any

import msgspec

from ipc.errors import InvalidRequest

# The values, besides null, with which the field asks for nothing.
REFUSED: dict[str, tuple[Any, ...]] = {
    # Tools and constrained output.
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "structured_outputs": ({},),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": ([],),
    "guided_grammar": (),
    "grammar": ("",),
    "json_schema": (),
    "regex": (),
    "ebnf": (),
    # Other ways to choose tokens.
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "logits_processors": ([],),
    "suffix": ("",),
    # Other prompts than the one that would be used.
    "truncate_prompt_tokens": (),
    "prompt_embeds": ([],),
    "chat_template": (),
    "reasoning_effort": (),
    "reasoning": (),
    "web_search_options": (),
    "lora_path": (),
    # Other answers than text.
    "prompt_logprobs": (),
    "modalities": (["text"],),
    "audio": (),
}

_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])


def check_refused(body: bytes) -> None:
    """Raises ``InvalidRequest`` for a field that is refused; ``body`` is a JSON object."""
    for name, raw in _decoder.decode(body).items():
        harmless = REFUSED.get(name)
        if harmless is None:
            continue
        value = msgspec.json.decode(raw)
        if value is not None and value not in harmless:
            raise InvalidRequest(
                f"{name} is not supported: expected it absent or null, got {_shorten(raw)}",
                param=name,
            )


def _shorten(raw: msgspec.Raw) -> str:
    text = bytes(raw).decode(errors="replace")
    return text if len(text) <= 80 else f"{text[:77]}..."
