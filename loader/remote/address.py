"""Where an adapter comes from that lies on no disk of ours, as a user writes it.

| scheme     | form                                         | the adapter                         |
|------------|----------------------------------------------|-------------------------------------|
| `hf://`    | `hf://owner/name[@revision][/path]`          | a repository of the Hub, or a part  |
| `s3://`    | `s3://bucket/path`                           | all below a prefix of a bucket      |
| `https://` | `https://host[:port]/path`                   | a folder of a server                |
| `http://`  | the same, of this machine alone (loopback)   |                                     |

A path that ends in ``.gguf`` is that file; any other is a folder as PEFT saves it. A revision's
slashes are written ``%2F``. Nothing in an address leads upwards, and none holds a secret: what is
needed to sign in comes from the environment.
"""

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from ipc.errors import InvalidRequest
from loader.adapter_files import GGUF_SUFFIX

SCHEMES = ("hf", "s3", "https", "http")

MAX_CHARACTERS = 2048

_SEGMENT = re.compile(r"[A-Za-z0-9._~!$&'()*+,;=:@ -]+")
_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]*")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")


@dataclass(frozen=True, slots=True)
class Address:
    """A checked address. ``host`` is a repository, a bucket, or a host with its port.

    ``revision`` is of a repository, None for its default; ``path`` has no slash at either end.
    """

    scheme: str
    host: str
    revision: str | None
    path: str

    @property
    def is_file(self) -> bool:
        """Whether it is one file; else a folder."""
        return self.path.endswith(GGUF_SUFFIX)

    @property
    def folder(self) -> str:
        """``path``, or what a file lies in; empty for the root."""
        return self.path.rpartition("/")[0] if self.is_file else self.path

    @property
    def file_name(self) -> str:
        """The last part of ``path``."""
        return self.path.rpartition("/")[2]

    def path_of(self, name: str) -> str:
        """The path of one of the adapter's files."""
        return f"{self.folder}/{name}" if self.folder else name

    def at(self, revision: str) -> "Address":
        """The same of a repository as it was then."""
        return Address(self.scheme, self.host, revision, self.path)

    def __str__(self) -> str:
        revision = "" if self.revision is None else f"@{self.revision.replace('/', '%2F')}"
        path = f"/{self.path}" if self.path else ""
        return f"{self.scheme}://{self.host}{revision}{path}"


def parse_address(text: str) -> Address:
    """The address that ``text`` is.

    Raises:
        InvalidRequest: it is none, and why.
    """
    if len(text) > MAX_CHARACTERS:
        raise InvalidRequest(
            f"adapter path has {len(text)} characters, expected at most {MAX_CHARACTERS}",
            param="path",
        )
    if not text.isprintable() or "\\" in text:
        raise _refusal(text, "characters that can be printed, and no backslash")
    scheme, _, rest = text.partition("://")
    if scheme not in SCHEMES:
        schemes = ", ".join(f"{each}://" for each in SCHEMES[:3])
        raise _refusal(text, f"an absolute path, or one of {schemes}")
    if "?" in rest or "#" in rest:
        # Such as a signature, which must not be written down with the adapter.
        raise _refusal(text, "no query and no fragment")
    if scheme == "hf":
        return _parse_hub(text, rest)
    host, _, path = rest.partition("/")
    if scheme == "s3":
        if not _BUCKET.fullmatch(host):
            raise _refusal(text, "s3://bucket/path")
    else:
        _check_host(text, scheme, host)
        host = host.lower()
    return Address(scheme, host, None, _checked_path(text, path))


def is_allowed(address: Address, prefixes: Sequence[str]) -> bool:
    """Whether one of ``prefixes`` is the address, or what it lies below.

    Of a repository that one names without a revision every revision is allowed.
    """
    texts = {str(address)}
    if address.revision is not None:
        texts.add(str(Address(address.scheme, address.host, None, address.path)))
    for prefix in prefixes:
        whole = prefix if prefix.endswith("/") else f"{prefix}/"
        if any(text == prefix or text.startswith(whole) for text in texts):
            return True
    return False


def _parse_hub(text: str, rest: str) -> Address:
    owner, _, rest = rest.partition("/")
    name, _, path = rest.partition("/")
    name, has_revision, revision = name.partition("@")
    if not _REPOSITORY.fullmatch(owner) or not _REPOSITORY.fullmatch(name):
        raise _refusal(text, "hf://owner/name[@revision][/path]")
    if not has_revision:
        return Address("hf", f"{owner}/{name}", None, _checked_path(text, path))
    revision = unquote(revision)
    if not _REVISION.fullmatch(revision) or ".." in revision:
        raise _refusal(text, "a branch, a tag or a commit behind the @")
    return Address("hf", f"{owner}/{name}", revision, _checked_path(text, path))


def _checked_path(text: str, path: str) -> str:
    path = path.strip("/")
    if not path:
        return ""
    for segment in path.split("/"):
        if segment in (".", "..") or not _SEGMENT.fullmatch(segment):
            raise _refusal(text, f"no {segment!r} in its path")
    return path


def _check_host(text: str, scheme: str, host: str) -> None:
    try:
        parts = urlsplit(f"{scheme}://{host}")
        name, port = parts.hostname, parts.port
    except ValueError:
        name, port = None, None
    if not name or "@" in host or port == 0:
        raise _refusal(text, f"{scheme}://host[:port]/path without a user's name")
    if scheme == "http" and not _is_loopback(name):
        raise _refusal(text, "https:// for any other machine")


def _is_loopback(name: str) -> bool:
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _refusal(text: str, expected: str) -> InvalidRequest:
    return InvalidRequest(f"adapter path {text[:200]!r}: expected {expected}", param="path")
