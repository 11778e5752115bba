"""What is asked of a source of adapters: which files it has, and their bytes."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from ipc.errors import SidestreamError
from loader.remote.address import Address


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file as its source describes it.

    ``tag`` changes with the content (an ETag, a blob's hash), empty where the source has none;
    ``sha256`` is of the content, in hexadecimal, None where the source does not say. Unless it
    ``can_resume``, nothing tells what was read from what is there later: a transfer that broke off
    begins anew.
    """

    name: str
    num_bytes: int
    tag: str
    sha256: str | None = None
    can_resume: bool = True


class InterruptedRead(Exception):
    """A transfer broke off, or did not begin: to be tried again from where it stopped.

    ``error`` is what to say if no further try helps.
    """

    def __init__(self, error: SidestreamError) -> None:
        super().__init__(error.message)
        self.error = error


class ChangedFile(Exception):
    """The file is not the one any more that was described: what was read of it is void."""


class Origin(Protocol):
    """One adapter at its source. Every call may take as long as its time limits allow.

    Errors name the address, what was asked and what came back. ``Unavailable``: nobody answers.
    ``AdapterNotFound``: there is no such thing, or we may not see it.
    """

    @property
    def address(self) -> Address:
        """Where it is; of a repository the commit that was asked for, for good."""
        ...

    def close(self) -> None:
        """Ends its connections."""
        ...

    def find(self, name: str) -> RemoteFile | None:
        """The adapter's file of this name; None if there is none."""
        ...

    def names(self) -> list[str] | None:
        """The names of all files in the adapter's folder; None if the source can not list them."""
        ...

    def read(self, file: RemoteFile, start: int) -> Iterator[bytes]:
        """The bytes of ``file`` from ``start`` on, in pieces. More than it has is possible.

        Raises:
            InterruptedRead: it broke off.
            ChangedFile: it is another file by now.
        """
        ...
