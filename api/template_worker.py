"""Renders chat templates within bounds: ``python -m api.template_worker PARENT``.

The child of the frontend's process with the pid ``PARENT``; ``template_process`` is its other
side. A message is a line of JSON.
"""

import resource
import signal
import sys
from pathlib import Path
from typing import assert_never

import msgspec

from api.chat_template import ChatTemplate
from api.template_files import TemplateFiles
from ipc.errors import InvalidRequest
from ipc.messages import (
    LoadTemplates,
    PromptRendered,
    RenderChat,
    TemplateAnswer,
    TemplateCall,
    TemplateRefused,
    TemplatesLoaded,
)
from ipc.process import die_with_parent


class TemplateWorker:
    """Answers one call after the other. What a template does is refused, never raised."""

    def __init__(self) -> None:
        self._template: ChatTemplate | None = None
        self._max_prompt_chars = 0

    def answer(self, call: LoadTemplates | RenderChat) -> TemplateAnswer:
        try:
            match call:
                case LoadTemplates():
                    return self._load(call)
                case RenderChat():
                    return self._render(call)
                case _:
                    assert_never(call)
        except InvalidRequest as error:
            return TemplateRefused(error.info)

    def _load(self, call: LoadTemplates) -> TemplatesLoaded:
        limit_memory(call.max_memory_bytes)
        self._max_prompt_chars = call.max_prompt_chars
        self._template = ChatTemplate(TemplateFiles(call.sources, call.special_tokens))
        return TemplatesLoaded()

    def _render(self, call: RenderChat) -> PromptRendered:
        assert self._template is not None, "RenderChat came before LoadTemplates"
        prompt = self._template.render(call)
        if len(prompt) > self._max_prompt_chars:
            raise InvalidRequest(
                f"the model's chat template makes {len(prompt)} characters of these messages:"
                f" expected at most {self._max_prompt_chars}",
                param="messages",
            )
        return PromptRendered(prompt)


def limit_memory(growth_bytes: int) -> None:
    """Lets this process's address space grow by so much; then Python raises ``MemoryError``."""
    num_pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = num_pages * resource.getpagesize() + growth_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def main(parent_pid: int) -> None:
    """Serves until the parent closes standard input."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # A Ctrl-C is the supervisor's affair.
    die_with_parent(parent_pid)
    decoder = msgspec.json.Decoder(TemplateCall)
    worker = TemplateWorker()
    for line in sys.stdin.buffer:
        answer = worker.answer(decoder.decode(line))
        sys.stdout.buffer.write(msgspec.json.encode(answer) + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]))
