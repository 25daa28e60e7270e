"""Files that are written whole or not at all, and paths as the flags mean them."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from utils.errors import InputError

REPOSITORY = Path(__file__).resolve().parents[2]


def repository_path(path: str | Path) -> Path:
    """A path as the flags mean it: relative ones start at the repository, not at the current folder."""
    return REPOSITORY / path


PARTIAL = ".partial"  # end of the name of a file that is still being written


@contextlib.contextmanager
def writing(path: Path, flag: str = "--model_path") -> Iterator[None]:
    """Whatever keeps `path` from being written becomes an `InputError` that names it, and the flag of its place."""
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}; make room or see {flag}") from error


@contextlib.contextmanager
def atomic(path: Path, flag: str = "--model_path") -> Iterator[Path]:
    """A temporary path beside `path` that takes its place once everything is on the disk, or vanishes."""
    with writing(path, flag):
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=PARTIAL)
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


def write_json(path: Path, content: Any, flag: str = "--model_path") -> None:
    """Strict JSON, whole or not at all; NaN and infinity are a ValueError."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    with atomic(path, flag) as temporary:
        temporary.write_text(text)
