"""One log format for every process, so that their lines read as one log."""

import logging
import sys


def configure(process_name: str, level: str) -> None:
    """Sends this process's log to stderr: ``12:34:56.789 INFO  engine  engine.core: …``."""
    logging.basicConfig(
        stream=sys.stderr,
        level=level.upper(),
        format=f"%(asctime)s.%(msecs)03d %(levelname)-7s {process_name:<10} %(name)s: %(message)s",
        datefmt="%H:%M:%S",
        force=True,
    )
