"""Launches of Triton kernels that cost the host little.

Triton's own launch looks at its knobs, binds and specializes all arguments anew and compares a
string of all options, each time: some 30 us. A prefill gives hundreds of launches to the device one
by one, so what they cost the host is what a short prompt waits for. Here a kernel that was compiled
once is found by what Triton's specialization can depend on, and launched as compiled.

What is in the key, never less than what Triton looks at:

| argument          | by                                                                         |
|-------------------|----------------------------------------------------------------------------|
| constant, option  | its value                                                                  |
| tensor            | dtype, device; whether its address is a multiple of 16                     |
| tensor descriptor | dtype, block shape                                                         |
| integer           | whether it is 1, whether a multiple of 16, whether it fits into 32 bits    |
| anything else     | its type; None and bools by value                                          |

Source: ``triton.runtime.jit`` (``create_function_from_signature``); launching a compiled kernel by
``compiled[grid](*arguments)`` is what Triton's tutorial on fused softmax does.
"""

from collections.abc import Hashable
from typing import Any

import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

Grid = tuple[int] | tuple[int, int] | tuple[int, int, int]

_ALIGNMENT = 16
# By key: the compiled kernel, and those of its parameters that are constants, in order.
_compiled: dict[Hashable, tuple[Any, tuple[str, ...]]] = {}


def launch(kernel: Any, grid: Grid, *arguments: Any, **constants: Any) -> None:
    """As ``kernel[grid](*arguments, **constants)``, on the current device and stream.

    ``arguments`` are all that are not constants, in the order of the kernel's parameters, of which
    the constants are the last; ``constants`` are these, and options as ``num_warps``.
    """
    if not isinstance(kernel, triton.JITFunction):
        # Triton's interpreter.
        kernel[grid](*arguments, **constants)
        return
    key = (
        id(kernel),
        tuple(constants.items()),
        tuple([kind_of(argument) for argument in arguments]),
    )
    found = _compiled.get(key)
    if found is None:
        compiled = kernel[grid](*arguments, **constants)
        # A hook of Triton's may have taken it.
        if compiled is not None:
            _compiled[key] = compiled, tuple(kernel.arg_names[len(arguments) :])
        return
    compiled, names = found
    compiled[(*grid, 1, 1)[:3]](*arguments, *[constants[name] for name in names])


def kind_of(argument: Any) -> Hashable:
    """What a kernel may have been compiled for: arguments of one kind can share it."""
    kind = type(argument)
    if kind is int:
        return argument == 1, argument % _ALIGNMENT == 0, -(1 << 31) <= argument < 1 << 31
    if isinstance(argument, Tensor):
        return argument.dtype, argument.get_device(), argument.data_ptr() % _ALIGNMENT == 0
    if kind is TensorDescriptor:
        aligned = argument.base.data_ptr() % _ALIGNMENT == 0
        return argument.base.dtype, tuple(argument.block_shape), aligned
    return argument if kind is bool or argument is None else kind.__name__
