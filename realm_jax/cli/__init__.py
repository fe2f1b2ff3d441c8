"""The command line: `realm` (see `realm --help`). Exit codes: 0; 2 with one line `error: ...` for anything the user can
mend; 130 after Ctrl-C; 141 when the reader of the output went away; 1 for a defect of Realm itself."""

import sys


def main() -> None:
    """Run the command line of sys.argv and exit."""
    try:
        from realm_jax.cli.app import run

        code = run(sys.argv[1:])
    except KeyboardInterrupt:  # while modules were being imported
        code = 130
    sys.exit(code)
