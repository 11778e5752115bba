"""From the texts and chats that clients send to the token ids that the engine is asked with."""

from dataclasses import dataclass

from api.chat_requests import ChatRequest, template_messages
from api.template_process import ChatRenderer
from api.tokenizer import TextTokenizer
from ipc.errors import InvalidRequest
from ipc.messages import RenderChat


@dataclass(frozen=True)
class PromptEncoder:
    """Encodes prompts as one model's folder says; None is what that folder does not have."""

    tokenizer: TextTokenizer | None
    template: ChatRenderer | None

    async def encode(self, prompt: str | list[int], *, add_special_tokens: bool) -> list[int]:
        """The ids of a text; ids are as they are.

        Raises:
            InvalidRequest: a text, but there is no tokenizer.
        """
        if not isinstance(prompt, str):
            return prompt
        if self.tokenizer is None:
            raise InvalidRequest(
                "prompt: expected token ids, got a string: the model's folder has no"
                " tokenizer.json",
                param="prompt",
            )
        return await self.tokenizer.encode(prompt, add_special_tokens=add_special_tokens)

    async def encode_chat(self, call: ChatRequest) -> list[int]:
        """The ids of a chat, as far as its next message.

        Raises:
            InvalidRequest: there is no tokenizer or no template, or the template refuses the chat.
            Unavailable: the process that renders templates died.
        """
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
        return await tokenizer.encode(prompt, add_special_tokens=bool(call.add_special_tokens))

    def _text_side(self) -> tuple[TextTokenizer, ChatRenderer]:
        if self.tokenizer is None:
            raise InvalidRequest(
                "the model's folder has no tokenizer.json: chats are not served, but prompts as"
                " token ids are",
                param="messages",
            )
        if self.template is None:
            raise InvalidRequest(
                "the model's folder has no chat template: chats are not served, but prompts as"
                " text are",
                param="messages",
            )
        return self.tokenizer, self.template
