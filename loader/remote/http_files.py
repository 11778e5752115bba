"""Files of an HTTP server: described by HEAD, read by GET, from the middle on if need be.

Source: RFC 9110, sections 8.8.3 (ETag), 13.1.5 (If-Range), 14 (Range Requests).
"""

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from urllib.parse import urljoin

import httpx

from ipc.errors import AdapterInvalid, AdapterNotFound, SidestreamError, Unavailable
from loader.remote.origin import ChangedFile, InterruptedRead, RemoteFile

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 30.0
RETRY_AFTER_S = 5.0

_MAX_REDIRECTS = 5
_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")
_REDIRECTS = (301, 302, 303, 307, 308)


class HttpFiles:
    """Reads from one server. ``may_follow(url)`` says whether a redirect to ``url`` is followed.

    ``headers`` go to the first server alone, never to where it redirects.
    """

    def __init__(
        self, may_follow: Callable[[str], bool], headers: Mapping[str, str] | None = None
    ) -> None:
        self._may_follow = may_follow
        self._headers = dict(headers or {})
        self._client = httpx.Client(
            timeout=httpx.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
            follow_redirects=False,
        )

    def close(self) -> None:
        self._client.close()

    def find(self, url: str, name: str) -> RemoteFile | None:
        """What the server says of the file at ``url``, which is called ``name``.

        Raises:
            SidestreamError: it can not be had; see ``Origin``.
        """
        try:
            with self._open("HEAD", url, {}) as response:
                if response.status_code in (404, 410):
                    return None
                _check_status("HEAD", url, response, (200,))
                length = response.headers.get("content-length", "")
                if not length.isascii() or not length.isdigit():
                    raise AdapterInvalid(
                        f"{url}: expected a Content-Length in the answer to HEAD, got {length!r}"
                    )
                tag = response.headers.get("etag", "")
                # A weak tag does not say that bytes are equal.
                is_strong = bool(tag) and not tag.startswith("W/")
                return RemoteFile(name, int(length), tag, can_resume=is_strong)
        except httpx.HTTPError as error:
            raise _unreachable("HEAD", url, error) from error

    def read(self, url: str, file: RemoteFile, start: int) -> Iterator[bytes]:
        """As ``Origin.read``."""
        headers = {}
        if start:
            headers["range"] = f"bytes={start}-"
            if file.tag:
                headers["if-range"] = file.tag
        try:
            with self._open("GET", url, headers) as response:
                if response.status_code >= 500 or response.status_code == 429:
                    raise InterruptedRead(_refused("GET", url, response))
                _check_status("GET", url, response, (200, 206))
                _check_same(response, file)
                skip = start
                if response.status_code == 206:
                    _check_range(url, response, start, file)
                    skip = 0
                # What is sent again, because the server knows no ranges, is passed over. Pieces are
                # as they come: of larger ones the last would be lost where the transfer breaks off.
                for piece in response.iter_raw():
                    if skip >= len(piece):
                        skip -= len(piece)
                    else:
                        yield piece[skip:]
                        skip = 0
        except httpx.HTTPError as error:
            raise InterruptedRead(_unreachable("GET", url, error)) from error

    def _open(self, method: str, url: str, headers: Mapping[str, str]) -> "_Response":
        return _Response(self._client, self._may_follow, method, url, self._headers, headers)


class _Response:
    """The answer to one request, redirects followed, open for as long as its context."""

    def __init__(
        self,
        client: httpx.Client,
        may_follow: Callable[[str], bool],
        method: str,
        url: str,
        secret_headers: Mapping[str, str],
        headers: Mapping[str, str],
    ) -> None:
        self._client = client
        self._may_follow = may_follow
        self._method = method
        self._url = url
        self._secret_headers = secret_headers
        self._headers = {"accept-encoding": "identity", **headers}
        self._response: httpx.Response | None = None

    def __enter__(self) -> httpx.Response:
        url, headers = self._url, {**self._secret_headers, **self._headers}
        for _ in range(_MAX_REDIRECTS + 1):
            request = self._client.build_request(self._method, url, headers=headers)
            response = self._response = self._client.send(request, stream=True)
            if response.status_code not in _REDIRECTS:
                return response
            response.close()
            target = self._target(url, response)
            if _site(target) != _site(url):
                if not self._may_follow(target):
                    raise AdapterInvalid(
                        f"{self._url} redirects to {_site(target)}, which is not allowed"
                    )
                headers = dict(self._headers)
            url = target
        raise AdapterInvalid(f"{self._url} redirects more than {_MAX_REDIRECTS} times")

    def _target(self, url: str, response: httpx.Response) -> str:
        location: str = response.headers.get("location", "")
        try:
            target = urljoin(url, location)
            _site(target)
        except (ValueError, httpx.InvalidURL) as error:
            raise AdapterInvalid(
                f"{self._url} redirects to {location[:200]!r}, which is no address"
            ) from error
        return target

    def __exit__(self, *_: object) -> None:
        if self._response is not None:
            self._response.close()


def _site(url: str) -> str:
    """Scheme, host and port: what else stands in an address may be secret."""
    parts = httpx.URL(url)
    return f"{parts.scheme}://{parts.netloc.decode('ascii', 'replace').rpartition('@')[2]}"


def _check_same(response: httpx.Response, file: RemoteFile) -> None:
    tag = response.headers.get("etag", "")
    if file.tag and tag and tag != file.tag:
        raise ChangedFile
    if response.headers.get("content-encoding", "identity") != "identity":
        raise AdapterInvalid(
            f"{file.name}: asked for no Content-Encoding, got"
            f" {response.headers['content-encoding']!r}"
        )


def _check_range(url: str, response: httpx.Response, start: int, file: RemoteFile) -> None:
    said = response.headers.get("content-range", "")
    match = _CONTENT_RANGE.fullmatch(said)
    if match is None or int(match[1]) != start:
        raise AdapterInvalid(f"{url}: asked for bytes from {start} on, got {said!r}")
    if match[2] != "*" and int(match[2]) != file.num_bytes:
        raise ChangedFile


def _check_status(
    method: str, url: str, response: httpx.Response, expected: tuple[int, ...]
) -> None:
    if response.status_code not in expected:
        raise _refused(method, url, response)


def _refused(method: str, url: str, response: httpx.Response) -> SidestreamError:
    message = f"{method} {url}: answered {response.status_code} {response.reason_phrase}"
    if response.status_code in (401, 403, 404, 410):
        return AdapterNotFound(message, param="path")
    if response.status_code >= 500 or response.status_code == 429:
        return Unavailable(message, retry_after_s=RETRY_AFTER_S)
    return AdapterInvalid(message, param="path")


def _unreachable(method: str, url: str, error: httpx.HTTPError) -> Unavailable:
    reason = str(error) or type(error).__name__
    return Unavailable(f"{method} {url}: no answer: {reason}", retry_after_s=RETRY_AFTER_S)
