"""Random weights that are as well conditioned as trained ones, for comparisons of answers.

How far two correct implementations in bfloat16 drift apart says something about them only where
the model does not magnify rounding by itself, and where what is to be compared can be seen at all:

- A trained adapter changes a linear's output little. B begins at zero, and what Hu et al. report of
  trained ones is some hundredths to a tenth of the base weights, by norm. Here the delta of every
  linear is ``DELTA`` of the base output, whatever the rank.
- The largest of 10^8 differences lies almost six standard deviations out, and rounding in four
  random layers leaves every logit with a deviation of two hundredths of the logits' own. So that a
  largest difference of 0.1 separates right from wrong, logits are drawn out to ``LOGIT_DEVIATION``
  only: at the 8B width, half of what the dummy weights give.

Tried in advance on a CPU with four layers of that width, a vocabulary of 16,384 and 60 tokens:
transformers in bfloat16 was off its own float32 by 0.07 at most, this engine by 0.07 as well; an
adapter changed a logprob by 0.15 in the mean and by 1.0 at most.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", section 7.3.
"""

import math

import torch
from torch import Tensor

from ipc.image import EntryKind
from ipc.messages import AdapterId
from tools.gpu_checks.live_engine import LiveEngine

# Of the base output, both as root mean squares over inputs without a direction.
DELTA = 0.05
LOGIT_DEVIATION = 0.64


def scale_head(engine: LiveEngine) -> None:
    """Gives the logits of normed hidden states a standard deviation of ``LOGIT_DEVIATION``."""
    head = engine.compute.decoder.checkpoint_tensors()["lm_head.weight"]
    with torch.no_grad():
        head.mul_(LOGIT_DEVIATION / (_deviation(head) * math.sqrt(head.shape[1])))
    engine.device.synchronize()


def fill_adapter(engine: LiveEngine, adapter_id: AdapterId, scaling: float) -> None:
    """Draws a resident adapter's matrices anew: A as peft begins with it, B as strong as trained.

    With A uniform in ``±1/√in`` the delta ``scaling · B A x`` has ``scaling · σ(B) · √(rank / 3)``
    of the size of ``x``, and the base output ``σ(W) · √in``.
    """
    weights = engine.compute.decoder.checkpoint_tensors()
    generator = torch.Generator(engine.device.torch_device).manual_seed(adapter_id)
    for prefix, kind, matrix in adapter_matrices(engine, adapter_id):
        in_features = weights[f"{prefix}.weight"].shape[1]
        if kind is EntryKind.LORA_A:
            matrix.uniform_(-(in_features**-0.5), in_features**-0.5, generator=generator)
        else:
            base = _deviation(weights[f"{prefix}.weight"]) * math.sqrt(in_features)
            deviation = DELTA * base / (scaling * math.sqrt(matrix.shape[1] / 3))
            matrix.normal_(0.0, deviation, generator=generator)
    engine.device.synchronize()


def adapter_matrices(
    engine: LiveEngine, adapter_id: AdapterId
) -> list[tuple[str, EntryKind, Tensor]]:
    """Each linear's name as in a checkpoint, whether it is A or B, and the pool's own memory."""
    paths = {linear.name: linear.path for linear in engine.compute.base.linears}
    adapter = engine.installed(adapter_id)
    dtype = engine.compute.decoder.checkpoint_tensors()["model.norm.weight"].dtype
    found = []
    for stage, (layout, extent) in enumerate(
        zip(adapter.layout.stages, adapter.extents, strict=True)
    ):
        layer = stage - engine.compute.base.layer_stage(0)
        for entry in layout.entries:
            memory = engine.compute.pool.extent_view(extent + entry.offset, entry.num_bytes)
            matrix = memory.view(dtype).view(entry.rows, entry.columns)
            found.append((f"model.layers.{layer}.{paths[entry.module]}", entry.kind, matrix))
    return found


def _deviation(weight: Tensor) -> float:
    return float(weight.float().std())
