import re
from pathlib import Path

from reporting import overview

SVG = overview.OUTPUT


def words(path: Path) -> set[str]:
    """What the drawing says: matplotlib leaves each text as a comment beside its glyphs."""
    return set(re.findall(r"<!-- (.*?) -->", path.read_text(encoding="utf-8")))


def test_the_committed_figure_names_networks_losses_and_where_they_apply():
    losses = {rf"$\mathcal{{L}}_\mathrm{{{name}}}$" for name in ("seg", "mask", "con")}
    assert words(SVG) >= {"$M_s$", "$M_d$", r"$\sigma(-k\,z)$", "all scans", "labeled scans only", *losses}


def test_the_committed_figure_is_what_the_script_draws(monkeypatch, tmp_path):
    monkeypatch.setattr(overview, "OUTPUT", tmp_path / "overview.svg")
    overview.main()
    assert words(tmp_path / "overview.svg") == words(SVG)
    pictures = [path.read_text(encoding="utf-8").count("<image") for path in (tmp_path / "overview.svg", SVG)]
    assert pictures[0] == pictures[1] >= 4
