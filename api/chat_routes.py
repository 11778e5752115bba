"""``/v1/chat/completions``: messages in, the assistant's next one out."""

from starlette.requests import Request
from starlette.responses import Response

from api.api_keys import Access
from api.chat_answers import ChatWriter
from api.chat_requests import ChatRequest
from api.endpoints import ENGINE_ERRORS, Answer, Endpoint
from api.openai_responses import ChatChunk, ChatCompletion
from api.prompts import PromptEncoder
from api.template_process import ChatRenderer
from api.text_requests import TextRequests


class ChatRoutes:
    """Serves chats with the template of the model's folder."""

    def __init__(self, requests: TextRequests, template: ChatRenderer | None) -> None:
        self._requests = requests
        self._prompts = PromptEncoder(requests.tokenizer, template)

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
        ids = await self._prompts.encode_chat(call)
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
            requests.tokenizer,
            logprobs=bool(call.logprobs),
            prompt_token_ids=ids if call.return_token_ids else None,
        )
        return await requests.answer(request, call, generation, writer, prompt_param="messages")
