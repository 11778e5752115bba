"""Compiles functions that run without the GIL, and keeps their machine code for the next start.

Compiling takes more than a second, loading what was kept a tenth of that, and importing numba as
long again: what has to be there when the loader gets ready imports neither this nor its users.
"""

import logging
import time
from collections.abc import Callable
from importlib import import_module
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from loader.native.code_folder import writable_code_folder

# Numba has types in some versions only. This is the one module that imports it.
numba: Any = import_module("numba")
llvm_ir: Any = import_module("llvmlite.ir")
llvm: Any = import_module("llvmlite.binding")
intrinsic: Any = import_module("numba.extending").intrinsic
ExternalFunction: Any = numba.types.ExternalFunction
Pointer: Any = numba.types.CPointer

Function = TypeVar("Function", bound=Callable[..., Any])
Code = TypeVar("Code")

logger = logging.getLogger(__name__)

INTEGER: Any = numba.int64


class Converter(Protocol):
    """Machine code with the parameters ``(source, target, num_values)``; returns a ``Fault``."""

    @property
    def address(self) -> int: ...


def compiled(returned: Any, *arguments: Any) -> Callable[[Function], Function]:
    """Compiles a function where it is defined, for these types; it must not raise."""

    def compile_now(function: Function) -> Function:
        def attempt(**options: bool) -> Function:
            decorate = numba.njit(returned(*arguments), nogil=True, error_model="numpy", **options)
            result: Function = decorate(function)
            return result

        return _compile_or_load(attempt)

    return compile_now


def inlined(function: Function) -> Function:
    """A function that becomes part of the ``compiled`` ones that call it."""
    decorate = numba.njit(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)
    result: Function = decorate(function)
    return result


def converter(
    source: type[np.generic], target: type[np.generic]
) -> Callable[[Callable[..., int]], Converter]:
    """Compiles a converter where it is defined; its source and target are pointers to these types.

    Its code is called by address, because numba would compile the function again as a part of
    every one that calls it. Source and target may be one.
    """

    def compile_now(function: Callable[..., int]) -> Converter:
        pointers = [Pointer(numba.from_dtype(np.dtype(dtype))) for dtype in (source, target)]

        def attempt(**options: bool) -> Converter:
            decorate = numba.cfunc(INTEGER(*pointers, INTEGER), error_model="numpy", **options)
            result: Converter = decorate(function)
            return result

        return _compile_or_load(attempt)

    return compile_now


def array(dtype: np.dtype[Any]) -> Any:
    """The type of a contiguous array of one dimension, for ``compiled``."""
    return numba.from_dtype(dtype)[::1]


def integers(count: int) -> Any:
    """The type of a tuple of integers, for ``compiled``."""
    return numba.types.UniTuple(INTEGER, count)


def _compile_or_load(attempt: Callable[..., Code]) -> Code:
    if numba.config.CACHE_DIR:
        try:
            return attempt(cache=True)
        except Exception as error:
            # A full disk, or a file that a crash left half written, must not keep adapters from
            # being read. What is wrong with the function itself comes up again below.
            logger.warning("machine code can be neither kept nor loaded: %s", error)
    return attempt()


def _describe_compiler() -> str:
    features = llvm.get_host_cpu_features().flatten()
    return f"{numba.__version__} {llvm.get_host_cpu_name()} {features}"


numba.config.CACHE_DIR = str(writable_code_folder(_describe_compiler()) or "")


# --- What compiled functions may call ---------------------------------------------------------
# By name: numba does not keep code that holds an address, as it would of a ctypes function.

pread: Callable[[int, int, int, int], int] = ExternalFunction(
    "pread", INTEGER(numba.int32, INTEGER, INTEGER, INTEGER)
)
"""``(fd, address, num_bytes, offset)``: how many bytes were read, or -1."""

memcpy: Callable[[int, int, int], int] = ExternalFunction(
    "memcpy", INTEGER(INTEGER, INTEGER, INTEGER)
)
"""``(target address, source address, num_bytes)``"""

memset: Callable[[int, int, int], int] = ExternalFunction(
    "memset", INTEGER(INTEGER, numba.int32, INTEGER)
)
"""``(address, byte, num_bytes)``"""

signal_event: Callable[[int, int], int] = ExternalFunction(
    "eventfd_write", numba.int32(numba.int32, numba.uint64)
)
"""``(event's descriptor, count)``: wakes whoever reads it; 0, or -1."""

clock_gettime: Callable[[int, int], int] = ExternalFunction(
    "clock_gettime", numba.int32(numba.int32, INTEGER)
)
"""``(clock, address)``: writes ``CLOCK_BYTES``, seconds and nanoseconds, int64 each; 0, or -1."""

CLOCK_BYTES = 16
CLOCK_MONOTONIC = time.CLOCK_MONOTONIC

error_number: Callable[[], list[int]] = ExternalFunction("__errno_location", Pointer(numba.int32)())
"""``()[0]``: why the calling thread's last call of the system failed."""


def _call(
    typing_context: Any, address: Any, source: Any, target: Any, num_values: Any
) -> tuple[Any, Callable[..., Any]]:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = llvm_ir.IntType(64)
        function = llvm_ir.FunctionType(word, [word] * 3)
        return builder.call(
            builder.inttoptr(arguments[0], function.as_pointer()), list(arguments[1:])
        )

    return INTEGER(INTEGER, INTEGER, INTEGER, INTEGER), generate


call: Callable[[int, int, int, int], int] = intrinsic(_call)
"""``(address of a converter, source address, target address, num_values)``: its ``Fault``."""


# --- Words that threads share -----------------------------------------------------------------
# Of 64 bits and aligned. What a thread wrote before it stored a word is seen by whoever loads that
# value: machines without that order of their own (x86 has it) get the instructions for it.

_WORD: Any = llvm_ir.IntType(64)


def _fetch_add(typing_context: Any, address: Any, count: Any) -> tuple[Any, Callable[..., Any]]:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = builder.inttoptr(arguments[0], _WORD.as_pointer())
        return builder.atomic_rmw("add", word, arguments[1], "acq_rel")

    return INTEGER(INTEGER, INTEGER), generate


def _load(typing_context: Any, address: Any) -> tuple[Any, Callable[..., Any]]:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = builder.inttoptr(arguments[0], _WORD.as_pointer())
        return builder.load_atomic(word, "acquire", 8)

    return INTEGER(INTEGER), generate


def _store(typing_context: Any, address: Any, value: Any) -> tuple[Any, Callable[..., Any]]:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = builder.inttoptr(arguments[0], _WORD.as_pointer())
        builder.store_atomic(arguments[1], word, "release", 8)
        return context.get_dummy_value()

    return numba.void(INTEGER, INTEGER), generate


def _floats(typing_context: Any, address: Any) -> tuple[Any, Callable[..., Any]]:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], llvm_ir.FloatType().as_pointer())

    return Pointer(numba.float32)(INTEGER), generate


floats: Callable[[int], NDArray[np.float32]] = intrinsic(_floats)
"""``(address)``: a pointer to what lies there in float32."""

fetch_add: Callable[[int, int], int] = intrinsic(_fetch_add)
"""``(address, count)``: adds to the word, in one step; what it was before."""

load: Callable[[int], int] = intrinsic(_load)
"""``(address)``: the word, and with it all that was written before it was stored."""

store: Callable[[int, int], None] = intrinsic(_store)
"""``(address, value)``: publishes the word, and all that was written before."""
