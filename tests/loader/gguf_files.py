"""Writes GGUF adapters, by gguf's own writer and quantizers or of blocks that are made up."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize, quantize
from numpy.typing import NDArray

from ipc.base_model import EMBED_MODULE, HEAD_MODULE, BaseModel, LinearShape
from loader.vocab_shapes import embedding_shape, head_shape
from tests.adapters import StoredTensor, make_old, tensor_name

Values = NDArray[np.float32]
NAMES = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "down_proj": "ffn_down"}
RANK, ALPHA = 256, 64.0
WRITTEN = (
    *(Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1),
    Type.MXFP4,
)
# Where float16 scales stand in a block: all others of its bytes may be anything.
SCALES: dict[Type, tuple[int, ...]] = {
    Type.Q4_K: (0, 2),
    Type.Q5_K: (0, 2),
    Type.Q6_K: (208,),
    Type.Q2_K: (80, 82),
    Type.Q3_K: (108,),
    Type.TQ1_0: (52,),
    Type.TQ2_0: (64,),
    Type.IQ1_S: (0,),
    Type.IQ2_XXS: (0,),
    Type.IQ2_XS: (0,),
    Type.IQ2_S: (0,),
    Type.IQ3_XXS: (0,),
    Type.IQ3_S: (0,),
    Type.IQ4_NL: (0,),
    Type.IQ4_XS: (0,),
}
MADE_UP = (*SCALES, Type.IQ1_M, Type.NVFP4)


def random_blocks(
    kind: Type, rows: int, columns: int, rng: np.random.Generator
) -> NDArray[np.uint8]:
    """Any block whose scales are numbers, as no writer in Python makes them."""
    size, num_bytes = GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (rows * columns // size, num_bytes), np.uint8)
    scales = rng.normal(0, 0.01, (len(blocks), 2)).astype(np.float16)
    if kind is Type.NVFP4:
        # Four bytes with three bits behind the point, and no sign.
        blocks[:, :4] = rng.integers(8, 48, (len(blocks), 4))
    elif kind is Type.IQ1_M:
        # The scale's nibbles, the lowest first, are the highest of four words at the end.
        bits = scales[:, :1].view(np.uint16)
        nibbles = (bits >> np.array([0, 4, 8, 12], np.uint16) & 15).astype(np.uint8)
        blocks[:, 49::2] = blocks[:, 49::2] & 15 | nibbles << 4
    else:
        for number, at in enumerate(SCALES[kind]):
            blocks[:, at : at + 2] = scales[:, number : number + 1].view(np.uint8)
    return blocks.reshape(rows, -1)


def interleaved(rows: Values, num_heads: int) -> Values:
    """As the converter writes q and k of Llama."""
    halves = rows.reshape(num_heads, 2, len(rows) // num_heads // 2, -1)
    return halves.swapaxes(1, 2).reshape(rows.shape)


def parted(rows: Values, num_heads: int) -> Values:
    """What was interleaved, as it was."""
    pairs = rows.reshape(num_heads, len(rows) // num_heads // 2, 2, -1)
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def shape_of(base: BaseModel, module: str) -> LinearShape:
    match module:
        case "embed_tokens":
            return embedding_shape(base)
        case "lm_head":
            return head_shape(base)
    return base.linear(module)


def plain_name(module: str, factor: str) -> str:
    """PEFT's name of a factor, of the first layer where it is a layer's."""
    match module:
        case "embed_tokens":
            return f"base_model.model.model.embed_tokens.{factor.replace('_', '_embedding_')}"
        case "lm_head":
            return f"base_model.model.lm_head.{factor}.weight"
    return tensor_name(0, module, factor)


class Written:
    """A GGUF adapter in ``path``, and as a PEFT adapter the values that it stands for."""

    def __init__(
        self,
        path: Path,
        base: BaseModel,
        kinds: Callable[[], Type],
        rank: int = RANK,
        change: Callable[[GGUFWriter], None] = lambda writer: None,
        drop: str = "",
        names: dict[str, str] = NAMES,
        alpha: float | None = ALPHA,
    ) -> None:
        rng = np.random.default_rng(3)
        architecture = "llama" if base.architecture == "LlamaForCausalLM" else "qwen2"
        writer = GGUFWriter(path, architecture)
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        if alpha is not None:
            writer.add_float32("adapter.lora.alpha", alpha)
        change(writer)
        self.path, self.plain = path, {}
        for module, name in names.items():
            shape = shape_of(base, module)
            heads = {"q_proj": base.num_heads, "k_proj": base.num_kv_heads}.get(module)
            for factor, size in (
                ("lora_A", (rank, shape.in_features)),
                ("lora_B", (shape.out_features, rank)),
            ):
                kind = kinds()
                is_across = (module, factor) == (EMBED_MODULE, "lora_A")
                size = size[::-1] if is_across else size
                values = rng.standard_normal(size, np.float32)
                takes_turns = architecture == "llama" and factor == "lora_B"
                if takes_turns and heads is not None:
                    values = interleaved(values, heads)
                stored = (
                    random_blocks(kind, *size, rng) if kind in MADE_UP else quantize(values, kind)
                )
                prefix = "" if module in (EMBED_MODULE, HEAD_MODULE) else "blk.0."
                full = f"{prefix}{name}.weight.{factor.lower()}"
                if full != drop:
                    writer.add_tensor(full, stored, raw_dtype=kind)
                stands_for = dequantize(stored, kind).reshape(size).astype(np.float32)
                if takes_turns and heads is not None:
                    stands_for = parted(stands_for, heads)
                if is_across:
                    stands_for = np.ascontiguousarray(stands_for.T)
                self.plain[plain_name(module, factor)] = StoredTensor.of(stands_for)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        make_old(path.parent)
