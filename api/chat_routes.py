"""``/v1/chat/completions``: messages in, the assistant's next one out."""

from starlette.requests import Request
from starlette.responses import Response

from api.api_keys import Access
from api.chat_answers import ChatWriter
from api.chat_requests import ChatRequest, template_messages
from api.endpoints import ENGINE_ERRORS, Answer, Endpoint
from api.openai_responses import ChatChunk, ChatCompletion
from api.template_process import ChatRenderer
from api.text_requests import TextRequests
from api.tokenizer import TextTokenizer
from ipc.errors import InvalidRequest
from ipc.messages import RenderChat


class ChatRoutes:
    """Serves chats with the template of the model's folder."""

    def __init__(self, requests: TextRequests, template: ChatRenderer | None) -> None:
        self._requests = requests
        self._template = template

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        return (
            Endpoint(
                "POST",
                "/v1/chat/completions",
                self.create,
                Access.API,
                "generation",
                "Answer a chat",
                (Answer("The answer.", body=ChatCompletion, events=ChatChunk),),
                errors=(404, 422, *ENGINE_ERRORS),
                body=ChatRequest,
                description="Messages become a prompt by the chat template of the model's folder.",
            ),
        )

    async def create(self, request: Request) -> Response:
        """``POST /v1/chat/completions``."""
        requests = self._requests
        call = await requests.read(request, ChatRequest)
        call.check_supported()
        tokenizer, template = self._text_side()
        prompt = await template.render(
            RenderChat(
                messages=template_messages(call.messages),
                tools=call.template_tools,
                documents=call.documents,
                variables=call.chat_template_kwargs,
                add_generation_prompt=call.begins_answer,
                continue_final_message=bool(call.continue_final_message),
            )
        )
        # The template has written the special tokens out, unless the client knows otherwise.
        ids = await tokenizer.encode(prompt, add_special_tokens=bool(call.add_special_tokens))
        completion_field = call.max_completion_tokens is not None
        generation = requests.generation(
            request,
            call,
            [ids],
            max_tokens=call.answer_tokens,
            max_tokens_param="max_completion_tokens" if completion_field else "max_tokens",
            logprobs=call.num_logprobs,
            prompt_param="messages",
        )
        writer = ChatWriter(
            requests.header(request, call, "chatcmpl", generation),
            tokenizer,
            logprobs=bool(call.logprobs),
            prompt_token_ids=ids if call.return_token_ids else None,
        )
        return await requests.answer(request, call, generation, writer, prompt_param="messages")

    def _text_side(self) -> tuple[TextTokenizer, ChatRenderer]:
        tokenizer = self._requests.tokenizer
        if tokenizer is None:
            raise InvalidRequest(
                "the model's folder has no tokenizer.json: chats are not served, but"
                " /v1/completions takes prompts as token ids",
                param="messages",
            )
        if self._template is None:
            raise InvalidRequest(
                "the model's folder has no chat template: chats are not served, but"
                " /v1/completions takes prompts as text",
                param="messages",
            )
        return tokenizer, self._template
