"""Templates that never end, grow or die take nothing down with them."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from api import template_process
from api.template_files import TemplateFiles
from api.template_process import TemplateLimits, TemplateProcess
from ipc.errors import InvalidRequest, Unavailable
from ipc.messages import RenderChat
from tests.api.frontend import on_loop, until

MiB = 1 << 20

# What the first message says is done; the sandbox has nothing against any of it.
SOURCE = """\
{%- set wish = messages[0].content %}
{%- set ns = namespace(text='x' * 1000) %}
{%- if wish == 'loop' %}
    {%- for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}
{%- elif wish == 'multiply' %}{{ 'x' * (wish | length * 10 ** 11) }}
{%- elif wish == 'double' %}
    {%- for i in range(60) %}{% set ns.text = ns.text ~ ns.text %}{% endfor %}
{%- elif wish == 'long' %}{{ 'x' * 1000001 }}
{%- elif wish == 'refuse' %}{{ raise_exception('no') }}
{%- endif %}
{{- wish }}"""


def limits(timeout_s: float = 20.0) -> TemplateLimits:
    return TemplateLimits(timeout_s, max_memory_bytes=128 * MiB, max_prompt_chars=1_000_000)


def process(source: str = SOURCE, timeout_s: float = 20.0) -> TemplateProcess:
    return TemplateProcess(
        TemplateFiles({"default": source}, {"eos_token": "</s>"}), limits(timeout_s)
    )


def chat(content: str, **fields: Any) -> RenderChat:
    return RenderChat(messages=[{"role": "user", "content": content}], **fields)


def pid_of(templates: TemplateProcess) -> int:
    assert templates._child is not None
    return templates._child.pid


def is_running(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    return False


@on_loop
async def test_a_chat_comes_back_as_the_template_renders_it() -> None:
    source = "{{ messages | tojson }}{{ tools | tojson }}{{ a }}{{ eos_token }}{{ documents }}"
    async with process(source) as templates:
        wish = chat("é😀\n\u2028", tools=[{"t": [1.5, None]}], variables={"a": True})
        assert await templates.render(wish) == (
            '[{"role": "user", "content": "é😀\\n\u2028"}][{"t": [1.5, null]}]True</s>None'
        )
        many = [templates.render(chat(str(number))) for number in range(20)]
        assert [
            f'"{number}"' in prompt for number, prompt in enumerate(await asyncio.gather(*many))
        ]


@on_loop
async def test_an_endless_loop_is_refused_in_time_and_the_next_chat_served() -> None:
    async with process(timeout_s=0.5) as templates:
        looping = pid_of(templates)
        with pytest.raises(InvalidRequest, match=r"did not end within 0\.5 s") as refused:
            await templates.render(chat("loop"))
        assert refused.value.param == "messages"
        assert not is_running(looping)
        assert await templates.render(chat("next")) == "next"


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ("multiply", "refuses these messages: MemoryError"),
        ("double", "refuses these messages: MemoryError"),
        ("long", "makes 1000005 characters of these messages: expected at most 1000000"),
        ("refuse", "refuses these messages: no"),
    ],
)
@on_loop
async def test_what_grows_is_refused_and_the_same_child_goes_on(wish: str, message: str) -> None:
    async with process() as templates:
        child = pid_of(templates)
        with pytest.raises(InvalidRequest, match=message):
            await templates.render(chat(wish))
        assert await templates.render(chat("next")) == "next"
        assert pid_of(templates) == child


@on_loop
async def test_what_is_no_template_is_refused_at_the_start() -> None:
    templates = process("{% if %}")
    with pytest.raises(InvalidRequest, match="line 1: Expected an expression"):
        async with templates:
            pass
    assert templates._child is None


@on_loop
async def test_a_template_that_takes_for_ever_to_compile_is_refused_at_the_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(template_process, "START_TIMEOUT_S", 1.0)
    # What is constant in a template is computed before there is a chat.
    templates = process("{{ 3 ** (10 ** 8) }}")
    with pytest.raises(InvalidRequest, match="did not end within 1 s"):
        async with templates:
            pass
    assert templates._child is None


@on_loop
async def test_a_child_that_died_between_two_chats_is_followed_by_another() -> None:
    async with process() as templates:
        child = templates._child
        assert child is not None
        child.kill()
        await until(lambda: child.returncode is not None)
        assert await templates.render(chat("next")) == "next"


@on_loop
async def test_a_chat_whose_child_dies_is_told_to_come_again() -> None:
    async with process() as templates:
        rendering = asyncio.create_task(templates.render(chat("loop")))
        await until(lambda: templates._turn.locked())
        os.kill(pid_of(templates), signal.SIGKILL)
        with pytest.raises(Unavailable, match="died"):
            await rendering
        assert await templates.render(chat("next")) == "next"


@on_loop
async def test_a_cancelled_chats_prompt_is_not_the_next_ones() -> None:
    async with process() as templates:
        rendering = asyncio.create_task(templates.render(chat("first")))
        await asyncio.sleep(0)
        assert templates._turn.locked()
        rendering.cancel()
        assert await templates.render(chat("next")) == "next"
        assert rendering.cancelled()


@on_loop
async def test_an_interrupt_from_the_terminal_does_not_end_the_child() -> None:
    async with process() as templates:
        child = pid_of(templates)
        os.kill(child, signal.SIGINT)
        assert await templates.render(chat("next")) == "next"
        assert pid_of(templates) == child


@on_loop
async def test_the_child_ends_with_its_block() -> None:
    async with process() as templates:
        child = pid_of(templates)
    assert not is_running(child)


PARENT = """
import asyncio, os, signal
from api.template_files import TemplateFiles
from api.template_process import TemplateLimits, TemplateProcess
from ipc.messages import RenderChat

async def main():
    files = TemplateFiles({"default": "{% for a in range(99999) %}{% for b in range(99999) %}"
        "{% endfor %}{% endfor %}"}, {})
    async with TemplateProcess(files, TemplateLimits(60.0, 1 << 27, 1000)) as templates:
        rendering = asyncio.create_task(templates.render(RenderChat(messages=[{"role": "u"}])))
        await asyncio.sleep(0)
        print(templates._child.pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


@on_loop
async def test_a_child_that_loops_dies_with_its_parent() -> None:
    ran = subprocess.run([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert ran.returncode == -signal.SIGKILL
    await until(lambda: not is_running(int(ran.stdout)))
