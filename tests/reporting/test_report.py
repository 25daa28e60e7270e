"""The HTML report: what it carries equals what was tested, and a real browser shows it without an error."""

import base64
import gzip
import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from dataloaders import la_heart
from reporting.nifti import write_nifti
from reporting.report import GRAYS, System, pack, write_report
from utils import runs
from utils.metrics import evaluate

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = "--headless=new --no-sandbox --disable-gpu --enable-unsafe-swiftshader --use-angle=swiftshader "
FLAGS += "--disable-background-networking --no-first-run --window-size=1400,1000 --virtual-time-budget=20000"
# What a visitor does, run within the page once it has drawn the first case.
VISIT = """<script>
const failures = []; window.onerror = (message) => failures.push(message);
const wait = (ms) => new Promise((done) => setTimeout(done, ms));
const pixels = () => document.getElementById("plane-2").toDataURL();
addEventListener("load", async () => {
  await wait(3000);
  const rows = () => [...document.querySelectorAll("#cases tbody tr")].map((row) => row.dataset.case);
  const before = pixels(), worst = rows(), slider = document.getElementById("slice-2");
  slider.value = 0; slider.dispatchEvent(new Event("input"));
  const moved = pixels();
  document.querySelector("#cases th[data-column='0']").click();
  const canvas = document.querySelector("#surfaces canvas");
  const result = { failures, worst, reversed: rows(), moved: moved !== before,
    slice: document.getElementById("at-2").textContent,
    surface: canvas !== null && canvas.width > 0, plots: document.querySelectorAll("#boxes .main-svg").length,
    requests: performance.getEntriesByType("resource").map((entry) => entry.name) };
  const out = document.body.appendChild(document.createElement("pre"));
  out.id = "visit"; out.textContent = JSON.stringify(result);
});
</script>"""


def make_system(name: str, root, folder, cases, shift: int) -> System:
    """A tested run: the label moved by some voxels as its prediction; `shift` 0 predicts nothing in the last case."""
    rows = []
    for case in cases:
        label = la_heart.read_label(root, case)
        mask = np.roll(label, shift, axis=0)
        if shift == 0 and case == cases[-1]:
            mask = np.zeros_like(mask)
        (folder / runs.PREDICTIONS).mkdir(parents=True, exist_ok=True)
        write_nifti(folder / runs.PREDICTIONS / f"{case}.nii.gz", mask, (1.0, 1.0, 1.0))
        scores = evaluate(mask, label)
        values = {key: None if np.isnan(value) else value for key, value in scores.items()}
        rows.append({"case": case, "head": "seg", "post": "none", **values})
    (folder / runs.CURVES).write_text("iteration,loss/seg\n10,0.5\n20,\n30,0.1\n")
    reported = {"head": "seg", "post": "none"}
    return System(name, {"reported": reported, "iteration": 30, "options": {"preset": "cpu"}, "cases": rows}, folder)


@pytest.fixture
def page(phantom, tmp_path):
    """A report on two runs over two phantom scans."""
    cases = la_heart.read_list(phantom / "test.list", "--test_list")[:2]
    systems = [make_system(f"run <{shift}>", phantom, tmp_path / str(shift), cases, shift) for shift in (2, 0)]
    write_report(tmp_path / runs.REPORT, "a & b", systems, phantom, blocks=["printed: 90.12"])
    return tmp_path / runs.REPORT, cases, systems


def carried(path) -> dict:
    (data,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', path.read_text(), re.DOTALL)
    return json.loads(data)


def test_volumes_come_back_as_they_were(page, phantom):
    path, cases, _ = page
    stored = carried(path)["volumes"][cases[0]]
    image, label = la_heart.read_image(phantom, cases[0]), la_heart.read_label(phantom, cases[0])
    levels = np.frombuffer(gzip.decompress(base64.b64decode(stored["image"])), np.uint8).reshape(image.shape)
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
    assert data["cases"][0]["scores"][0]["dice"] == systems[0].scores["cases"][0]["dice"]
    missed = data["cases"][1]["scores"][1]
    assert missed["dice"] == 0 and missed["hd95_vox"] is None
    assert data["volumes"][cases[1]]["surfaces"][2] is None
    assert "(1 missed)" in path.read_text()


def test_surface_distance_of_a_shifted_label(page):
    path, cases, _ = page
    stored = carried(path)["volumes"][cases[0]]["surfaces"][1]
    distance = np.frombuffer(base64.b64decode(stored["distance"]), np.float32)
    assert -2.6 < distance.min() < -0.8 and 0.8 < distance.max() < 2.6


def test_curves_keep_their_gaps(page):
    assert carried(page[0])["systems"][0]["curves"] == {"iteration": [10, 20, 30], "loss/seg": [0.5, None, 0.1]}


def test_names_are_escaped_and_the_printed_figures_stand_apart(page):
    text = page[0].read_text()
    assert "<h1>a &amp; b</h1>" in text and "run &lt;2&gt;" in text and "run <2>" not in text.split("<script")[0]
    assert re.search(r'<div class="paper scroll"><pre>printed: 90.12</pre>', text)


def test_without_scans_there_are_no_volumes(phantom, tmp_path):
    cases = la_heart.read_list(phantom / "test.list", "--test_list")[:1]
    write_report(tmp_path / "r.html", "t", [make_system("one", phantom, tmp_path / "one", cases, 1)])
    assert carried(tmp_path / "r.html")["volumes"] is None


def test_equal_arrays_pack_to_equal_text():
    assert pack(np.arange(1000)) == pack(np.arange(1000))


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_shows_it(page, tmp_path):
    path, cases, _ = page
    visited = tmp_path / "visited.html"
    visited.write_text(path.read_text().replace("<body>", f"<body>{VISIT}", 1))
    command = [CHROMIUM, *FLAGS.split(), f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", visited.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=180).stdout
    (found,) = re.findall(r'<pre id="visit">(.*?)</pre>', dom, re.DOTALL)
    result = json.loads(html.unescape(found))
    assert result["failures"] == []
    assert result["moved"] and result["slice"].startswith("1 /")
    assert result["surface"]
    assert result["plots"] >= 4
    assert sorted(result["worst"]) == sorted(cases) and result["reversed"] == result["worst"][::-1]
    assert [name for name in result["requests"] if not name.startswith(("file:", "data:", "blob:"))] == []
