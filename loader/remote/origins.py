"""The sources of adapters that there are: HTTP servers, the Hugging Face Hub, S3."""

import os
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any

from ipc.errors import AdapterNotFound, InvalidRequest, SidestreamError, Unavailable
from loader.remote.address import Address, is_allowed, parse_address
from loader.remote.origin import ChangedFile, InterruptedRead, Origin, RemoteFile

RETRY_AFTER_S = 5.0
_ANSWER_TIMEOUT_S = 10.0
_S3_PIECE_BYTES = 8 << 20


def open_origin(address: Address, allowed: Sequence[str]) -> Origin:
    """Finds the adapter at ``address``; redirects elsewhere are followed to what is ``allowed``.

    Raises:
        InvalidRequest: a package is missing that its scheme needs.
        SidestreamError: as ``Origin`` says.
    """
    if address.scheme == "hf":
        return HubOrigin(address)
    if address.scheme == "s3":
        return S3Origin(address)
    return HttpOrigin(address, allowed)


class HttpOrigin:
    """A folder, or a file, of an HTTP server. It can not be listed."""

    def __init__(self, address: Address, allowed: Sequence[str]) -> None:
        _need("httpx", address)
        from loader.remote.http_files import HttpFiles

        self.address = address
        self._files = HttpFiles(lambda url: _may_follow(url, allowed))

    def close(self) -> None:
        self._files.close()

    def find(self, name: str) -> RemoteFile | None:
        return self._files.find(self._url(name), name)

    def names(self) -> list[str] | None:
        return None

    def read(self, file: RemoteFile, start: int) -> Iterator[bytes]:
        return self._files.read(self._url(file.name), file, start)

    def _url(self, name: str) -> str:
        return f"{self.address.scheme}://{self.address.host}/{self.address.path_of(name)}"


class HubOrigin:
    """A repository of the Hub at one commit. The Hub says where its files lie, so it is trusted
    with redirects; the token, from the environment, goes to the Hub alone.
    """

    def __init__(self, address: Address) -> None:
        hub = _need("huggingface_hub", address)
        from loader.remote.http_files import HttpFiles

        self._hub = hub
        info = self._ask(address, hub)
        self.address = address.at(info.sha)
        prefix = f"{address.folder}/" if address.folder else ""
        self._files: dict[str, RemoteFile] = {}
        for each in info.siblings or ():
            name = each.rfilename.removeprefix(prefix)
            if each.rfilename.startswith(prefix) and "/" not in name and each.size is not None:
                sha256 = None if each.lfs is None else each.lfs.sha256
                tag = sha256 or each.blob_id or ""
                self._files[name] = RemoteFile(name, each.size, tag, sha256)
        self._http = HttpFiles(lambda url: _is_hubs_redirect(url), hub.utils.build_hf_headers())

    def close(self) -> None:
        self._http.close()

    def find(self, name: str) -> RemoteFile | None:
        return self._files.get(name)

    def names(self) -> list[str] | None:
        return sorted(self._files)

    def read(self, file: RemoteFile, start: int) -> Iterator[bytes]:
        path = self.address.path_of(file.name)
        url = self._hub.hf_hub_url(
            self.address.host, path, revision=self.address.revision, endpoint=_hub_endpoint()
        )
        # A blob's hash is no ETag of whoever has the bytes; the commit is what does not change.
        described = RemoteFile(file.name, file.num_bytes, "")
        return self._http.read(url, described, start)

    def _ask(self, address: Address, hub: ModuleType) -> Any:
        try:
            return hub.HfApi(endpoint=_hub_endpoint()).model_info(
                address.host,
                revision=address.revision,
                files_metadata=True,
                timeout=_ANSWER_TIMEOUT_S,
            )
        # Which HTTP library the package stands on, and so what it raises, is its own affair.
        except Exception as error:
            response = getattr(error, "response", None)
            if response is None:
                raise _unavailable(address, f"no answer: {error}") from error
            status = f"answered {response.status_code} {response.reason_phrase}"
            if response.status_code >= 500 or response.status_code == 429:
                raise _unavailable(address, status) from error
            raise AdapterNotFound(f"{address}: the Hub {status}", param="path") from error


class S3Origin:
    """Objects below a prefix. Credentials and the endpoint come from the environment, as usual."""

    def __init__(self, address: Address) -> None:
        s3fs = _need("s3fs", address)
        self.address = address
        self._s3 = s3fs.S3FileSystem(use_listings_cache=False, skip_instance_cache=True)

    def close(self) -> None:
        """The library keeps its connections for the next."""

    def find(self, name: str) -> RemoteFile | None:
        try:
            info = self._call(lambda: self._s3.info(self._key(name)))
        except FileNotFoundError:
            return None
        if info["type"] != "file":
            return None
        return RemoteFile(name, int(info["size"]), str(info.get("ETag") or ""))

    def names(self) -> list[str] | None:
        folder = f"{self.address.host}/{self.address.folder}".rstrip("/")
        try:
            found = self._call(lambda: self._s3.ls(folder, detail=True))
        except FileNotFoundError:
            return []
        return sorted(each["name"].rpartition("/")[2] for each in found if each["type"] == "file")

    def read(self, file: RemoteFile, start: int) -> Iterator[bytes]:
        key = self._key(file.name)
        while start < file.num_bytes:
            stop = min(start + _S3_PIECE_BYTES, file.num_bytes)
            try:
                piece: bytes = self._call(lambda: self._s3.cat_file(key, start=start, end=stop))  # noqa: B023
            except FileNotFoundError as error:
                raise InterruptedRead(
                    AdapterNotFound(f"{self.address}: {file.name} is gone", param="path")
                ) from error
            except Unavailable as error:
                raise InterruptedRead(error) from error
            yield piece
            if len(piece) < stop - start:
                return
            start = stop
        # Another object may have taken its place between two pieces.
        if self.find(file.name) != file:
            raise ChangedFile

    def _key(self, name: str) -> str:
        return f"{self.address.host}/{self.address.path_of(name)}"

    def _call(self, ask: Callable[[], Any]) -> Any:
        """What ``ask`` gives; errors of the library as ours, but that something is not there."""
        botocore = import_module("botocore.exceptions")
        try:
            return ask()
        except FileNotFoundError:
            raise
        except PermissionError as error:
            raise AdapterNotFound(
                f"{self.address}: access denied: {error}", param="path"
            ) from error
        except (botocore.BotoCoreError, botocore.ClientError, OSError) as error:
            raise _unavailable(self.address, f"no answer: {error}") from error


def _hub_endpoint() -> str | None:
    """Another hub than the public one; the package itself looks only when it is imported."""
    return os.environ.get("HF_ENDPOINT")


def _is_hubs_redirect(url: str) -> bool:
    return url.startswith("https://")


def _may_follow(url: str, allowed: Sequence[str]) -> bool:
    try:
        return is_allowed(parse_address(url), allowed)
    except SidestreamError:
        return False


def _need(package: str, address: Address) -> ModuleType:
    try:
        return import_module(package)
    except ImportError as error:
        raise InvalidRequest(
            f"{address}: {address.scheme}:// needs the package {package}: pip install"
            " 'sidestream[remote]'",
            param="path",
        ) from error


def _unavailable(address: Address, what: str) -> Unavailable:
    return Unavailable(f"{address}: {what}", retry_after_s=RETRY_AFTER_S)
