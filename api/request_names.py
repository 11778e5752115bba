"""The names that clients may give to their requests."""

import re
import uuid

# What may be echoed, and written into logs, without a thought.
_ACCEPTABLE = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")


def is_request_name(name: str) -> bool:
    """Whether a client's request may be called so."""
    return _ACCEPTABLE.fullmatch(name) is not None


def new_request_name() -> str:
    """A name that no other request has."""
    return uuid.uuid4().hex
