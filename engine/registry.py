"""Which adapters exist, by name, and the catalog that outlives the engine.

| name is    | meaning                                              | left by                     |
|------------|------------------------------------------------------|-----------------------------|
| unknown    |                                                      | ``reserve``: reserved       |
| reserved   | being inspected; an adapter that it is to replace    | ``confirm``: ready;         |
|            | goes on being served                                 | ``cancel``: as before       |
| registered | in the catalog, not inspected by this engine yet     | ``attach``: ready; ``remove``|
| ready      | inspected: requests may name it                      | ``remove``: unknown         |

Used on the I/O thread alone.
"""

import logging
import os
import unicodedata
from pathlib import Path

import msgspec

from ipc.errors import AdapterConflict, AdapterNotFound, Internal, InvalidRequest
from ipc.messages import AdapterId, Manifest

logger = logging.getLogger(__name__)

MAX_NAME_CHARACTERS = 255
CATALOG_VERSION = 1
# Ids that a start sets aside: each start goes on behind all of the last one's, so that none is
# given twice even if the last ones were never written down.
IDS_PER_START = 1 << 16


class RegisteredAdapter(msgspec.Struct, frozen=True):
    """One registration. ``manifest`` is None until this engine has had it inspected.

    ``path`` is as the operator wrote it; ``created_s`` is Unix time. One that is not
    ``persistent`` (found in the adapter folder) is not in the catalog.
    """

    adapter_id: AdapterId
    name: str
    path: str
    pinned: bool
    created_s: int
    manifest: Manifest | None = None
    persistent: bool = True


class Reservation(msgspec.Struct, frozen=True):
    """A name that is being registered, and the id that goes with it."""

    adapter_id: AdapterId
    name: str
    path: str
    pinned: bool
    persistent: bool


class CatalogEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    adapter_id: AdapterId
    name: str
    path: str
    pinned: bool
    created_s: int


class Catalog(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is on disk. Ids below ``next_adapter_id`` may have been given."""

    version: int
    next_adapter_id: AdapterId
    adapters: tuple[CatalogEntry, ...]


class CatalogFile:
    """The catalog's file, which holds the old state or the new one, whatever happens."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> Catalog:
        """The catalog; an empty one if there is no file.

        Raises:
            InvalidRequest: the file is no catalog.
        """
        try:
            text = self.path.read_bytes()
        except FileNotFoundError:
            return Catalog(CATALOG_VERSION, AdapterId(1), ())
        except OSError as error:
            raise InvalidRequest(
                f"adapter catalog {self.path} can not be read: {error.strerror}"
            ) from error
        try:
            catalog = msgspec.json.decode(text, type=Catalog)
        except msgspec.DecodeError as error:
            raise InvalidRequest(f"adapter catalog {self.path} is damaged: {error}") from error
        if catalog.version != CATALOG_VERSION:
            raise InvalidRequest(
                f"adapter catalog {self.path}: expected version {CATALOG_VERSION},"
                f" got {catalog.version}"
            )
        names = [entry.name for entry in catalog.adapters]
        ids = [entry.adapter_id for entry in catalog.adapters]
        if len(set(names)) != len(names) or len(set(ids)) != len(ids):
            raise InvalidRequest(
                f"adapter catalog {self.path} is damaged: an adapter is twice in it"
            )
        if any(adapter_id >= catalog.next_adapter_id for adapter_id in ids):
            raise InvalidRequest(
                f"adapter catalog {self.path} is damaged: next_adapter_id"
                f" {catalog.next_adapter_id} is not above all adapters'"
            )
        return catalog

    def write(self, catalog: Catalog) -> None:
        """Replaces the file; when it returns, the catalog survives a loss of power.

        It blocks for as long as the disk takes.

        Raises:
            Internal: it could not be written; the file is as it was before.
        """
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        try:
            with open(temporary, "wb") as file:
                file.write(msgspec.json.format(msgspec.json.encode(catalog), indent=1) + b"\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.path)
            self._sync_folder()
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise Internal(
                f"adapter catalog {self.path} can not be written: {error.strerror}"
            ) from error

    def _sync_folder(self) -> None:
        folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


class Registry:
    """Names, and which adapter each of them means. Every change of the catalog is saved at once."""

    def __init__(self, base_name: str, file: CatalogFile) -> None:
        """Takes up the catalog where the last engine left it, and sets ids aside in it.

        Raises:
            InvalidRequest: the file is no catalog.
            Internal: the file can not be written.
        """
        self._base_name = base_name
        self._file = file
        self._adapters: dict[str, RegisteredAdapter] = {}
        self._reservations: dict[str, Reservation] = {}
        catalog = file.read()
        for entry in catalog.adapters:
            self._adapters[entry.name] = RegisteredAdapter(
                entry.adapter_id, entry.name, entry.path, entry.pinned, entry.created_s
            )
        self._next_id = catalog.next_adapter_id
        self._ids_end = AdapterId(self._next_id + IDS_PER_START)
        self._save()

    def adapters(self) -> list[RegisteredAdapter]:
        """All of them, in order of name."""
        return [self._adapters[name] for name in sorted(self._adapters)]

    def find(self, name: str) -> RegisteredAdapter | None:
        return self._adapters.get(name)

    def get(self, name: str) -> RegisteredAdapter:
        """Raises ``AdapterNotFound``."""
        adapter = self._adapters.get(name)
        if adapter is None:
            raise AdapterNotFound(f"no model or adapter is called {name!r}", param="model")
        return adapter

    def reserve(
        self,
        name: str,
        path: str,
        *,
        pinned: bool = False,
        replace: bool = False,
        persistent: bool = True,
    ) -> Reservation:
        """An id for a new adapter. Nobody sees it before ``confirm``; ``cancel`` undoes it.

        Raises:
            InvalidRequest: the name can not be one.
            AdapterConflict: the name is taken (and ``replace`` was not asked for), or is being
                registered.
        """
        self._check_name(name)
        pending = self._reservations.get(name)
        if pending is not None:
            raise AdapterConflict(
                f"adapter {name!r} is being registered from {pending.path}", param="name"
            )
        present = self._adapters.get(name)
        if present is not None and not replace:
            raise AdapterConflict(
                f"adapter {name!r} exists already, from {present.path}", param="name"
            )
        reservation = Reservation(self._take_id(), name, path, pinned, persistent)
        self._reservations[name] = reservation
        return reservation

    def confirm(
        self, reservation: Reservation, manifest: Manifest, created_s: int
    ) -> tuple[RegisteredAdapter, RegisteredAdapter | None]:
        """The name means the inspected adapter from now on.

        Returns it, and the adapter whose name it took: that one gets no further request.

        Raises:
            Internal: the catalog can not be written; the name means what it did before, and the
                reservation is still there.
        """
        assert self._reservations.get(reservation.name) is reservation, "it was not reserved"
        adapter = RegisteredAdapter(
            reservation.adapter_id,
            reservation.name,
            reservation.path,
            reservation.pinned,
            created_s,
            manifest,
            reservation.persistent,
        )
        replaced = self._put(reservation.name, adapter)
        del self._reservations[reservation.name]
        return adapter, replaced

    def cancel(self, reservation: Reservation) -> None:
        """The inspection failed: everything is as it was before, the id is spent."""
        assert self._reservations.get(reservation.name) is reservation, "it was not reserved"
        del self._reservations[reservation.name]

    def attach(self, adapter: RegisteredAdapter, manifest: Manifest) -> RegisteredAdapter | None:
        """Completes an adapter of an earlier engine; None if it is gone meanwhile."""
        present = self._adapters.get(adapter.name)
        if present is None or present.adapter_id != adapter.adapter_id:
            return None
        present = msgspec.structs.replace(present, manifest=manifest)
        self._adapters[adapter.name] = present
        return present

    def set_pinned(self, name: str, pinned: bool) -> RegisteredAdapter:
        """Raises ``AdapterNotFound``; ``Internal`` as ``confirm``."""
        adapter = msgspec.structs.replace(self.get(name), pinned=pinned)
        self._put(name, adapter)
        return adapter

    def remove(self, name: str) -> RegisteredAdapter:
        """The adapter that the name meant until now.

        A registration under way that was to replace it goes on.

        Raises: as ``set_pinned``.
        """
        adapter = self.get(name)
        self._put(name, None)
        return adapter

    def _put(self, name: str, adapter: RegisteredAdapter | None) -> RegisteredAdapter | None:
        """Changes one name, in memory and on disk or in neither; returns who had it."""
        before = self._adapters.pop(name, None)
        if adapter is not None:
            self._adapters[name] = adapter
        if not any(one is not None and one.persistent for one in (before, adapter)):
            return before
        try:
            self._save()
        except Internal:
            self._adapters.pop(name, None)
            if before is not None:
                self._adapters[name] = before
            raise
        return before

    def _save(self) -> None:
        entries = tuple(
            CatalogEntry(one.adapter_id, one.name, one.path, one.pinned, one.created_s)
            for one in self.adapters()
            if one.persistent
        )
        self._file.write(Catalog(CATALOG_VERSION, self._ids_end, entries))

    def _take_id(self) -> AdapterId:
        if self._next_id == self._ids_end:
            self._ids_end = AdapterId(self._next_id + IDS_PER_START)
            self._save()
        adapter_id = self._next_id
        self._next_id = AdapterId(adapter_id + 1)
        return adapter_id

    def _check_name(self, name: str) -> None:
        fault = None
        if not name:
            fault = "is empty"
        elif len(name) > MAX_NAME_CHARACTERS:
            fault = f"has {len(name)} characters"
        elif name == self._base_name:
            fault = "is the base model's"
        elif ":" in name or "/" in name:
            fault = "has a ':' or '/' in it"
        elif any(unicodedata.category(character) == "Cc" for character in name):
            fault = "has a control character in it"
        if fault is not None:
            shown = name if len(name) <= MAX_NAME_CHARACTERS else name[:32] + "…"
            raise InvalidRequest(
                f"adapter name {shown!r} {fault}: expected 1 to {MAX_NAME_CHARACTERS} characters,"
                " none of them ':', '/' or a control character, and not the base model's name",
                param="name",
            )
