"""What ``/tokenize`` and ``/detokenize`` take and give: vLLM's fields."""

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from api.chat_requests import ChatMessage, RawTool
from api.openai_requests import TokenId

AdapterName = Annotated[
    str | None, Meta(description="Any of the server's: adapters share the base's tokenizer.")
]


class TokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A text, or a chat that is made into one by the model's chat template."""

    model: AdapterName = None
    prompt: Annotated[str | None, Meta(description="A text; not with `messages`.")] = None
    messages: Annotated[
        Annotated[list[ChatMessage], Meta(min_length=1)] | None,
        Meta(description="A chat; not with `prompt`."),
    ] = None
    add_special_tokens: Annotated[
        bool | None,
        Meta(description="Adds the tokenizer's own, such as BOS: true for texts, false for chats."),
    ] = None
    return_token_strs: Annotated[
        bool | None, Meta(description="Adds what the vocabulary calls each token.")
    ] = None
    add_generation_prompt: Annotated[
        bool | None, Meta(description="Ends a chat with an answer's beginning (true).")
    ] = None
    continue_final_message: Annotated[
        bool | None, Meta(description="Ends a chat within its last message.")
    ] = None
    tools: Annotated[
        list[RawTool] | None, Meta(description="Functions for the chat template to tell of.")
    ] = None
    documents: Annotated[
        list[dict[str, Any]] | None, Meta(description="For the chat template.")
    ] = None
    chat_template_kwargs: Annotated[
        dict[str, Any] | None, Meta(description="Further variables for the chat template.")
    ] = None


class Tokenized(msgspec.Struct, frozen=True):
    """Token ids, and how many fit into the model."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Token ids."""

    model: AdapterName = None
    tokens: Annotated[list[TokenId], Meta(description="Of the model's vocabulary.")]


class Detokenized(msgspec.Struct, frozen=True):
    """Their text, control tokens included."""

    prompt: str
