"""Paths of adapters that lie on another machine."""

import re

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def is_remote(path: str) -> bool:
    """Whether ``path`` begins with a scheme, of a source that there is or not."""
    return _SCHEME.match(path) is not None
