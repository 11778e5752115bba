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

from api.field_errors import shorten
from ipc.errors import InvalidRequest

# The values, besides null, with which the field asks for nothing.
REFUSED: dict[str, tuple[Any, ...]] = {
    # Tools, where they are not served, and constrained output.
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True,),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "structured_outputs": ({},),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": ([],),
    "guided_grammar": (),
    "structural_tag": (),
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
    "custom_logit_processor": (),
    "stop_regex": ([], ""),
    "no_stop_trim": (False,),
    "suffix": ("",),
    # Other prompts than the one that would be used.
    "truncate_prompt_tokens": (),
    "prompt_embeds": ([],),
    "chat_template": (),
    "reasoning_effort": (),
    "reasoning": (),
    "verbosity": ("medium",),
    "web_search_options": (),
    # A prefix cache that is not shared with requests of another salt.
    "cache_salt": ("",),
    # Other answers than text.
    "prompt_logprobs": (),
    "return_tokens_as_token_ids": (False,),
    "return_hidden_states": (False,),
    "modalities": (["text"],),
    "audio": (),
}

_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])


def check_refused(body: bytes, body_type: type[msgspec.Struct]) -> None:
    """Raises ``InvalidRequest`` for a field that is refused.

    ``body`` is the JSON of a ``body_type``, which serves what it declares.
    """
    for name, raw in _decoder.decode(body).items():
        harmless = REFUSED.get(name)
        if harmless is None or name in body_type.__struct_fields__:
            continue
        value = msgspec.json.decode(raw)
        if value is not None and value not in harmless:
            raise InvalidRequest(
                f"{name} is not supported: expected it {_absent_or(harmless)},"
                f" got {shorten(bytes(raw).decode(errors='replace'))}",
                param=name,
            )


def _absent_or(harmless: tuple[Any, ...]) -> str:
    """``absent, null or "x"``"""
    choices = ["absent", "null", *(msgspec.json.encode(value).decode() for value in harmless)]
    return f"{', '.join(choices[:-1])} or {choices[-1]}"
