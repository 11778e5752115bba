"""Adapters by name: what clients may ask for, and how a name becomes an inspected adapter.

| a name is   | a request for it                                                             |
|-------------|------------------------------------------------------------------------------|
| ready       | goes to the step thread at once                                              |
| registered  | (by an earlier engine of this server) is inspected first, once for everybody |
| found       | in ``--lora-dir``: it is registered and inspected first, once for everybody  |
| none of it  | is answered with ``AdapterNotFound``                                         |
"""

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping

import msgspec

from engine.commands import AddAdapter, Command, PrefetchAdapters, RemoveAdapter
from engine.config import StartAdapter
from engine.loader_link import LoaderLink
from engine.registry import RegisteredAdapter, Registry, Reservation
from ipc.errors import (
    AdapterInvalid,
    AdapterNotFound,
    ErrorInfo,
    InvalidRequest,
    SidestreamError,
    error_from_info,
)
from ipc.messages import (
    MAX_PREFETCH_HINTS,
    AdapterId,
    AdapterStatus,
    CallId,
    EngineToLoader,
    FolderNames,
    Forget,
    HostImage,
    HostTierChanged,
    Inspect,
    Inspected,
    InspectFolder,
    ListFolder,
    Manifest,
    Residency,
)
from ipc.remote_path import is_remote

logger = logging.getLogger(__name__)


class AdapterDirectory:
    """Joins the registry, the loader's inspections and the step thread's residency.

    Used on the I/O thread alone.
    """

    def __init__(
        self,
        registry: Registry,
        link: LoaderLink,
        submit: Callable[[Command], None],
        has_folder: bool,
        timeout_s: float,
        fetch_timeout_s: float,
    ) -> None:
        self._registry = registry
        self._link = link
        self._submit = submit
        self._has_folder = has_folder
        self._timeout_s = timeout_s
        self._fetch_timeout_s = fetch_timeout_s
        self._loop = asyncio.get_running_loop()
        self._resolving: dict[str, asyncio.Task[AdapterId]] = {}
        self._in_host_tier: set[AdapterId] = set()

    # --- For requests -----------------------------------------------------------------------

    def find(self, name: str) -> AdapterId | None:
        """The adapter that is ready under this name; None if ``resolve`` has to be awaited.

        Raises:
            AdapterNotFound: nothing has this name.
        """
        adapter = self._registry.find(name)
        if adapter is None:
            if not self._has_folder:
                self._registry.get(name)
            return None
        return adapter.adapter_id if adapter.manifest is not None else None

    async def resolve(self, name: str) -> AdapterId:
        """The adapter of this name, inspected now if it has not been.

        Raises:
            SidestreamError: it does not exist, can not be served, or the loader stays away.
        """
        task = self._resolving.get(name)
        if task is None:
            task = self._loop.create_task(self._inspect_by_name(name))
            self._resolving[name] = task
            task.add_done_callback(lambda _: self._resolving.pop(name, None))
        # One caller that goes away must not end the inspection for all others.
        return await asyncio.shield(task)

    async def _inspect_by_name(self, name: str) -> AdapterId:
        adapter = self._registry.find(name)
        if adapter is None:
            reservation = self._registry.reserve(name, name, persistent=False)
            registered = await self._register(
                reservation,
                lambda call_id: InspectFolder(call_id, reservation.adapter_id, name),
                replaces=None,
            )
            return registered.adapter_id
        if adapter.manifest is not None:
            return adapter.adapter_id
        manifest = await self._inspect(
            lambda call_id: Inspect(call_id, adapter.adapter_id, adapter.path), adapter.path
        )
        await self._add(adapter.adapter_id, manifest, adapter.pinned, replaces=None)
        attached = self._registry.attach(adapter, manifest)
        if attached is None:
            self._submit(RemoveAdapter(adapter.adapter_id))
            raise AdapterNotFound(f"adapter {name!r} was unloaded", param="model")
        return attached.adapter_id

    # --- For those who manage adapters ------------------------------------------------------

    async def load(self, name: str, path: str, pinned: bool, replace: bool) -> AdapterStatus:
        """Registers an adapter; with ``replace``, the one of that name serves until then.

        Raises:
            SidestreamError: why it can not be served; nothing has changed.
        """
        reservation = self._registry.reserve(name, path, pinned=pinned, replace=replace)
        present = self._registry.find(name)
        adapter = await self._register(
            reservation,
            lambda call_id: Inspect(call_id, reservation.adapter_id, path),
            replaces=None if present is None else present.adapter_id,
        )
        return self._status(adapter, Residency.DISK)

    def unload(self, name: str) -> None:
        """No later request finds the adapter; accepted ones are served to their end.

        Raises:
            AdapterNotFound: nothing has this name.
        """
        adapter = self._registry.remove(name)
        if adapter.manifest is not None:
            self._submit(RemoveAdapter(adapter.adapter_id))
        logger.info("adapter %d (%s) is unloaded", adapter.adapter_id, name)

    async def prefetch(self, names: list[str]) -> list[RegisteredAdapter]:
        """Hints at adapters that are likely to be asked for; each once, in the order of ``names``.

        Raises:
            InvalidRequest: more names than there are hints.
            AdapterNotFound: nothing has some of the names, and which; nothing was hinted at.
            SidestreamError: one of them can not be served, and which; nothing was hinted at.
        """
        names = list(dict.fromkeys(names))
        if len(names) > MAX_PREFETCH_HINTS:
            raise InvalidRequest(
                f"expected at most {MAX_PREFETCH_HINTS} adapters, got {len(names)}",
                param="names",
            )
        await self._check_known(names)
        await asyncio.gather(*map(self._resolve_named, names))
        found = {name: self._registry.find(name) for name in names}
        if None in found.values():
            raise _not_found([name for name, adapter in found.items() if adapter is None])
        adapters = [adapter for adapter in found.values() if adapter is not None]
        self._submit(PrefetchAdapters(tuple(adapter.adapter_id for adapter in adapters)))
        return adapters

    async def _check_known(self, names: list[str]) -> None:
        unknown = [name for name in names if self._registry.find(name) is None]
        if unknown and self._has_folder:
            in_folder = set(await self._list_folder())
            unknown = [name for name in unknown if name not in in_folder]
        if unknown:
            raise _not_found(unknown)

    async def _resolve_named(self, name: str) -> None:
        try:
            await self.resolve(name)
        except SidestreamError as error:
            raise _about(name, error) from error

    async def load_at_start(self, adapters: tuple[StartAdapter, ...]) -> None:
        """Registers the command line's adapters, in place of the catalog's of the same name.

        Raises:
            SidestreamError: one of them can not be served, and which.
        """
        await asyncio.gather(*map(self._load_one_at_start, adapters))

    async def _load_one_at_start(self, adapter: StartAdapter) -> None:
        try:
            await self.load(adapter.name, adapter.path, adapter.pinned, replace=True)
        except SidestreamError as error:
            raise _about(adapter.name, error) from error

    async def take_up_catalog(self) -> None:
        """Inspects what an earlier engine had registered; failures are logged, and met again by
        the requests that ask for the adapter."""
        for adapter in self._registry.adapters():
            if adapter.manifest is None:
                try:
                    await self.resolve(adapter.name)
                except SidestreamError as error:
                    logger.warning("adapter %d can not be served: %s", adapter.adapter_id, error)

    async def folder_names(self) -> list[str]:
        """Names in ``--lora-dir`` that nobody has asked for yet, sorted.

        Without a loader there is nobody to look, and a list must not wait for one: empty.
        """
        if not self._has_folder or not self._link.connected:
            return []
        return [name for name in await self._list_folder() if self._registry.find(name) is None]

    async def _list_folder(self) -> list[str]:
        answer = await self._link.call(ListFolder, self._timeout_s)
        assert isinstance(answer, FolderNames)
        return answer.names

    def statuses(
        self,
        tiers: Mapping[AdapterId, Residency],
        adapters: Iterable[RegisteredAdapter] | None = None,
    ) -> list[AdapterStatus]:
        """Of these adapters; None: of every registered one, in order of name."""
        if adapters is None:
            adapters = self._registry.adapters()
        return [
            self._status(adapter, tiers.get(adapter.adapter_id, Residency.DISK))
            for adapter in adapters
        ]

    def host_images(self) -> list[HostImage]:
        """What the loader keeps in host memory of the registered adapters, the largest first."""
        images = [
            HostImage(adapter.adapter_id, adapter.manifest.image_bytes)
            for adapter in self._registry.adapters()
            if adapter.manifest is not None and adapter.adapter_id in self._in_host_tier
        ]
        return sorted(images, key=lambda image: -image.num_bytes)

    def names(self, adapter_ids: Collection[AdapterId]) -> dict[AdapterId, str]:
        """The names of those that are registered."""
        return {
            adapter.adapter_id: adapter.name
            for adapter in self._registry.adapters()
            if adapter.adapter_id in adapter_ids
        }

    def load_failed(self, adapter_id: AdapterId, error: SidestreamError) -> None:
        """Forgets a folder's adapter whose files have changed: its next request looks anew.

        A registered one stays as it is until it is loaded again, because its path and its name
        are somebody's decision.
        """
        if not isinstance(error, AdapterInvalid):
            return
        for adapter in self._registry.adapters():
            if adapter.adapter_id == adapter_id and not adapter.persistent:
                self.unload(adapter.name)

    def host_tier_changed(self, change: HostTierChanged) -> None:
        """What the loader keeps in host memory."""
        self._in_host_tier.difference_update(change.removed)
        self._in_host_tier.update(change.added)

    def loader_lost(self) -> None:
        """The host tier went with the loader."""
        self._in_host_tier.clear()

    # --- Within -----------------------------------------------------------------------------

    async def _register(
        self,
        reservation: Reservation,
        make: Callable[[CallId], EngineToLoader],
        replaces: AdapterId | None,
    ) -> RegisteredAdapter:
        try:
            manifest = await self._inspect(make, reservation.path)
            await self._add(reservation.adapter_id, manifest, reservation.pinned, replaces)
            try:
                adapter, replaced = self._registry.confirm(reservation, manifest, int(time.time()))
            except SidestreamError:
                self._submit(RemoveAdapter(reservation.adapter_id))
                raise
        except BaseException:
            self._registry.cancel(reservation)
            # It may have fetched files, for nobody.
            self._link.send(Forget(reservation.adapter_id))
            raise
        if replaced is not None and replaced.manifest is not None:
            self._submit(RemoveAdapter(replaced.adapter_id))
        logger.info(
            "adapter %d (%s) is registered: rank %d, %d bytes",
            adapter.adapter_id,
            adapter.name,
            manifest.max_rank,
            manifest.image_bytes,
        )
        return adapter

    async def _inspect(self, make: Callable[[CallId], EngineToLoader], path: str) -> Manifest:
        timeout_s = self._timeout_s + (self._fetch_timeout_s if is_remote(path) else 0.0)
        answer = await self._link.call(make, timeout_s)
        assert isinstance(answer, Inspected)
        return answer.manifest

    async def _add(
        self, adapter_id: AdapterId, manifest: Manifest, pinned: bool, replaces: AdapterId | None
    ) -> None:
        """Has the step thread accept the adapter. Raises what it refuses with."""
        answered: asyncio.Future[ErrorInfo | None] = self._loop.create_future()

        def answer(error: ErrorInfo | None) -> None:
            self._loop.call_soon_threadsafe(answered.set_result, error)

        self._submit(AddAdapter(adapter_id, manifest, pinned, replaces, answer))
        # Shielded, so that the adapter's fate is known even if the caller goes away.
        error = await asyncio.shield(answered)
        if error is not None:
            raise error_from_info(error)

    def _status(self, adapter: RegisteredAdapter, tier: Residency) -> AdapterStatus:
        if tier is Residency.DISK and adapter.adapter_id in self._in_host_tier:
            tier = Residency.HOST
        manifest = adapter.manifest
        return AdapterStatus(
            name=adapter.name,
            path=adapter.path,
            adapter_id=adapter.adapter_id,
            pinned=adapter.pinned,
            residency=tier,
            image_bytes=0 if manifest is None else manifest.image_bytes,
            max_rank=0 if manifest is None else manifest.max_rank,
            created_s=adapter.created_s,
        )


def _not_found(names: list[str]) -> AdapterNotFound:
    return AdapterNotFound(f"no adapter is called {', '.join(map(repr, names))}", param="names")


def _about(name: str, error: SidestreamError) -> SidestreamError:
    """The same error, its message naming the adapter."""
    named = f"adapter {name!r}: {error.message}"
    return error_from_info(msgspec.structs.replace(error.info, message=named))
