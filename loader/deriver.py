"""Opens adapters as the inspector does, and completes them by what no file of theirs holds.

Row scales take a pass over the base model's weights: seconds to minutes of all cores. So they are
computed only once an adapter is wanted, apart from all reading, and kept on disk. Biases alone are
computed while the files are opened.
"""

import hashlib
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import msgspec

from ipc.errors import AdapterInvalid, Cancelled, Unavailable
from ipc.image import EntryKind
from ipc.messages import AdapterSource, FileIdentity, Generation, Manifest
from loader.base_copies import check_copies
from loader.base_weights import BaseWeights
from loader.derivation import FORMULA, derive_bias, derive_row_scales
from loader.derived_store import DerivedStore
from loader.floats import Floats
from loader.inspector import Inspector, OpenAdapter
from loader.load_trace import LoadTrace
from loader.plan import AdapterPlan, Derived, LinearDerivation
from loader.row_scale_threads import RowScaleThreads
from loader.shared_blocks import BlockReader

logger = logging.getLogger(__name__)

# What was computed of adapters that were given up, so that to ask again goes on from there: a load
# that times out, and is tried again, comes to its end.
_NUM_UNFINISHED = 4


class Deriver:
    """Completes one base model's adapters. Safe to use from many threads.

    ``model`` is the folder of the base model's weights, None where there are none, and
    ``base_files`` are those that its engine has read, None if that is not known.
    ``before_linear`` is called on the computing thread before each linear, with its path.
    """

    def __init__(
        self,
        inspector: Inspector,
        model: str | None,
        store: DerivedStore,
        num_threads: int,
        trace: LoadTrace,
        base_files: tuple[FileIdentity, ...] | None = None,
        before_linear: Callable[[str], None] | None = None,
    ) -> None:
        self._inspector = inspector
        self._base = inspector.base
        self._model = model
        self._store = store
        self._num_threads = num_threads
        self._trace = trace
        self._base_files = base_files
        self._before_linear = before_linear
        self._lock = threading.Lock()
        # By key, then by the linear's path.
        self._unfinished: OrderedDict[str, dict[str, Derived]] = OrderedDict()

    def check(self, manifest: Manifest) -> Manifest:
        """The manifest, of an adapter that can be completed.

        Raises:
            AdapterInvalid: the base model's weights are needed for it, and there are none; or a
                copy of one of them differs from it.
            SidestreamError: as ``Inspector.open``, or the base model can not be read.
        """
        if any(module.row_scale or module.bias for module in manifest.modules):
            self._weights_folder()
        # Copies may stand beside pairs of any modules, and no module of the manifest tells of them.
        self._check_copies(AdapterSource(manifest.path, manifest.generation))
        return manifest

    def open(self, source: AdapterSource) -> OpenAdapter:
        """As ``Inspector.open``; complete unless row scales have to be computed for it.

        Raises:
            SidestreamError: as ``Inspector.open``, or the base model can not be read.
        """
        with self._opened(source) as adapter:
            if adapter.is_complete:
                return adapter
            with self._open_weights() as weights:
                payload = self._find(source, adapter, weights)
            return adapter if payload is None else _completed(adapter, payload)

    def complete(self, source: AdapterSource, cancelled: threading.Event) -> OpenAdapter:
        """As ``open``, with all row scales: computed here unless that was done meanwhile.

        Raises:
            Cancelled: ``cancelled`` was set before the end.
            AdapterInvalid: a row scale would be infinite or not a number.
            SidestreamError: as ``open``.
        """
        if cancelled.is_set():
            raise _not_wanted()
        with self._opened(source) as adapter, self._open_weights() as weights:
            payload = self._find(source, adapter, weights)
            if payload is None:
                payload = self._compute(source, adapter, weights, cancelled)
            return _completed(adapter, payload)

    def _check_copies(self, source: AdapterSource) -> None:
        with self._opened(source) as adapter:
            if adapter.plan.copies:
                with self._open_weights() as weights:
                    check_copies(adapter.plan.copies, adapter.files.fds, self._base, weights)
                    weights.check_unchanged()
                adapter.files.check_unchanged()
            adapter.files.close()

    @contextmanager
    def _opened(self, source: AdapterSource) -> Iterator[OpenAdapter]:
        """The adapter, whose files are closed if the block fails."""
        adapter = self._inspector.open(source)
        try:
            yield adapter
        except OSError as error:
            adapter.files.close()
            raise AdapterInvalid(f"can not read {source.path}: {error.strerror}") from error
        except BaseException:
            adapter.files.close()
            raise

    @contextmanager
    def _open_weights(self) -> Iterator[BaseWeights]:
        folder = self._weights_folder()
        weights = BaseWeights(folder, self._base.dtype)
        try:
            if self._base_files not in (None, weights.identities):
                raise Unavailable(
                    f"the base model's files in {folder} are not those that the engine has read:"
                    " they have changed since, and what is computed of them would not fit; start"
                    " the server again"
                )
            yield weights
        finally:
            weights.close()

    def _weights_folder(self) -> str:
        if self._model is None:
            raise AdapterInvalid(
                "the adapter has DoRA, trained biases or copies of the base model's weights: these"
                " take the base model's own weights, of which there are none with --load-format"
                " dummy"
            )
        return self._model

    def _find(
        self, source: AdapterSource, adapter: OpenAdapter, weights: BaseWeights
    ) -> bytes | None:
        """The derived values that were kept, or take no row scale."""
        plan = adapter.plan
        if not any(derivation.scales_rows for derivation in plan.derivations):
            return _payload(
                plan,
                {
                    (each.stage, each.module, EntryKind.BIAS): derive_bias(
                        each, None, adapter, self._base, weights
                    )
                    for each in plan.derivations
                },
            )
        num_bytes = sum(tensor.file_bytes for tensor in plan.tensors if tensor.is_derived)
        return self._store.find(self._key(source.generation, plan, weights), num_bytes)

    def _compute(
        self,
        source: AdapterSource,
        adapter: OpenAdapter,
        weights: BaseWeights,
        cancelled: threading.Event,
    ) -> bytes:
        plan, number = adapter.plan, source.generation.counter
        key = self._key(source.generation, plan, weights)
        done = self._take_unfinished(key)
        total = len(plan.derivations)
        logger.info("adapter %d: computing the row scales of %d linears", number, total - len(done))
        began_s = time.monotonic()

        def check() -> None:
            if cancelled.is_set():
                raise _not_wanted()

        def derive(each: LinearDerivation, reader: BlockReader) -> Derived:
            if self._before_linear is not None:
                self._before_linear(each.path)
            scales = None
            derived: dict[tuple[int, str, EntryKind], Floats] = {}
            if each.scales_rows:
                scales = derive_row_scales(
                    each, adapter, source.generation, self._base, weights, reader, check
                )
                derived[each.stage, each.module, EntryKind.ROW_SCALE] = scales
            if each.adds_bias:
                bias = derive_bias(each, scales, adapter, self._base, weights)
                derived[each.stage, each.module, EntryKind.BIAS] = bias
            return derived

        try:
            RowScaleThreads(plan.derivations, derive, done).run(self._num_threads)
        except Cancelled:
            adapter.files.check_unchanged()
            weights.check_unchanged()
            self._keep_unfinished(key, done)
            logger.info(
                "adapter %d: its row scales are not wanted now; %d of %d linears are done",
                number,
                len(done),
                total,
            )
            raise
        # Of what has changed meanwhile nothing may be kept.
        adapter.files.check_unchanged()
        weights.check_unchanged()
        ended_s = time.monotonic()
        self._trace.derived(source.path, number, began_s, ended_s)
        logger.info("adapter %d: its row scales took %.1f s", number, ended_s - began_s)
        payload = _payload(
            plan, {at: values for each in done.values() for at, values in each.items()}
        )
        self._store.keep(key, payload)
        return payload

    def _key(self, generation: Generation, plan: AdapterPlan, weights: BaseWeights) -> str:
        """A hash of all that derived values depend on."""
        facts = (
            FORMULA,
            self._base,
            weights.identities,
            generation.files,
            generation.digest,
            plan.modules,
        )
        return hashlib.blake2b(msgspec.msgpack.encode(facts), digest_size=24).hexdigest()

    def _take_unfinished(self, key: str) -> dict[str, Derived]:
        with self._lock:
            return self._unfinished.pop(key, {})

    def _keep_unfinished(self, key: str, done: dict[str, Derived]) -> None:
        with self._lock:
            self._unfinished[key] = done
            while len(self._unfinished) > _NUM_UNFINISHED:
                self._unfinished.popitem(last=False)


def _payload(plan: AdapterPlan, derived: Derived) -> bytes:
    """The file of derived values that the plan tells of."""
    return b"".join(
        derived[tensor.stage, tensor.entry.module, tensor.entry.kind].tobytes()
        for tensor in plan.tensors
        if tensor.is_derived
    )


def _completed(adapter: OpenAdapter, payload: bytes) -> OpenAdapter:
    adapter.files.append("derived", payload)
    return replace(adapter, is_complete=True)


def _not_wanted() -> Cancelled:
    return Cancelled("the adapter's row scales are not wanted any more")
