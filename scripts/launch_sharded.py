#!/usr/bin/env python3
"""A model over several processes: scripts/launch_sharded.py --help"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from benchmarks.environment import ROOT, enter


def main() -> int:
    enter()
    sys.path.insert(1, str(ROOT))
    from realm_jax.cli.launching import main

    return main(sys.argv[1:])


raise SystemExit(main())
