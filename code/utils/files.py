"""Files that are written whole or not at all, and paths as the flags mean them."""

import contextlib
import errno
import json
import os
import shlex
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from utils.errors import InputError

REPOSITORY = Path(__file__).resolve().parents[2]


PARTIAL = ".partial"  # end of the name of a file that is still being written
NAME_SHOWN = 40  # letters of the name of a file in that of its partial one, which systems limit


def from_here(path: str) -> str:
    """A path that a user typed, relative to the current folder, as options hold it: within the repository relative to
    that, so that a run can be copied with it; else absolute.
    """
    absolute = Path(os.path.abspath(path))
    return str(absolute.relative_to(REPOSITORY) if absolute.is_relative_to(REPOSITORY) else absolute)


def repository_path(path: str | Path) -> Path:
    """A path that options hold: relative ones, such as the defaults, start at the repository."""
    return REPOSITORY / path


def shown(path: Path) -> str:
    """A path as it can be typed: relative to the current folder for what lies in it, quoted for a shell."""
    here = Path.cwd()
    return shlex.quote(str(path.relative_to(here) if path.is_relative_to(here) else path))


def is_utf8(name: str) -> bool:
    """Whether a name from the file system can be written to a text file: bytes of other encodings cannot."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


@contextlib.contextmanager
def writing(path: Path, flag: str = "--model_path") -> Iterator[None]:
    """Whatever keeps `path` from being written becomes an `InputError` that names it, and the flag of its place."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = f"make room, or give another {flag}" if full else f"give another {flag}"
        raise InputError(f"cannot write {path}: {error.strerror or error}; {remedy}") from error


@contextlib.contextmanager
def atomic(path: Path, flag: str = "--model_path") -> Iterator[Path]:
    """A temporary path beside `path` that takes its place once everything is on the disk, or vanishes."""
    with writing(path, flag):
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:NAME_SHOWN]}.", suffix=PARTIAL)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):  # gone after a success; else the first error is the one to report
                temporary.unlink()


def require_writable(path: Path, flag: str) -> None:
    """Refuse a file that cannot be written before the work whose result it is to hold."""
    with writing(path, flag), tempfile.TemporaryFile(dir=path.parent):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))


def write_json(path: Path, content: Any, flag: str = "--model_path") -> None:
    """Strict JSON, whole or not at all; NaN and infinity are a ValueError."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    with atomic(path, flag) as temporary:
        temporary.write_text(text)
