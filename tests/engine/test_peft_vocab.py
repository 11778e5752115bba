"""PEFT's adapters of embedding and head give the logits that PEFT gives, whatever stands beside."""

import random
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import peft
import pytest
import torch
import transformers
from torch import Tensor

from engine.config import DeviceKind
from engine.device import open_device
from ipc.image import layout_image
from ipc.messages import AdapterId
from tests.adapters import make_old
from tests.engine.lora_images import LoadedImage
from tests.engine.rig import Rig
from tests.engine.tiny_checkpoints import VOCAB_SIZE, Oracle
from tests.loader.dora import deriver_of
from tests.loader.images import read_open, source_of

TOLERANCE = 1e-4
CLEARLY = 0.05
# Whether PEFT writes what the base has for embedding and head: "auto", beside their pairs alone.
SaveLayers = bool | Literal["auto"]
UNTIED, TIED = "llama", "qwen2"
LINEARS = ["q_proj", "down_proj"]

FIELDS: dict[str, dict[str, Any]] = {
    "neither": {"target_modules": LINEARS},
    "embedding": {"target_modules": ["embed_tokens"]},
    "head": {"target_modules": ["lm_head"]},
    "both": {"target_modules": ["embed_tokens", "lm_head", *LINEARS]},
    "both, by a pattern": {"target_modules": r"model\.embed_tokens|lm_head|.*\.1\.mlp\.\w+_proj"},
    "ranks and scalings of their own": {
        "target_modules": ["embed_tokens", "lm_head", *LINEARS],
        "rank_pattern": {"embed_tokens": 3, "lm_head": 12},
        "alpha_pattern": {"lm_head": 5},
        "use_rslora": True,
    },
    "whole embedding": {"target_modules": LINEARS, "modules_to_save": ["embed_tokens"]},
    "whole head": {"target_modules": LINEARS, "modules_to_save": ["lm_head"]},
    "both whole": {"target_modules": LINEARS, "modules_to_save": ["lm_head", "embed_tokens"]},
    "embedding, and whole head": {
        "target_modules": ["embed_tokens", *LINEARS],
        "modules_to_save": ["lm_head"],
    },
    "head, and whole embedding": {
        "target_modules": ["lm_head"],
        "modules_to_save": ["model.embed_tokens"],
    },
    "trained as one, embedding": {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    "trained as one, head": {"target_modules": ["lm_head"], "ensure_weight_tying": True},
    "trained as one, whole": {
        "target_modules": LINEARS,
        "modules_to_save": ["lm_head"],
        "ensure_weight_tying": True,
    },
}


class Answers:
    """The logits of adapters that PEFT has saved in ``folder`` and loaded again."""

    def __init__(
        self, folder: Path, family: str, chosen: Mapping[str, dict[str, Any]], layers: SaveLayers
    ) -> None:
        Oracle(family, folder / "base", {"unused": {"target_modules": LINEARS}})
        self._folder = folder
        for number, (name, fields) in enumerate(chosen.items()):
            model = self._open_base()
            torch.manual_seed(number)
            config = peft.LoraConfig(
                task_type="CAUSAL_LM",
                **{"r": 8, "lora_alpha": 4, "init_lora_weights": False} | fields,
            )
            adapted = peft.get_peft_model(model, config)
            with torch.no_grad():
                for path, parameter in adapted.named_parameters():
                    if "modules_to_save" in path:
                        parameter.add_(torch.randn(parameter.shape) * 0.2)
            adapted.save_pretrained(folder / name, save_embedding_layers=layers)
            make_old(folder / name)

    def logits(self, name: str | None, token_ids: list[int]) -> Tensor:
        """``[num_tokens, vocab]``; ``name`` None is the base."""
        model = self._open_base()
        if name is not None:
            model = peft.PeftModel.from_pretrained(model, self._folder / name)
        with torch.inference_mode():
            answer: Tensor = model.eval()(input_ids=torch.tensor([token_ids])).logits[0]
        return answer

    def _open_base(self) -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(self._folder / "base")


@dataclass
class Setting:
    """A rig, the adapters that lie in its pool, and what PEFT answers for them."""

    rig: Rig
    answers: Answers
    adapter_ids: dict[str, AdapterId]


def set_up(
    folder: Path, family: str, chosen: Mapping[str, dict[str, Any]], layers: SaveLayers = "auto"
) -> Setting:
    with warnings.catch_warnings():
        # Of what PEFT thinks of tied layers, and that it saves copies.
        warnings.simplefilter("ignore")
        answers = Answers(folder, family, chosen, layers)
    rig = Rig(folder / "base", open_device(DeviceKind.CPU))
    inspector, deriver = deriver_of(folder, rig.base)
    adapter_ids = {}
    for number, name in enumerate(chosen, 1):
        found = inspector.inspect(AdapterId(number), str(folder / name))
        manifest = deriver.check(found)
        payload = read_open(deriver.open(source_of(manifest)), manifest)
        layout = layout_image(rig.base, manifest.modules)
        image = LoadedImage(manifest.modules, layout, payload)
        adapter_ids[name] = rig.install(number, image)
    return Setting(rig, answers, adapter_ids)


def some_tokens(seed: str, num_tokens: int = 23) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(VOCAB_SIZE) for _ in range(num_tokens)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layers", ["auto", True, False])
@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("family", [UNTIED, TIED])
def test_a_file_of_peft_gives_pefts_logits(
    family: str, field: str, layers: SaveLayers, tmp_path: Path
) -> None:
    setting = set_up(tmp_path, family, {"adapter": FIELDS[field]}, layers)
    token_ids = some_tokens(field)
    sequence = setting.rig.sequence(token_ids, setting.adapter_ids["adapter"])
    (prefilled,) = setting.rig.advance((sequence, 20))
    decoded = [setting.rig.advance((sequence, 1))[0] for _ in range(3)]
    expected = setting.answers.logits("adapter", token_ids)
    assert (torch.cat([prefilled, *decoded]) - expected).abs().max() < TOLERANCE
    (of_base,) = setting.rig.advance((setting.rig.sequence(token_ids), len(token_ids)))
    assert (of_base - expected).abs().max() > CLEARLY
    assert (of_base - setting.answers.logits(None, token_ids)).abs().max() < TOLERANCE


@pytest.mark.filterwarnings("ignore")
def test_rows_of_one_batch_have_each_their_own_embedding_and_head(tmp_path: Path) -> None:
    names = ["both", "whole embedding", "whole head", "embedding", "head"]
    chosen = {name: FIELDS[name] for name in names} | {"plain": {"target_modules": LINEARS}}
    setting = set_up(tmp_path, UNTIED, chosen)
    order: list[str | None] = [*chosen, None, *reversed(chosen), None]
    random.Random(3).shuffle(order)
    all_ids = [some_tokens(f"{name} {index}", 9) for index, name in enumerate(order)]
    sequences = [
        setting.rig.sequence(token_ids, None if name is None else setting.adapter_ids[name])
        for name, token_ids in zip(order, all_ids, strict=True)
    ]
    prefilled = setting.rig.advance(
        *((each, 8 - index % 3) for index, each in enumerate(sequences))
    )
    decoded = setting.rig.advance(*((each, 1) for each in sequences))
    for index, (name, token_ids) in enumerate(zip(order, all_ids, strict=True)):
        got = torch.cat([prefilled[index], decoded[index]])
        expected = setting.answers.logits(name, token_ids)[: len(got)]
        assert (got - expected).abs().max() < TOLERANCE, (index, name)


@pytest.mark.filterwarnings("ignore")
def test_the_greedy_token_is_that_of_the_rows_own_head(tmp_path: Path) -> None:
    setting = set_up(tmp_path, UNTIED, {name: FIELDS[name] for name in ("both", "both whole")})
    names = ["both whole", None, "both", "both whole"]
    all_ids = [some_tokens(f"greedy {index}", 5 + index) for index in range(len(names))]
    steps = [
        (
            setting.rig.sequence(token_ids, None if name is None else setting.adapter_ids[name]),
            len(token_ids),
        )
        for name, token_ids in zip(names, all_ids, strict=True)
    ]
    got = [sampled.token_id for sampled in setting.rig.run(*steps)]
    assert got == [
        int(setting.answers.logits(name, token_ids)[-1].argmax())
        for name, token_ids in zip(names, all_ids, strict=True)
    ]
