"""Computes an adapter's row scales linear by linear, on threads that step back for all others."""

import logging
import os
import threading
from collections.abc import Callable, Sequence

from ipc.errors import AdapterInvalid, Internal, SidestreamError
from loader.plan import Derived, LinearDerivation
from loader.shared_blocks import BlockReader

logger = logging.getLogger(__name__)

# Above the process's own: less urgent than reading, which is at 10.
_NICENESS = 19

DeriveLinear = Callable[[LinearDerivation, BlockReader], Derived]


class RowScaleThreads:
    """Threads for one adapter, which end with it. They are daemons: a hung disk ends with us.

    Each takes the next of ``derivations`` that nobody has taken; ``derive`` makes its entries. What
    is ``done``, by the linear's path, is left out, and grows.
    """

    def __init__(
        self,
        derivations: Sequence[LinearDerivation],
        derive: DeriveLinear,
        done: dict[str, Derived],
    ) -> None:
        self._remaining = [each for each in reversed(derivations) if each.path not in done]
        self._derive = derive
        self._done = done
        self._lock = threading.Lock()
        self._error: SidestreamError | None = None

    def run(self, num_threads: int) -> None:
        """Returns once all is done.

        Raises:
            SidestreamError: the first error of a linear; none is begun after it.
        """
        threads = [
            threading.Thread(target=self._run, name=f"row-scales-{index}", daemon=True)
            for index in range(min(num_threads, len(self._remaining)))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        # Linux keeps a niceness for each thread.
        os.nice(_NICENESS)
        reader = BlockReader()
        while (derivation := self._take()) is not None:
            try:
                derived = self._derive(derivation, reader)
            except SidestreamError as error:
                self._fail(error)
            except OSError as error:
                self._fail(AdapterInvalid(f"can not read {derivation.path}: {error.strerror}"))
            except Exception as error:
                logger.exception("computing %s failed", derivation.path)
                self._fail(Internal(f"computing {derivation.path} failed: {error!r}"))
            else:
                with self._lock:
                    self._done[derivation.path] = derived

    def _take(self) -> LinearDerivation | None:
        with self._lock:
            if self._error is not None or not self._remaining:
                return None
            return self._remaining.pop()

    def _fail(self, error: SidestreamError) -> None:
        with self._lock:
            if self._error is None:
                self._error = error
