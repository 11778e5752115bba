"""What adapters add to a projection's output, as long as it is still apart from it."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Delta:
    """To be added to ``out`` by the launch that reads ``out`` next: ``round(out + values)``.

    | tensor        | shape, contiguous      | dtype | holds                                       |
    |---------------|------------------------|-------|---------------------------------------------|
    | `values`      | `[num_rows, out]`      | fp32  | deltas and biases of rows with an adapter   |
    | `has_adapter` | `[num_rows]`           | int32 | 0: the row has none, and its values are any |

    A row without an adapter keeps ``out`` as it is: nobody writes its values, which may be another
    projection's or not a number. Both tensors are valid until that launch and no longer. fp32, so
    that the sum is rounded once, as where the delta is added in place. ``overlaps`` says whether
    that launch may begin before those ahead of it are done, see ``engine.kernels.overlap``.
    """

    values: Tensor
    has_adapter: Tensor
    overlaps: bool = False

    def check(self, num_rows: int, width: int) -> None:
        """Asserts that it is for an output ``[num_rows, width]``."""
        assert self.values.shape == (num_rows, width), self.values.shape
        assert self.values.is_contiguous(), self.values.stride()
        assert self.values.dtype is torch.float32, self.values.dtype
        assert self.has_adapter.shape == (num_rows,), self.has_adapter.shape
        assert self.has_adapter.is_contiguous() and self.has_adapter.dtype is torch.int32

    def add_to(self, out: Tensor) -> Tensor:
        """``round(out + values)``, a new tensor of the shape and dtype of ``out``."""
        self.check(*out.shape)
        total = (out.float() + self.values).to(out.dtype)
        return torch.where(self.has_adapter.bool().unsqueeze(1), total, out)


@dataclass(frozen=True, slots=True)
class Projected:
    """A projection's output ``[num_rows, out]``, and what is still to be added to it, if any."""

    out: Tensor
    delta: Delta | None = None

    def total(self) -> Tensor:
        """The output with everything added."""
        return self.out if self.delta is None else self.delta.add_to(self.out)
