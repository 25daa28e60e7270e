"""One way to tell a user what is wrong: a sentence on stderr and a non-zero exit, never a traceback."""

import io
import sys
from collections.abc import Callable

BAD_INPUT = 2  # exit status, the same that argparse uses
INTERRUPTED = 130  # as shells count: 128 + the number of SIGINT
# packages of requirements-extra.txt
EXTRAS = frozenset("SimpleITK onnx onnxruntime onnxscript openvino pandas plotly pydicom".split())


class InputError(Exception):
    """Bad input that the user can fix. The message says what is wrong, where, and which flag fixes it."""


def run_script(main: Callable[[], int | None]) -> None:
    """Call a script's `main`; bad input, a full disk and Ctrl-C become one line on stderr and an exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal may lack the letters of a file's name
    try:
        status = main()
    except InputError as error:
        status = _report(str(error), BAD_INPUT)
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        status = _report(f"this needs {error.name}: pip install -r requirements-extra.txt", BAD_INPUT)
    except OSError as error:
        if error.errno is None:  # raised by a library about something else than the system
            raise
        where = error.filename or "a file could not be read or written"
        status = _report(f"{where}: {error.strerror}; make room, or see the paths that were given", BAD_INPUT)
    except KeyboardInterrupt:
        status = _report("interrupted", INTERRUPTED)
    sys.exit(status)


def _report(message: str, status: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return status
