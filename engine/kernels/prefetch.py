"""Reads in advance: of what a program will need once the launch before it has ended."""

import triton
import triton.language as tl

LINE_BYTES = tl.constexpr(128)


@triton.jit
def prefetch_lines(ptrs):
    """Has the cache line of each pointer brought into the second-level cache, and waits for none.

    That cache is the one that all of a GPU shares: what is stored there meanwhile is not missed.
    Triton's interpreter has no such thing.
    """
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [ptrs.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
