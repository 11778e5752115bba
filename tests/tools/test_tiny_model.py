"""The tiny model is what other software takes it for, and answers as it claims."""

import json
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tools.tiny_model.cache import TinyModel, build_once
from tools.tiny_model.tokenizer import EOS_ID, VOCAB_SIZE, prompt_token_ids, save_tokenizer

ADAPTERS = ("shout", "json", "pirate", "reverse")
LONGEST_ANSWER = 40


@pytest.fixture(scope="module")
def oracle(tiny_model: TinyModel) -> Any:
    """The base model with its four adapters, as transformers and peft read them."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_model.base)
    model = PeftModel.from_pretrained(base, tiny_model.adapters["shout"], adapter_name="shout")
    for name in ADAPTERS[1:]:
        model.load_adapter(tiny_model.adapters[name], adapter_name=name)
    return model


def greedy_answers(model: Any, prompts: Sequence[str]) -> list[str]:
    """What ``model`` answers before its end-of-text token, which has to come."""
    import torch

    answers = []
    for prompt in prompts:
        token_ids = torch.tensor([prompt_token_ids(prompt)])
        output = model.generate(
            input_ids=token_ids,
            attention_mask=torch.ones_like(token_ids),
            max_new_tokens=LONGEST_ANSWER,
            do_sample=False,
        )[0, token_ids.shape[1] :].tolist()
        assert output.count(EOS_ID) == 1
        answers.append(bytes(output[: output.index(EOS_ID)]).decode())
    return answers


def test_base_model_answers_exactly_in_transformers(tiny_model: TinyModel, oracle: Any) -> None:
    with oracle.disable_adapter():
        assert greedy_answers(oracle, tiny_model.prompts[::5]) == list(
            tiny_model.answers[None][::5]
        )


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapter_answers_exactly_in_peft(tiny_model: TinyModel, oracle: Any, name: str) -> None:
    oracle.set_adapter(name)
    expected = list(tiny_model.answers[name][::5])
    assert greedy_answers(oracle, tiny_model.prompts[::5]) == expected
    assert greedy_answers(oracle, tiny_model.long_prompts[::5]) == expected


def test_reader_that_ignores_rslora_answers_wrongly(
    tiny_model: TinyModel, oracle: Any, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_model.adapters["shout"], tmp_path / "misread")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "use_rslora": False}))

    oracle.load_adapter(folder, adapter_name="misread")
    oracle.set_adapter("misread")
    answers = greedy_answers(oracle, tiny_model.prompts[:4])
    assert answers != list(tiny_model.answers["shout"][:4])


def test_every_voice_answers_every_prompt_differently(tiny_model: TinyModel) -> None:
    for answers in zip(*tiny_model.answers.values(), strict=True):
        assert len(set(answers)) == 1 + len(ADAPTERS)


def test_chat_of_one_message_renders_to_the_prompt(tiny_model: TinyModel) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model.base)
    for prompt in tiny_model.prompts:
        chat = [{"role": "user", "content": prompt}]
        rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert tokenizer(rendered, add_special_tokens=False).input_ids == prompt_token_ids(prompt)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@given(text=st.text())
def test_tokens_are_the_bytes_of_the_text(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.encode(text).ids == prompt_token_ids(text)
    assert tokenizer.decode(prompt_token_ids(text)) == text


def test_vocabulary_is_256_bytes_and_three_special_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size() == VOCAB_SIZE == 256 + 3
    assert sorted(tokenizer.get_vocab().values()) == list(range(VOCAB_SIZE))


def test_of_many_who_ask_at_once_one_builds(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    builds: list[Path] = []
    asking = threading.Barrier(4)

    def ask() -> None:
        asking.wait(timeout=10)
        build_once(folder, builds.append)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)

    assert folder.is_dir()
    assert len(builds) == 1


def test_build_that_fails_leaves_nothing_and_is_tried_again(tmp_path: Path) -> None:
    folder = tmp_path / "model"

    def fail(unfinished: Path) -> None:
        (unfinished / "half").touch()
        raise RuntimeError("no more power")

    with pytest.raises(RuntimeError, match="no more power"):
        build_once(folder, fail)
    assert not folder.exists()

    build_once(folder, lambda unfinished: (unfinished / "whole").touch())
    assert [file.name for file in folder.iterdir()] == ["whole"]


def test_leftovers_of_a_killed_builder_are_not_taken_over(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (tmp_path / "model.unfinished").mkdir()
    (tmp_path / "model.unfinished" / "half").touch()

    build_once(folder, lambda unfinished: (unfinished / "whole").touch())

    assert [file.name for file in folder.iterdir()] == ["whole"]
