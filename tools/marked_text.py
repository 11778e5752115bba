"""Parts of documents that are written by a program, between two markers."""

from ipc.errors import InvalidRequest


def replace_section(text: str, name: str, body: str) -> str:
    """``text`` with ``body`` between ``<!-- name -->`` and ``<!-- end of name -->``.

    Raises:
        InvalidRequest: the markers are not there, once each and in order.
    """
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed or begin in after or end in after:
        raise InvalidRequest(f"expected {begin.strip()!r} and {end!r}, once each and in this order")
    return f"{before}{begin}{body.rstrip()}\n{end}{after}"
