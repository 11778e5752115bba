"""Which release of Sidestream this is."""

from importlib.metadata import PackageNotFoundError, version


def release() -> str:
    """The installed version, or that there is none."""
    try:
        return version("sidestream")
    except PackageNotFoundError:
        return "(not installed)"
