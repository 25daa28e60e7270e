"""One way to tell a user what is wrong: a sentence on stderr and a non-zero exit, never a traceback."""

import sys
from collections.abc import Callable


class InputError(Exception):
    """Bad input that the user can mend. The message says what is wrong, where, and which flag mends it."""


def run_script(main: Callable[[], int | None]) -> None:
    """Call a script's `main`; an `InputError` becomes one line on stderr and exit status 2."""
    try:
        sys.exit(main())
    except InputError as error:
        sys.exit(_report(error))


def _report(error: InputError) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 2
