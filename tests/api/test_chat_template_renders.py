"""Prompts and refusals are those of transformers, over templates of every family's constructs."""

import random
from datetime import datetime, tzinfo
from pathlib import Path
from typing import Any, Self

import pytest
from transformers import PreTrainedTokenizerFast

from api.chat_template import ChatTemplate
from api.template_files import TemplateFiles
from ipc.errors import InvalidRequest
from ipc.messages import RenderChat
from tests.api.conversations import draw_request
from tools.tiny_model.tokenizer import BOS, EOS, PAD, save_tokenizer

TEMPLATES = sorted((Path(__file__).parent / "chat_templates").glob("*.jinja"))
SPECIAL_TOKENS = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
TRANSFORMERS_MARK = "continue_final_message"
RENDERS_EACH = 40
REFUSED = "the model's chat template refuses these messages: "


class NewYearsEve(datetime):
    """A clock that stands: two renders see the same day."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> Self:
        return cls(2025, 12, 31, 23, 59, 59, tzinfo=tz)


@pytest.fixture(autouse=True)
def standing_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("api.template_environment", "transformers.utils.chat_template_utils"):
        monkeypatch.setattr(f"{module}.datetime", NewYearsEve)


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def expected(oracle: PreTrainedTokenizerFast, source: str, request: dict[str, Any]) -> str | None:
    """What transformers makes of the request; an error's message after ``REFUSED``.

    None when it does not continue a message: it refuses to in words of its own, and where a
    template writes the message twice, it leaves its mark in the prompt.
    """
    others = {**request, **request["variables"]}
    del others["variables"], others["messages"]
    try:
        prompt: str = oracle.apply_chat_template(
            request["messages"], chat_template=source, tokenize=False, **others
        )
    except ValueError:
        return None
    except Exception as error:
        return f"{REFUSED}{error}"
    return None if TRANSFORMERS_MARK in prompt.lower() else prompt


def rendered(template: ChatTemplate, request: dict[str, Any]) -> str | None:
    """The same of ours."""
    try:
        return template.render(RenderChat(**request))
    except InvalidRequest as error:
        return None if error.param == "continue_final_message" else error.message


def compare(oracle: PreTrainedTokenizerFast, path: Path, draw: random.Random, count: int) -> int:
    """Renders ``count`` requests both ways; returns how many of them have a prompt."""
    source = path.read_text()
    template = ChatTemplate(TemplateFiles({"default": source}, SPECIAL_TOKENS))
    num_prompts = 0
    for _ in range(count):
        request = draw_request(draw)
        prompt = expected(oracle, source, request)
        assert rendered(template, request) == prompt, request
        num_prompts += prompt is not None and not prompt.startswith(REFUSED)
    return num_prompts


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_prompts_are_those_of_transformers(oracle: PreTrainedTokenizerFast, path: Path) -> None:
    assert compare(oracle, path, random.Random(path.stem), RENDERS_EACH) > RENDERS_EACH // 3


@pytest.mark.long
@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_many_prompts_are_those_of_transformers(
    oracle: PreTrainedTokenizerFast, path: Path, seed: int
) -> None:
    assert compare(oracle, path, random.Random(f"{path.stem} {seed}"), 100) > 33


def test_there_are_templates_enough() -> None:
    assert len(TEMPLATES) * RENDERS_EACH > 300
