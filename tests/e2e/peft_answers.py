"""What transformers and peft answer for an adapter of the tiny model."""

from pathlib import Path
from typing import Any

import torch

from tools.tiny_model.cache import TinyModel
from tools.tiny_model.tokenizer import EOS_ID, prompt_token_ids

NUM_TOKENS = 24


def answers_of_peft(tiny_model: TinyModel, folder: Path) -> list[str]:
    """The greedy answers to the first four prompts, of up to ``NUM_TOKENS`` tokens, in float32."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_model.base).float()
    model: Any = PeftModel.from_pretrained(base, folder)
    answers = []
    for prompt in tiny_model.prompts[:4]:
        token_ids = torch.tensor([prompt_token_ids(prompt)])
        output = model.generate(
            input_ids=token_ids,
            attention_mask=torch.ones_like(token_ids),
            max_new_tokens=NUM_TOKENS,
            do_sample=False,
        )[0, token_ids.shape[1] :].tolist()
        end = output.index(EOS_ID) if EOS_ID in output else len(output)
        answers.append(bytes(output[:end]).decode(errors="replace"))
    return answers
