"""Sums that several programs of a launch have each a part of, added up in a fixed order."""

import triton
import triton.language as tl


@triton.jit
def is_last_arrival(arrivals_ptr, num_splits):
    """Whether the others have stored their parts already: called once by each, behind its stores.

    The counter, zero before, is zero again afterwards.
    """
    tl.debug_barrier()
    is_last = tl.atomic_add(arrivals_ptr, 1) == num_splits - 1
    if is_last:
        tl.store(arrivals_ptr, 0)
    return is_last


@triton.jit
def load_part(ptrs, mask):
    """Another program's part, past the first-level cache, which knows nothing of its stores."""
    return tl.load(ptrs, mask=mask, other=0.0, cache_modifier=".cg")
