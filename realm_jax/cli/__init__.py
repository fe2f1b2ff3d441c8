"""The command line: `realm` (see `realm --help`). Exit codes: 0; 2 with one line `error: ...` for anything the user can
mend; 130 after Ctrl-C; 141 when the reader of the output went away; 1 for a defect of Realm itself."""

import os
import sys


def main() -> None:
    """Run the command line of sys.argv and exit."""
    open_standard_streams()
    try:
        from realm_jax.cli.app import run

        code = run(sys.argv[1:])
    except KeyboardInterrupt:  # while modules were being imported
        code = 130
    sys.exit(code)


def open_standard_streams() -> None:
    """What the caller has closed is /dev/null: no file opened later may get its number and what is written there."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  (open for as long as the process)
