"""Who may ask for what, where the server has keys.

| endpoint | asks for                                                                |
|----------|-------------------------------------------------------------------------|
| OPEN     | nothing                                                                 |
| API      | an API key or an admin key, if there are API keys                       |
| ADMIN    | an admin key, if there are any; else as API                             |

This process has no key, but each key's digest: so none can be logged, and comparing takes the
same time whatever a client sends.
"""

import hashlib
import hmac
from collections.abc import Sequence
from enum import Enum

from starlette.requests import Request

from api.error_responses import RequestRefused


class Access(Enum):
    """Whose key an endpoint asks for."""

    OPEN = "open"
    API = "api"
    ADMIN = "admin"


class ApiKeys:
    """Checks the keys of requests against those of the server."""

    def __init__(self, api_key_digests: Sequence[str], admin_key_digests: Sequence[str]) -> None:
        self._api = tuple(api_key_digests)
        self._admin = tuple(admin_key_digests)

    def guards(self, access: Access) -> bool:
        """Whether any request needs a key for such an endpoint."""
        if access is Access.ADMIN:
            return bool(self._api or self._admin)
        return access is Access.API and bool(self._api)

    def check(self, request: Request, access: Access) -> None:
        """Raises ``RequestRefused``: 401 without a key of this server, 403 with too weak a one."""
        if not self.guards(access):
            return
        digest = key_digest(_given_key(request))
        is_admin = _contains(self._admin, digest)
        is_user = _contains(self._api, digest)
        if not is_admin and not is_user:
            raise _unknown_key()
        if access is Access.ADMIN and self._admin and not is_admin:
            raise RequestRefused(
                403,
                f"{request.url.path}: expected an admin key, got an API key",
                param=None,
                code="admin_key_required",
            )


def key_digest(key: str) -> str:
    """By what a key is known: SHA-256 in hexadecimal digits."""
    return hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()


def _given_key(request: Request) -> str:
    header = request.headers.get("authorization")
    if header is None:
        raise _unknown_key("no key was given")
    scheme, _, key = header.partition(" ")
    if scheme.lower() != "bearer":
        raise _unknown_key("the header authorization has another scheme")
    return key.strip()


def _contains(digests: Sequence[str], digest: str) -> bool:
    """Looks at every one, so that time does not tell which one it was."""
    found = [hmac.compare_digest(digest, known) for known in digests]
    return any(found)


def _unknown_key(problem: str = "the key is none of this server's") -> RequestRefused:
    return RequestRefused(
        401,
        f"{problem}: expected the header authorization: Bearer and an API key",
        param=None,
        code="invalid_api_key",
        headers={"www-authenticate": "Bearer"},
    )
