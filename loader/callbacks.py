"""Python that compiled code calls by address, on its thread, which takes the interpreter's lock."""

import ctypes
from collections.abc import Callable
from typing import Any

from loader.native.runs import Fault


class Callback:
    """``function`` at an ``address``, for as long as this lives; ``error`` is what it raised."""

    def __init__(self, function: Callable[[int, int, int], None]) -> None:
        self._function = function
        self.error: Exception | None = None
        # Of three numbers, as ``loader.native.compiler.call`` passes them; returns a ``Fault``.
        prototype = ctypes.CFUNCTYPE(*[ctypes.c_int64] * 4)
        self._entry: Any = prototype(self._call)
        address = ctypes.cast(self._entry, ctypes.c_void_p).value
        assert address is not None
        self.address = address

    def _call(self, first: int, second: int, third: int) -> int:
        try:
            self._function(first, second, third)
        except Exception as error:
            self.error = error
            return Fault.RAISED.value
        return Fault.NONE.value
