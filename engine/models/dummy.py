"""Random weights in the shape of a configuration, for measurements that need no answers."""

import torch

from engine.device import Device
from engine.models.config import ModelConfig
from engine.models.decoder import Decoder
from ipc.base_model import DType

# Small enough that a bfloat16 residual stays finite through any number of layers in use: each layer
# begins with a norm, so that what it adds does not grow with depth.
_STANDARD_DEVIATION = 0.02


def make_dummy_model(config: ModelConfig, dtype: DType, device: Device, seed: int) -> Decoder:
    """A model of ``config`` with weights of the normal distribution, drawn on the device.

    The norms' weights are 1. Equal seeds give equal weights on devices of one kind.
    """
    decoder = Decoder(config, dtype, device)
    generator = torch.Generator(device.torch_device).manual_seed(seed)
    for name, tensor in decoder.checkpoint_tensors().items():
        if name.endswith("norm.weight"):
            tensor.fill_(1.0)
        else:
            tensor.normal_(0.0, _STANDARD_DEVIATION, generator=generator)
    device.synchronize()
    return decoder
