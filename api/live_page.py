"""The live page as one document, with its style and script inside."""

import base64
import hashlib
from pathlib import Path

_FOLDER = Path(__file__).parent / "page"
# One script, in this order: the last part starts what the ones before it declare.
_SCRIPTS = (
    "numbers",
    "nodes",
    "server",
    "tiers",
    "timeline",
    "latencies",
    "requests",
    "prompt",
    "live",
)


def live_page() -> str:
    """The page. It needs no other file."""
    document = (_FOLDER / "live.html").read_text()
    return document.replace("/* live.css */", _style()).replace("/* live.js */", _script())


def content_security_policy() -> str:
    """Runs the page's own script and nothing else, and talks to this server alone."""
    return "; ".join(
        (
            "default-src 'none'",
            f"style-src {_hash(_style())}",
            f"script-src {_hash(_script())}",
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    )


def _style() -> str:
    return (_FOLDER / "live.css").read_text()


def _script() -> str:
    parts = [(_FOLDER / "live" / f"{name}.js").read_text() for name in _SCRIPTS]
    return "\n".join(('"use strict";\n', *parts))


def _hash(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"
