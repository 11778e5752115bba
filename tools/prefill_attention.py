"""Prefill attention on a GPU: torch's kernel and our own over the rate of a matrix product.

The heads are an 8B model's, laid out as its projections leave them. What is timed is a call with
the L2 cache cold, in the same run as a large matrix product of the same dtype.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from engine.kernels.causal_choice import CausalAttention
from engine.kernels.causal_hopper import CausalTuning, causal_hopper, has_causal_hopper
from engine.kernels.causal_varlen import causal_varlen
from engine.kernels.packed_sequences import PackedSequences

_NUM_HEADS = 32
_NUM_KV_HEADS = 8
_HEAD_DIM = 128
_DTYPE = torch.bfloat16
_PRODUCT_SIZE = 8192

CANDIDATES = (
    CausalTuning(64, 64, 4, 2),
    CausalTuning(64, 64, 4, 3),
    CausalTuning(64, 64, 4, 2, max_registers=168),
    CausalTuning(64, 64, 4, 1, max_registers=168),
    CausalTuning(64, 32, 4, 3, max_registers=168),
    CausalTuning(128, 64, 8, 2),
    CausalTuning(128, 64, 8, 3),
    CausalTuning(128, 128, 8, 2),
)

# The median seconds of a call.
Timer = Callable[[Callable[[], object]], float]


@dataclass(frozen=True, slots=True)
class PrefillShape:
    """``(queries, keys)`` of each sequence."""

    name: str
    chunks: tuple[tuple[int, int], ...]

    @property
    def num_flops(self) -> int:
        """Of two products over the pairs that are seen."""
        pairs = sum(n * (m - n) + n * (n + 1) // 2 for n, m in self.chunks)
        return 4 * pairs * _NUM_HEADS * _HEAD_DIM


SHAPES = (
    PrefillShape("8 x 2048", ((2048, 2048),) * 8),
    PrefillShape("1 x 1024", ((1024, 1024),)),
    PrefillShape("1 x 2048", ((2048, 2048),)),
    PrefillShape("1 x 8192", ((8192, 8192),)),
    PrefillShape("mixed", tuple((n, n) for n in (17, 3000, 256, 1, 900, 4100, 64, 1500))),
    PrefillShape("512 behind 7680", ((512, 8192),)),
)


class PrefillInputs:
    """Random heads of a shape, on the GPU."""

    def __init__(self, shape: PrefillShape) -> None:
        queries, keys = zip(*shape.chunks, strict=True)
        widths = (_NUM_HEADS, _NUM_KV_HEADS, _NUM_KV_HEADS)
        heads = torch.randn(max(sum(queries), sum(keys)), sum(widths), _HEAD_DIM, device="cuda")
        query, key, value = heads.to(_DTYPE).split_with_sizes(widths, dim=1)
        self._rows = query[: sum(queries)], key[: sum(keys)], value[: sum(keys)]
        self._sequences = PackedSequences(_starts(queries), _starts(keys), max(queries), max(keys))

    def attend(self, causal: CausalAttention) -> Tensor:
        return causal(*self._rows, self._sequences)


def _starts(counts: Sequence[int]) -> Tensor:
    ends = torch.tensor(counts, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return torch.nn.functional.pad(ends, (1, 0)).to("cuda")


def product_flops_per_s(seconds: Timer) -> float:
    left, right = torch.randn(2, _PRODUCT_SIZE, _PRODUCT_SIZE, device="cuda").to(_DTYPE)
    return float(2 * _PRODUCT_SIZE**3 / seconds(lambda: left @ right))


def measure_prefills(seconds: Timer, tunings: Sequence[CausalTuning]) -> list[dict[str, Any]]:
    """Every shape through torch's kernel and, where the GPU has it, ours with each of ``tunings``.

    ``difference`` is the largest of any value to torch's.
    """
    product = product_flops_per_s(seconds)
    has_ours = has_causal_hopper(torch.device("cuda"), _DTYPE, _HEAD_DIM)
    results = []
    for shape in SHAPES:
        inputs = PrefillInputs(shape)
        expected = inputs.attend(causal_varlen)
        choices: list[tuple[str, dict[str, Any], CausalAttention]] = [("torch", {}, causal_varlen)]
        if has_ours:
            choices += [
                ("ours", asdict(each), partial(causal_hopper, tuning=each)) for each in tunings
            ]
        for kernel, tuning, causal in choices:
            try:
                got = inputs.attend(causal)
            except triton.runtime.errors.OutOfResources as error:
                print(f"{tuning}: {error}", file=sys.stderr)
                continue
            taken = seconds(lambda inputs=inputs, causal=causal: inputs.attend(causal))  # type: ignore[misc]
            rate = shape.num_flops / taken
            results.append(
                {
                    "shape": shape.name,
                    "kernel": kernel,
                    "tuning": tuning,
                    "us_a_layer": taken * 1e6,
                    "tflops_per_s": rate / 1e12,
                    "over_product": rate / product,
                    "difference": float((got - expected).abs().max()),
                }
            )
    return results


def print_prefills(results: list[dict[str, Any]]) -> None:
    """One row a kernel and tuning, with what each shape reaches; differences last."""
    print(f"{'prefill, TFLOP/s (over a product)':<36}" + "".join(f"{s.name:>17}" for s in SHAPES))
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for result in results:
        settings = "/".join(str(value) for value in result["tuning"].values())
        rows.setdefault(f"{result['kernel']} {settings}", {})[result["shape"]] = result
    for name, row in rows.items():
        cells = "".join(
            f"{row[s.name]['tflops_per_s']:>10.0f} ({row[s.name]['over_product']:.2f})"
            if s.name in row
            else f"{'-':>17}"
            for s in SHAPES
        )
        difference = max(result["difference"] for result in row.values())
        print(f"{name:<36}{cells}  differs by {difference:.1e}")
