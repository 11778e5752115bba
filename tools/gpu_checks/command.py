"""``tools/gpu_check``: one part of what is measured and checked on a GPU."""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from engine.config import DeviceKind
from ipc.errors import InvalidRequest
from tools.gpu_checks.figures import Report
from tools.gpu_checks.setting import Setting
from tools.values import parse_seconds


def _accuracy(setting: Setting) -> Report:
    from tools.gpu_checks.accuracy import check_accuracy

    return check_accuracy(setting)


def _decode(setting: Setting) -> Report:
    from tools.gpu_checks.decode import check_decode

    return check_decode(setting)


def _prefill(setting: Setting) -> Report:
    from tools.gpu_checks.prefill import check_prefill

    return check_prefill(setting)


def _kernels(setting: Setting) -> Report:
    from tools.gpu_checks.programs import check_kernels

    return check_kernels(setting)


def _load(setting: Setting) -> Report:
    from tools.gpu_checks.programs import check_load

    return check_load(setting)


def _loading(setting: Setting) -> Report:
    from tools.gpu_checks.loading.check import check_loading

    return check_loading(setting)


def _memcheck(setting: Setting) -> Report:
    from tools.gpu_checks.programs import check_memory

    return check_memory(setting)


def _serve(setting: Setting) -> Report:
    from tools.gpu_checks.serve import check_serve

    return check_serve(setting)


# Each imports its part only when it is asked for: not every machine has what all of them need.
PARTS: dict[str, Callable[[Setting], Report]] = {
    "kernels": _kernels,
    "accuracy": _accuracy,
    "decode": _decode,
    "prefill": _prefill,
    "load": _load,
    "loading": _loading,
    "serve": _serve,
    "memcheck": _memcheck,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0 if every goal that could be measured is met, or in a trial with toys."""
    parser = argparse.ArgumentParser(
        prog="tools/gpu_check", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--part", choices=PARTS, required=True, help="what to check")
    parser.add_argument(
        "--out", type=Path, default=Path("gpu-check"), help="folder for PART.json (%(default)s)"
    )
    parser.add_argument(
        "--device", type=DeviceKind, default=DeviceKind.CUDA, help="cuda or cpu (cuda)"
    )
    parser.add_argument(
        "--tiny",
        action="store_true",
        help="toy sizes, to try the part itself; the figures mean nothing",
    )
    parser.add_argument(
        "--max-seconds",
        type=float,
        default=460.0,
        help="end the programs that a part starts after this time, and start none that would take"
        " longer (%(default)g)",
    )
    parser.add_argument(
        "--select", metavar="EXPRESSION", help="memcheck: only these tests, as pytest's -k"
    )
    parser.add_argument(
        "--rows",
        type=lambda text: tuple(text.split(",")),
        default=(),
        metavar="ROW[,…]",
        help="loading: only these (all)",
    )
    parser.add_argument(
        "--duration",
        type=parse_seconds,
        default=30.0,
        metavar="SECONDS",
        help="loading: how long requests arrive in each measured run (%(default)g)",
    )
    options = parser.parse_args(arguments)
    begin_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as work:
        out = options.out.absolute()
        setting = Setting(
            options.device,
            options.tiny,
            Path(work),
            out,
            options.max_seconds,
            options.select,
            options.rows,
            options.duration,
        )
        try:
            report = PARTS[options.part](setting)
        except InvalidRequest as error:
            parser.error(error.message)
    report.details["seconds"] = time.monotonic() - begin_s
    path = report.write(out)
    print(report.table())
    print(f"{report.details['seconds']:.0f} s, written to {path}")
    return 0 if options.tiny or report.all_met else 1


if __name__ == "__main__":
    sys.exit(main())
