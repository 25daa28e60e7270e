"""The HTML report: what it carries equals what was tested, and a real browser shows it without an error."""

import base64
import dataclasses
import gzip
import html
import json
import re
import shutil
import subprocess
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest

from dataloaders import case_files
from evaluation.comparison import TestedRun, comparison_rows
from evaluation.metrics import class_mean, evaluate
from evaluation.report import CURVE_POINTS, GRAYS, pack, write_report
from runtime import runs
from runtime.journal import Journal
from utils.labels import MEAN
from utils.nifti import write_nifti

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = "--headless=new --no-sandbox --disable-gpu --enable-unsafe-swiftshader --use-angle=swiftshader "
FLAGS += "--disable-background-networking --no-first-run --window-size=1400,1000"
VISIT = Path(__file__).with_name("visit.js")  # what a visitor does
CURVES = "iteration,loss/seg,validation/dice\n10,0.5,\n20,nan,\n20,,0.7\n30,0.1,\n40,0.1,\n40,,0.8\n"


def make_run(name: str, root, folder, cases, shift: int, classes=()) -> TestedRun:
    """A tested run: the label moved by some voxels as its prediction; `shift` 0 predicts nothing in the last case."""
    rows = []
    for case in cases:
        label = case_files.read_label(root, case, max(1, len(classes)))
        mask = np.roll(label, shift, axis=0)
        if shift == 0 and case == cases[-1]:
            mask = np.zeros_like(mask)
        (folder / runs.PREDICTIONS).mkdir(parents=True, exist_ok=True)
        write_nifti(folder / runs.PREDICTIONS / f"{case}.nii.gz", mask, (1.0, 1.0, 1.0))
        numbers = range(1, 1 + max(1, len(classes)))
        scores = [evaluate(mask == number, label == number, (1.0, 1.0, 1.0)) for number in numbers]
        if classes:
            scores = [
                {"class": one, **s} for one, s in zip((*classes, MEAN), (*scores, class_mean(scores)), strict=True)
            ]
        for values in scores:
            values = {key: None if value != value else value for key, value in values.items()}  # NaN is null
            rows.append({"case": case, "head": "seg", "post": "none", **values})
    (folder / runs.CURVES).write_text(CURVES)
    reported = {"head": "seg", "post": "none"}
    scores = {"reported": reported, "iteration": 30, "options": {"preset": "cpu"}, "cases": rows}
    scores |= (
        {"classes": [{"name": one, "values": [1]} for one in classes], "class_summary": dict.fromkeys(classes)}
        if classes
        else {}
    )
    return TestedRun(name, scores, folder, folder / runs.PREDICTIONS, root)


@pytest.fixture
def page(phantom, tmp_path):
    """A report on two runs over two phantom scans."""
    cases = case_files.read_list(phantom / "test.list", "--test_list")[:2]
    systems = [make_run(f"run <{shift}>", phantom, tmp_path / str(shift), cases, shift) for shift in (2, 0)]
    write_report(tmp_path / runs.REPORT, "a & b", systems, blocks=["printed\n\nDice\n90.12"])
    return tmp_path / runs.REPORT, cases, systems


def carried(path) -> dict:
    (data,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', path.read_text(), re.DOTALL)
    return json.loads(data)


def grays(stored: dict) -> np.ndarray:
    """The gray levels of a stored scan, restored as the page does it."""
    levels = np.frombuffer(gzip.decompress(base64.b64decode(stored["image"])), np.uint8).reshape(stored["shape"]).copy()
    for x, y in np.ndindex(levels.shape[:2]):
        before = (levels[x - 1, y].astype(int) if x else 0) + (levels[x, y - 1] if y else 0)
        levels[x, y] += np.asarray(before // 2, np.uint8)
    return levels


def test_volumes_come_back_as_they_were(page, phantom):
    path, cases, _ = page
    stored = carried(path)["volumes"][cases[0]]
    image, label = case_files.read_image(phantom, cases[0]), case_files.read_label(phantom, cases[0])
    levels = grays(stored)
    assert levels.max() == GRAYS - 1
    assert np.corrcoef(levels.ravel(), np.clip(image, *np.percentile(image, (1, 99.5))).ravel())[0, 1] > 0.999
    masks = [np.unpackbits(np.frombuffer(gzip.decompress(base64.b64decode(m)), np.uint8)) for m in stored["masks"]]
    assert (masks[0][: label.size].reshape(label.shape) == label).all()
    assert (masks[1][: label.size].reshape(label.shape) == np.roll(label, 2, axis=0)).all()
    assert stored["centre"][2] == label.sum(axis=(0, 1)).argmax()


def test_scores_are_those_of_the_test_and_a_missed_case_has_none(page):
    path, cases, systems = page
    data = carried(path)
    assert [case["id"] for case in data["cases"]] == cases
    assert data["cases"][0]["scores"][0]["dice"] == systems[0].scores[0]["dice"]
    missed = data["cases"][1]["scores"][1]
    assert missed["dice"] == 0 and missed["hd95_vox"] is None
    assert data["volumes"][cases[1]]["surfaces"][2] is None
    assert "(1 missed)" in path.read_text()


def test_the_first_table_is_the_terminals_and_volumes_are_in_ml(page):
    path, cases, systems = page
    text = html.unescape(path.read_text())
    assert all(cell in text for row in comparison_rows(systems)[1] for cell in row[2:])
    data, label = carried(path), systems[0].reported[cases[0]]["label_ml"]
    assert data["cases"][0]["scores"][0]["label_ml"] == label
    differences = [run["agreement"]["mean"] for run in data["runs"]]
    assert differences[0] == pytest.approx(0, abs=1e-9) and differences[1] == pytest.approx(-label / 2, rel=0.5)
    assert [metric["key"] for metric in data["metrics"] if metric["plotted"]] == [
        "dice",
        "jaccard",
        "asd_mm",
        "hd95_mm",
    ]


def test_runs_side_by_side_share_a_cell_where_they_agree(page):
    (table,) = re.findall(r"<td>weights</td>(.*?)</tr>", page[0].read_text())
    assert table == '<td colspan="2">last, iteration 30</td>'
    _, _, systems = page
    other = dataclasses.replace(systems[1], content=systems[1].content | {"iteration": 60})
    write_report(page[0], "t", [systems[0], other])
    (table,) = re.findall(r"<td>weights</td>(.*?)</tr>", page[0].read_text())
    assert table == "<td>last, iteration 30</td><td>last, iteration 60</td>"


def test_surface_distance_of_a_shifted_label(page):
    path, cases, _ = page
    stored = carried(path)["volumes"][cases[0]]["surfaces"][1]
    distance = np.frombuffer(gzip.decompress(base64.b64decode(stored["distance"])), np.int16) * stored["steps"][1]
    assert -2.6 < distance.min() < -0.8 and 0.8 < distance.max() < 2.6


def test_curves_have_their_own_iterations_and_a_gap_where_a_value_is_not_finite(page):
    assert carried(page[0])["runs"][0]["curves"] == {
        "loss/seg": {"x": [10, 20, 30, 40], "y": [0.5, None, 0.1, 0.1]},
        "validation/dice": {"x": [20, 40], "y": [0.7, 0.8]},
    }


def test_a_long_curve_is_thinned_from_end_to_end_and_a_short_one_beside_it_is_not(page):
    path, _, systems = page
    journal = Journal(systems[0].folder)
    for iteration in range(10, 6001, 10):
        journal.scalars(iteration, {"loss/seg": 1 / iteration, "data_wait": 0.0})
        if iteration % 1000 == 0:
            journal.scalars(iteration, {"validation/dice": iteration / 6000})
    journal.close()
    write_report(path, "t", systems[:1])
    curves = carried(path)["runs"][0]["curves"]
    loss, dice = curves.pop("loss/seg"), curves.pop("validation/dice")
    assert not curves and dice["x"] == [1000, 2000, 3000, 4000, 5000, 6000] and dice["y"][-1] == 1
    assert len(set(loss["x"])) == CURVE_POINTS and (loss["x"][0], loss["x"][-1]) == (10, 6000)
    assert loss["y"] == [1 / iteration for iteration in loss["x"]]


def test_names_are_escaped_and_the_papers_metrics_stand_apart(page):
    text = page[0].read_text()
    assert "<h1>a &amp; b</h1>" in text and "run &lt;2&gt;" in text and "run <2>" not in text.split("<script")[0]
    assert re.search(r'<div class="paper scroll"><p>printed</p><pre>Dice\n90.12</pre></div>', text)


def test_without_scans_there_are_no_volumes(phantom, tmp_path):
    cases = case_files.read_list(phantom / "test.list", "--test_list")[:1]
    system = make_run("one", phantom, tmp_path / "one", cases, 1)
    write_report(tmp_path / "r.html", "t", [dataclasses.replace(system, root=None)])
    assert carried(tmp_path / "r.html")["volumes"] is None


@pytest.mark.parametrize("axes", [(1, 0, 0, 0, 1, 0, 0, 0, 1), (0, 1, 0, 1, 0, 0, 0, 0, 1)])
def test_sides_are_named_only_where_the_axes_are_the_patients(axes, phantom, tmp_path, monkeypatch):
    monkeypatch.setattr(case_files, "read_geometry", lambda root, case: ((0.5, 1.0, 2.0), (0, 0, 0), axes))
    cases = case_files.read_list(phantom / "test.list", "--test_list")[:1]
    write_report(tmp_path / "r.html", "t", [make_run("one", phantom, tmp_path / "one", cases, 1)])
    stored = carried(tmp_path / "r.html")["volumes"][cases[0]]
    assert stored["spacing"] == [0.5, 1.0, 2.0] and stored["anatomical"] == (axes[0] == 1)


def test_each_run_is_read_from_its_own_folder(phantom, tmp_path):
    cases = case_files.read_list(phantom / "test.list", "--test_list")
    shutil.copytree(phantom / cases[1], tmp_path / "scans" / "elsewhere")
    systems = [make_run("one", phantom, tmp_path / "one", cases[:1], 1)]
    systems.append(make_run("two", tmp_path / "scans", tmp_path / "two", ["elsewhere"], 1))
    write_report(tmp_path / "r.html", "t", systems)
    volumes = carried(tmp_path / "r.html")["volumes"]
    assert list(volumes) == [cases[0], "elsewhere"]
    label = np.unpackbits(np.frombuffer(gzip.decompress(base64.b64decode(volumes["elsewhere"]["masks"][0])), np.uint8))
    assert label.sum() == case_files.read_label(phantom, cases[1]).sum()


@pytest.fixture
def class_page(two_classes, tmp_path):
    """A report on two runs with two classes."""
    cases, names = case_files.read_list(two_classes / "test.list", ""), ("atrium", "appendage")
    tested = [make_run(f"r{shift}", two_classes, tmp_path / str(shift), cases, shift, names) for shift in (1, 0)]
    write_report(tmp_path / runs.REPORT, "classes", tested)
    return tmp_path / runs.REPORT, cases, tested


def test_every_class_has_its_tables_scores_and_surfaces(class_page, two_classes):
    path, cases, tested = class_page
    data, text = carried(path), html.unescape(path.read_text())
    assert [one["name"] for one in data["classes"]] == ["atrium", "appendage"] and data["view"] == MEAN
    assert data["cases"] == data["views"][MEAN]["cases"]
    for name, view in data["views"].items():
        own = [dataclasses.replace(run, of=name) for run in tested]
        assert view["cases"][0]["scores"][0]["dice"] == own[0].reported[cases[0]]["dice"]
        assert all(cell in text for row in comparison_rows(own)[1] for cell in row[2:])
    assert view["cases"][1]["scores"][1]["dice"] == 0 and text.count('data-class="appendage"') == 3
    stored = data["volumes"][cases[0]]
    label = case_files.read_label(two_classes, cases[0], 2)
    packed = np.frombuffer(gzip.decompress(base64.b64decode(stored["masks"][0])), np.uint8)
    np.testing.assert_array_equal(packed.reshape(label.shape), label)
    assert all(len(of_map) == 2 and all(of_map) for of_map in stored["surfaces"])
    assert data["volumes"][cases[1]]["surfaces"][2] == [None, None]


def test_equal_arrays_pack_to_equal_text():
    assert pack(np.arange(1000)) == pack(np.arange(1000))


def visit(path, folder, *flags: str) -> dict:
    """What a visitor finds on a page in a real browser, in real time: with virtual time it draws no frames."""
    found = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self):
            found.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Receiver) as server:
        server.timeout = 120
        address = f"http://127.0.0.1:{server.server_port}/"
        script = f"<body><script>const ADDRESS = '{address}';\n{VISIT.read_text()}</script>"
        text = path.read_text().replace("<body>", script, 1).replace("'none';", f"'none'; connect-src {address};", 1)
        (folder / "visited.html").write_text(text)
        command = [CHROMIUM, *FLAGS.split(), *flags, f"--user-data-dir={folder / 'profile'}"]
        browser = subprocess.Popen([*command, (folder / "visited.html").as_uri()], stderr=subprocess.DEVNULL)
        try:
            server.handle_request()
        finally:
            browser.terminate()
            browser.wait(20)
    result = json.loads(found[0])
    assert result["failures"] == []
    return result


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_shows_it(page, phantom, tmp_path):
    path, cases, _ = page
    result = visit(path, tmp_path)
    assert result["moved"] and result["windowed"] and result["slice"].startswith("1 /")
    assert result["grays"] == grays(carried(path)["volumes"][result["worst"][0]]).sum()
    assert result["looks"] == 4  # outline, fill and its opacity
    assert result["keyed"].startswith("12 /") and result["next"] == [result["worst"][1]] * 2
    assert "#viewer" in result["page"]["links"] and result["page"]["overflow"] <= 0
    assert result["surface"] and result["boxes"] >= 4 and result["differences"] == 4
    assert [name for name in result["requests"] if not name.startswith(("file:", "data:", "blob:"))] == []
    assert sorted(result["worst"]) == sorted(cases) and result["best"] == result["worst"][::-1]
    # the second run missed the last case: the worst of its distances, whichever way these are sorted
    assert result["distance"] == {"worst": cases[::-1], "best": cases, "arrow": "ascending"}
    assert result["order"] == "Sorted by 95HD [vox] of run <0>, best first."
    # 20 mm is the longest bar that takes at most a quarter of either side, 100 and 90 mm
    width = np.multiply(case_files.read_shape(phantom, cases[0]), case_files.read_spacing(phantom, cases[0]))
    assert result["bars"] == pytest.approx([20 / width[1], 20 / width[0], 20 / width[0]], rel=0.02)
    # surfaces turn, both as one, while they are seen and until somebody drags
    assert result["turned"] > 0.2 and result["together"] and result["again"] > 0.2
    assert result["unseen"] == 0 and result["dragged"] == 0
    # three losses, one beyond a gap, and two validations of each run
    assert result["curves"] == [{"points": 6, "lines": 2}, {"points": 4, "lines": 2}]
    assert result["followed"] == {"x": 0, "y": 2, "z": 0}
    assert [len(set(shown)) for shown in result["colors"]] == [1, 1] and result["colors"][0][0] != result["colors"][1][
        0
    ]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_switches_the_class(class_page, tmp_path):
    path, cases, tested = class_page
    result = visit(path, tmp_path)["classes"]
    assert list(result) == [MEAN, "atrium", "appendage"]
    assert [one["tables"] for one in result.values()] == [[name] * 3 for name in result]
    assert [one["surfaces"] for one in result.values()] == [4, 2, 2]
    assert [one["byDistance"] for one in result.values()] == [False, True, True]
    assert len({one["plane"] for one in result.values()}) == 3  # contours of both, of one, of the other
    expected = [dataclasses.replace(tested[0], of=name).reported[cases[0]]["dice"] for name in result]
    assert [one["dice"] for one in result.values()] == expected


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_on_a_small_dark_screen_with_less_motion(page, tmp_path):
    flags = ("--force-prefers-reduced-motion", "--blink-settings=preferredColorScheme=0", "--window-size=390,844")
    result = visit(page[0], tmp_path, *flags)
    assert result["turned"] == 0 and result["page"]["overflow"] <= 0 and result["page"]["width"] <= 500
    dark, bright = (
        [int(part, base) for part in re.findall(pattern, result["page"][name])]
        for name, pattern, base in (("ground", r"\d+", 10), ("ink", "[0-9a-f]{2}", 16))
    )
    assert max(dark) < 50 and min(bright) > 200
