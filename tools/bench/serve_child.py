"""``sidestream serve`` that ends with the process that measures it, however that one ends.

``python -m tools.bench.serve_child PARENT_PID MODEL …``
"""

import sys

from ipc.process import die_with_parent
from tools.cli import main

if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]))
    sys.exit(main(["serve", *sys.argv[2:]]))
