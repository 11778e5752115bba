"""What an adapter does to a linear's outputs besides its pair: scale them, add a bias.

``values`` are fp32, ``[..., COLUMNS]``: the columns from ``first_column`` on of a linear that has
``width`` of them. ``offset`` is the table's: where in the arena the linear's own values begin, or
-1 where it has none, which costs no more than the comparison.
"""

import triton
import triton.language as tl

# Columns and mask are made anew, though callers have the same: theirs would stay in registers from
# a program's start on, and there are none to spare.


@triton.jit
def scale_columns(values, row_scales_ptr, offset, first_column, width, COLUMNS: tl.constexpr):
    """``g ⊙ values``."""
    if offset >= 0:
        columns = tl.arange(0, COLUMNS)
        ptrs = row_scales_ptr + tl.multiple_of(offset, 32) + first_column + columns
        values *= tl.load(ptrs, mask=columns < width - first_column, other=0.0)
    return values


@triton.jit
def add_bias(values, arena_ptr, offset, first_column, width, COLUMNS: tl.constexpr):
    """``values + bias``."""
    if offset >= 0:
        columns = tl.arange(0, COLUMNS)
        ptrs = arena_ptr + tl.multiple_of(offset, 32) + first_column + columns
        bias = tl.load(ptrs, mask=columns < width - first_column, other=0.0)
        values += bias.to(tl.float32)
    return values
