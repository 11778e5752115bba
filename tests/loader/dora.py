"""Base models and DoRA adapters on disk, and the images that these must become.

Images are built the long way, in float64, by torch.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ipc.base_model import LINEAR_GROUPS, BaseModel
from ipc.messages import FileIdentity
from ipc.trace import NO_TRACE, Recorder
from loader.adapter_files import AdapterFolders
from loader.derived_store import DerivedStore
from loader.deriver import Deriver
from loader.inspector import Inspector
from loader.load_trace import LoadTrace
from tests.adapters import (
    TORCH_DTYPES,
    StoredTensor,
    config_fields,
    image_bytes,
    random_tensors,
    safetensors_bytes,
    tensor_name,
    write_folder,
)
from tests.loader.images import HOST_TIER_BYTES

ALPHA = 16


def random_base(base: BaseModel, dtype: str = "F32", seed: int = 0) -> dict[str, StoredTensor]:
    """The weights of all linears, and the biases that they have."""
    generator = np.random.default_rng(seed)
    tensors = {}
    for layer in range(base.num_layers):
        for shape in base.linears:
            size = (shape.out_features, shape.in_features)
            values = generator.standard_normal(size, dtype=np.float32)
            tensors[f"model.layers.{layer}.{shape.path}.weight"] = StoredTensor.of(values, dtype)
            if shape.has_bias:
                values = generator.standard_normal(shape.out_features, dtype=np.float32)
                tensors[f"model.layers.{layer}.{shape.path}.bias"] = StoredTensor.of(values, dtype)
    return tensors


def write_base(folder: Path, tensors: Mapping[str, StoredTensor]) -> Path:
    """A model folder of one file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes(safetensors_bytes(tensors))
    return folder


def dora_tensors(
    base: BaseModel, modules: Iterable[str] = ("q_proj", "v_proj"), rank: int = 8, seed: int = 0
) -> dict[str, StoredTensor]:
    """Pairs and magnitudes of every module in every layer."""
    modules = list(modules)
    tensors = random_tensors(base, rank=rank, modules=modules, seed=seed)
    generator = np.random.default_rng(seed)
    for layer in range(base.num_layers):
        for module in modules:
            rows = base.linear(module).out_features
            values = generator.uniform(5.0, 15.0, rows).astype(np.float32)
            tensors[magnitude_name(layer, module)] = StoredTensor.of(values)
    return tensors


def write_dora(
    folder: Path,
    base: BaseModel,
    modules: Iterable[str] = ("q_proj", "v_proj"),
    rank: int = 8,
    seed: int = 0,
) -> dict[str, StoredTensor]:
    """Writes a random DoRA adapter and returns its tensors."""
    tensors = dora_tensors(base, modules, rank, seed)
    write_folder(folder, tensors, config_fields(rank, target_modules=list(modules), use_dora=True))
    return tensors


def magnitude_name(layer: int, module: str) -> str:
    return tensor_name(layer, module, "lora_magnitude_vector").removesuffix(".weight")


def bias_name(layer: int, module: str) -> str:
    """Of a trained bias beside a pair."""
    return tensor_name(layer, module, "base_layer").removesuffix("weight") + "bias"


def dora_image(
    base: BaseModel,
    weights: Mapping[str, StoredTensor],
    tensors: Mapping[str, StoredTensor],
    scaling: float = 2.0,
) -> bytes:
    """The image of an adapter of linears whose scalings are alike, layer by layer."""
    dtype = TORCH_DTYPES[base.dtype]
    image = b""
    for layer in range(base.num_layers):
        of_layer = {name: each for name, each in tensors.items() if f".layers.{layer}." in name}
        image += image_bytes(base, of_layer)
        for module in (name for group in LINEAR_GROUPS for name in group):
            if tensor_name(layer, module, "lora_A") not in of_layer:
                continue
            path = f"model.layers.{layer}.{base.linear(module).path}"

            def served(tensor: StoredTensor) -> Tensor:
                return tensor.values().to(dtype).double()

            scale = torch.ones(base.linear(module).out_features, dtype=torch.float64)
            if (name := magnitude_name(layer, module)) in of_layer:
                a, b = (
                    served(of_layer[tensor_name(layer, module, factor)])
                    for factor in ("lora_A", "lora_B")
                )
                norms = (served(weights[f"{path}.weight"]) + scaling * b @ a).norm(dim=1)
                scale = of_layer[name].values().double() / norms
                image += _entry(scale.float())
            has_bias = base.linear(module).has_bias
            trained = of_layer.get(bias_name(layer, module))
            if trained is not None or (name in of_layer and has_bias):
                bias = served(weights[f"{path}.bias"])
                total = bias if trained is None else trained.values().double()
                image += _entry((total - scale * bias).float().to(dtype))
    return image


def deriver_of(
    root: Path,
    base: BaseModel,
    *,
    cache: Path | None = None,
    cache_bytes: int = 1 << 20,
    num_threads: int = 2,
    model: str | None = "",
    base_files: tuple[FileIdentity, ...] | None = None,
    recorder: Recorder = NO_TRACE,
    before_linear: Callable[[str], None] | None = None,
) -> tuple[Inspector, Deriver]:
    """For the adapters below ``root``, beside which the base lies in ``base``."""
    inspector = Inspector(AdapterFolders([str(root)], None), base, 64, HOST_TIER_BYTES)
    store = DerivedStore(root / "cache" if cache is None else cache, cache_bytes)
    folder = str(root / "base") if model == "" else model
    trace = LoadTrace(recorder)
    made = Deriver(
        inspector,
        folder,
        store,
        num_threads,
        trace,
        base_files=base_files,
        before_linear=before_linear,
    )
    return inspector, made


def files_of_base(folder: Path) -> tuple[FileIdentity, ...]:
    """As the engine tells of the one file in ``folder``."""
    status = (folder / "model.safetensors").stat()
    return (
        FileIdentity(
            "model.safetensors",
            status.st_dev,
            status.st_ino,
            status.st_size,
            status.st_mtime_ns,
        ),
    )


def differences(base: BaseModel, image: bytes, expected: bytes) -> float:
    """The largest relative difference of float32 images, which have to be of one length."""
    assert base.dtype.num_bytes == 4 and len(image) == len(expected)
    got, wanted = (np.frombuffer(each, np.float32) for each in (image, expected))
    return float((np.abs(got - wanted) / np.maximum(np.abs(wanted), 1e-2)).max(initial=0.0))


def _entry(values: Tensor) -> bytes:
    payload = values.contiguous().view(torch.uint8).numpy().tobytes()
    return payload + bytes(-len(payload) % 128)
