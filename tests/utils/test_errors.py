"""What a script prints, and the status it ends with, when something is wrong."""

import errno
import io
import re
import sys

import pytest

from utils.errors import BAD_INPUT, EXTRAS, INTERRUPTED, InputError, run_script
from utils.files import REPOSITORY


def ends_with(main) -> int | None:
    with pytest.raises(SystemExit) as end:
        run_script(main)
    return end.value.code


def fails_with(error: BaseException):
    def main():
        raise error

    return main


@pytest.mark.parametrize("status", [0, None, 143])
def test_the_status_of_main_is_passed_on_and_nothing_is_printed(status, capsys):
    assert ends_with(lambda: status) == status
    assert capsys.readouterr() == ("", "")


def test_bad_input_is_one_line_on_stderr(capsys):
    assert ends_with(fails_with(InputError("no list; see --train_list"))) == BAD_INPUT == 2
    assert capsys.readouterr() == ("", "error: no list; see --train_list\n")


def test_a_full_disk_is_one_line_that_names_the_file(capsys):
    assert ends_with(fails_with(OSError(errno.ENOSPC, "No space left on device", "/x/y.csv"))) == BAD_INPUT
    error = capsys.readouterr().err
    assert error.startswith("error: /x/y.csv: No space left on device; make room") and error.count("\n") == 1


def test_a_name_that_the_console_cannot_show_ends_nothing(monkeypatch):
    console = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", console)
    assert ends_with(lambda: print("M\xfcller.nii") or 0) == 0
    console.flush()
    assert console.buffer.getvalue() == b"M\\xfcller.nii\n"


def test_ctrl_c_is_one_line(capsys):
    assert ends_with(fails_with(KeyboardInterrupt())) == INTERRUPTED == 130
    assert capsys.readouterr().err == "error: interrupted\n"


@pytest.mark.parametrize(
    "error", [ValueError("a bug"), ModuleNotFoundError(name="typo"), OSError("of a library, not of the system")]
)
def test_a_bug_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        run_script(fails_with(error))


def test_a_missing_extra_package_is_named_beside_the_file_that_lists_it(capsys):
    assert ends_with(fails_with(ModuleNotFoundError("No module named 'plotly'", name="plotly"))) == BAD_INPUT
    error = capsys.readouterr().err
    assert "plotly" in error and "requirements-extra.txt" in error


def test_every_extra_package_is_listed_in_its_file_alone():
    lists = {
        name: {re.split(r"[^\w-]", line)[0].lower() for line in (REPOSITORY / name).read_text().splitlines()}
        for name in ("requirements.txt", "requirements-extra.txt")
    }
    extras = {name.lower() for name in EXTRAS}
    assert extras <= lists["requirements-extra.txt"] and not extras & lists["requirements.txt"]
