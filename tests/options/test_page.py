"""docs/options.md says what the commands take."""

import runpy

from utils.files import REPOSITORY


def test_the_page_of_all_flags_is_true():
    page = runpy.run_path(str(REPOSITORY / "docs" / "make_options.py"))["page"]
    text = (REPOSITORY / "docs" / "options.md").read_text(encoding="utf-8")
    assert page() == text, "run python docs/make_options.py"
