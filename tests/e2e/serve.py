"""``sidestream serve`` for tests, with fields of the loader's configuration set.

``python -m tests.e2e.serve '{"inject_read_delay_s": 1.0}' serve MODEL …``
"""

import sys
from dataclasses import replace

import msgspec

from tools.cli import make_parser
from tools.serve import plan_server, serve


def main() -> int:
    overrides = msgspec.json.decode(sys.argv[1])
    plan = plan_server(make_parser().parse_args(sys.argv[2:]))
    plan = replace(plan, loader=msgspec.structs.replace(plan.loader, **overrides))
    return serve(plan, lambda server: print(f"ready at {server.url}", flush=True))


if __name__ == "__main__":
    sys.exit(main())
