"""Text to token ids and back, without generating any: vLLM's paths."""

from starlette.requests import Request
from starlette.responses import Response

from api.api_keys import Access
from api.bodies import decode_body, read_body
from api.chat_requests import begins_answer, check_prompt_end, check_tools, template_messages
from api.config import ApiConfig
from api.endpoints import Answer, Endpoint
from api.engine_client import EngineClient
from api.sse import json_response
from api.template_process import ChatRenderer
from api.tokenization import Detokenized, DetokenizeRequest, Tokenized, TokenizeRequest
from api.tokenizer import TextTokenizer
from ipc.errors import InvalidRequest
from ipc.messages import RenderChat


class TokenizationRoutes:
    """Encodes and decodes with the tokenizer of the model's folder."""

    def __init__(
        self,
        config: ApiConfig,
        engine: EngineClient,
        tokenizer: TextTokenizer | None,
        template: ChatRenderer | None,
    ) -> None:
        self._config = config
        self._engine = engine
        self._tokenizer = tokenizer
        self._template = template

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        return (
            Endpoint(
                "POST",
                "/tokenize",
                self.tokenize,
                Access.API,
                "tokenization",
                "Turn a text or a chat into token ids",
                (Answer("The token ids.", body=Tokenized),),
                errors=(500, 503),
                body=TokenizeRequest,
            ),
            Endpoint(
                "POST",
                "/detokenize",
                self.detokenize,
                Access.API,
                "tokenization",
                "Turn token ids into a text",
                (Answer("The text.", body=Detokenized),),
                errors=(500, 503),
                body=DetokenizeRequest,
            ),
        )

    async def tokenize(self, request: Request) -> Response:
        """``POST /tokenize``: what the same text or chat is to the model in a request for text."""
        call = decode_body(await self._body(request), TokenizeRequest)
        tokenizer, max_model_len = self._text_side(), self._engine.welcome.max_model_len
        if (call.prompt is None) == (call.messages is None):
            raise InvalidRequest(
                "prompt: expected it or messages, got"
                f" {'neither' if call.prompt is None else 'both'}",
                param="prompt",
            )
        check_tools(call.tools)
        if call.prompt is not None:
            text, with_special_tokens = call.prompt, call.add_special_tokens is not False
        else:
            text, with_special_tokens = await self._render(call), bool(call.add_special_tokens)
        ids = await tokenizer.encode(text, add_special_tokens=with_special_tokens)
        pieces = [tokenizer.piece(token_id) for token_id in ids] if call.return_token_strs else None
        return json_response(Tokenized(len(ids), max_model_len, ids, pieces))

    async def detokenize(self, request: Request) -> Response:
        """``POST /detokenize``."""
        call = decode_body(await self._body(request), DetokenizeRequest)
        tokenizer, vocab_size = self._text_side(), self._engine.welcome.vocab_size
        for place, token_id in enumerate(call.tokens):
            if token_id >= vocab_size:
                raise InvalidRequest(
                    f"tokens[{place}]: expected one of [0, {vocab_size}), got {token_id}",
                    param=f"tokens[{place}]",
                )
        return json_response(Detokenized(tokenizer.decode(call.tokens, skip_special_tokens=False)))

    async def _render(self, call: TokenizeRequest) -> str:
        if self._template is None:
            raise InvalidRequest(
                "messages: expected prompt: the model's folder has no chat template",
                param="messages",
            )
        continued = bool(call.continue_final_message)
        begins = begins_answer(call.add_generation_prompt, continued)
        check_prompt_end(begins, continued)
        return await self._template.render(
            RenderChat(
                messages=template_messages(call.messages or ()),
                tools=call.tools or None,
                documents=call.documents,
                variables=call.chat_template_kwargs,
                add_generation_prompt=begins,
                continue_final_message=continued,
            )
        )

    def _text_side(self) -> TextTokenizer:
        if self._tokenizer is None:
            raise InvalidRequest("the model's folder has no tokenizer.json: it has only token ids")
        return self._tokenizer

    async def _body(self, request: Request) -> bytes:
        return await read_body(request, self._config.max_body_bytes, self._config.body_timeout_s)
