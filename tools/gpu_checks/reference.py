"""What transformers and peft answer with the very weights that an engine holds."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ipc.base_model import LINEAR_MODULES
from ipc.image import EntryKind
from ipc.messages import AdapterId
from tools.gpu_checks.lifelike import adapter_matrices
from tools.gpu_checks.live_engine import LiveEngine


class Reference:
    """The model of ``engine`` in ``dtype``, with the adapters that it has installed.

    ``ranks`` names them; all of an adapter's modules have that rank and ``scaling``. Holds copies.
    """

    def __init__(
        self,
        engine: LiveEngine,
        folder: Path,
        ranks: Mapping[AdapterId, int],
        scaling: float,
        dtype: torch.dtype,
    ) -> None:
        # Here alone: the other parts run without these two.
        import peft
        import transformers

        device = engine.device.torch_device
        config = transformers.AutoConfig.from_pretrained(folder)
        with torch.device(device), warnings.catch_warnings():
            # Peft asks transformers for attributes that the latter is about to rename.
            warnings.simplefilter("ignore", FutureWarning)
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
            _copy(dict(model.named_parameters()), engine.compute.decoder.checkpoint_tensors())
            for adapter_id, rank in ranks.items():
                lora = peft.LoraConfig(
                    r=rank,
                    lora_alpha=scaling * rank,
                    target_modules=list(LINEAR_MODULES),
                    task_type="CAUSAL_LM",
                )
                name = str(adapter_id)
                if isinstance(model, peft.PeftModel):
                    model.add_adapter(name, lora, autocast_adapter_dtype=False)
                else:
                    model = peft.get_peft_model(model, lora, name, autocast_adapter_dtype=False)
        self._model: Any = model.eval()
        # The parameters alone: the frequencies of the rotary embedding are float32 in every dtype,
        # as they are in a model that transformers has loaded.
        for parameter in self._model.parameters():
            parameter.data = parameter.data.to(dtype)
        self._device = device
        for adapter_id in ranks:
            self._fill_adapter(engine, adapter_id)

    def logprobs(self, token_ids: list[int], adapter_id: AdapterId | None) -> Tensor:
        """``[num_tokens, vocab]`` fp32 of one sequence alone."""
        batch = torch.tensor([token_ids], device=self._device)
        with torch.inference_mode():
            if adapter_id is None:
                with self._model.disable_adapter():
                    logits = self._model(input_ids=batch).logits[0]
            else:
                self._model.set_adapter(str(adapter_id))
                logits = self._model(input_ids=batch).logits[0]
        answer: Tensor = logits.float().log_softmax(dim=-1)
        return answer

    def dtypes(self) -> dict[str, torch.dtype]:
        """Of every parameter and buffer, by name."""
        named = (*self._model.named_parameters(), *self._model.named_buffers())
        return {name: tensor.dtype for name, tensor in named}

    def _fill_adapter(self, engine: LiveEngine, adapter_id: AdapterId) -> None:
        parameters = {
            name.removeprefix("base_model.model."): parameter
            for name, parameter in self._model.named_parameters()
        }
        wanted = {}
        for prefix, kind, matrix in adapter_matrices(engine, adapter_id):
            name = "lora_A" if kind is EntryKind.LORA_A else "lora_B"
            wanted[f"{prefix}.{name}.{adapter_id}.weight"] = matrix
        _copy(parameters, wanted)


def _copy(targets: Mapping[str, Tensor], sources: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, source in sources.items():
            target = targets[name]
            assert target.shape == source.shape, (name, target.shape, source.shape)
            target.copy_(source)
