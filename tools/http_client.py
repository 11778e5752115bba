"""A client of a running server, on the standard library alone."""

import contextlib
import http.client
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import msgspec

from ipc.errors import ErrorCode, ErrorInfo, InvalidRequest, Unavailable, error_from_info

_EVENT_PREFIX = b"data: "
_END_OF_STREAM = b"[DONE]"
_BY_STATUS = {code.http_status: code for code in ErrorCode}


class HttpClient:
    """Asks the server at ``url``; each operation on its connection ends in ``timeout_s``.

    It is used by one thread, and goes past proxies: a server is near its commands. ``key`` goes
    with every request.
    """

    def __init__(self, url: str, timeout_s: float, key: str | None = None) -> None:
        """Raises ``InvalidRequest`` when ``url`` is not an http or https one with a host."""
        parts = urlsplit(url if "://" in url else f"http://{url}")
        kinds = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
        try:
            self._new_connection = kinds[parts.scheme]
            self._host, self._port = parts.hostname or "", parts.port
        except (KeyError, ValueError):
            raise InvalidRequest(
                f"expected a URL such as http://127.0.0.1:8000, got {url!r}"
            ) from None
        self._prefix = parts.path.rstrip("/")
        self._timeout_s = timeout_s
        self._headers = {"accept": "*/*"}
        if key is not None:
            self._headers["authorization"] = f"Bearer {key}"
        self.url = url

    def get(self, path: str) -> bytes:
        """The body of the answer. Raises ``SidestreamError``: the server's, or ``Unavailable``."""
        with self._exchange("GET", path, None) as response:
            return response.read()

    def probe(self, path: str) -> tuple[int, bytes]:
        """Status and body, whatever the status. Raises ``Unavailable`` where nothing answers."""
        with self._respond("GET", path, None) as response:
            return response.status, response.read()

    def post(self, path: str, body: dict[str, Any]) -> bytes:
        """As ``get``, with ``body`` as JSON."""
        with self._exchange("POST", path, body) as response:
            return response.read()

    def stream(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The events of an answer as they come. Raises as ``get``, in their midst too."""
        with self._exchange("POST", path, body) as response:
            for line in response:
                if not line.startswith(_EVENT_PREFIX):
                    continue
                payload = line.removeprefix(_EVENT_PREFIX).strip()
                if payload == _END_OF_STREAM:
                    return
                event = msgspec.json.decode(payload, type=dict[str, Any])
                if "error" in event:
                    raise _error(500, payload)
                yield event
        raise Unavailable("the server ended the answer before it was complete")

    @contextlib.contextmanager
    def _exchange(
        self, method: str, path: str, body: dict[str, Any] | None
    ) -> Iterator[http.client.HTTPResponse]:
        with self._respond(method, path, body) as response:
            if response.status >= 400:
                raise _error(response.status, response.read())
            yield response

    @contextlib.contextmanager
    def _respond(
        self, method: str, path: str, body: dict[str, Any] | None
    ) -> Iterator[http.client.HTTPResponse]:
        connection = self._new_connection(self._host, self._port, timeout=self._timeout_s)
        headers = self._headers | ({"content-type": "application/json"} if body else {})
        try:
            content = msgspec.json.encode(body) if body is not None else None
            connection.request(method, self._prefix + path, content, headers)
            yield connection.getresponse()
        except TimeoutError:
            raise Unavailable(f"{self.url} gave no answer in {self._timeout_s:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise Unavailable(f"no answer from {self.url}: {reason or error}") from error
        finally:
            connection.close()


def _error(status: int, body: bytes) -> Exception:
    """What the server raised, as far as its answer tells."""
    try:
        details = msgspec.json.decode(body)["error"]
        message = str(details["message"])
    except (msgspec.DecodeError, KeyError, TypeError):
        message = f"the server answered with status {status}"
        details = {}
    code = _BY_STATUS.get(status, ErrorCode.INTERNAL)
    return error_from_info(ErrorInfo(code, message, details.get("param")))
