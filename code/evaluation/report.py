"""One self-contained HTML page on tested runs: tables, distributions, slices, surfaces, curves. Opens offline.

The page is made from what a test has written (metrics.json, curves.csv, predictions) and, for its slices, from the
scans. Its parts lie in evaluation/page/; plotly draws the plots, from a copy within the page.
"""

import base64
import dataclasses
import gzip
import html
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from plotly.offline import get_plotlyjs

from dataloaders import case_files
from evaluation.colors import look
from evaluation.comparison import TestedRun, comparison_note, comparison_rows, group_seeds
from evaluation.figures import GRAYS, LABEL, LABEL_COLOR, SCALE_BARS_MM, gray_window, informative_voxel
from evaluation.metrics import summarise
from evaluation.provenance import facts, options, output_name
from evaluation.statistics import agreement
from evaluation.surfaces import mesh, sample, signed_surface_distance
from evaluation.tables import ALL_METRIC_COLUMNS, FILTER_NAMES, class_names, columns_of, mean_sd, pick
from runtime.journal import read_curves
from utils import files
from utils.labels import MEAN
from utils.nifti import axes_are_lps
from utils.words import counted

PAGE = Path(__file__).parent / "page"
SCRIPTS = ("report.js", "plots.js", "slices.js", "surfaces.js", "start.js")  # each builds on those before
TRIANGLES = 6000  # of a surface at most
POINT_MM = 0.05  # steps of a stored surface point; 16 bits reach 1.6 m
DISTANCE_VOX = 0.01  # steps of a stored distance
CURVE_POINTS = 400  # of a curve at most
NO_CURVES = ("iteration", "data_wait")
VOLUME_ERROR = "volume_error_ml"  # |prediction - label|, which only the page shows
HIGH_IS_GOOD = ("dice", "jaccard")


def write_report(
    path: Path, title: str, runs: Sequence[TestedRun], blocks: Sequence[str] = (), flag: str = "--model_path"
) -> None:
    """Write the page, whole or not at all.

    Args:
        runs: the runs, the one that differences are taken to first.
        blocks: texts to show as they are below the summary.
        flag: the one that says where the page goes.
    """
    cases = list(dict.fromkeys(case for run in runs for case in run.reported))
    views = _views(runs)
    method = {id(run): number for number, group in enumerate(group_seeds(runs)) for run in group}
    data = {
        "metrics": _metrics(runs),
        "runs": [
            {"name": run.name, "method": method[id(run)], **look(index)}
            | {"curves": _curves(run.folder), "agreement": _agreement(run)}
            for index, run in enumerate(runs)
        ],
        "cases": _cases(runs, cases),
        "classes": [{"name": name, **look(index)} for index, name in enumerate(class_names(runs[0].content))],
        "view": runs[0].of,
        "views": {
            name: {"cases": _cases(of_class, cases), "agreements": [_agreement(run) for run in of_class]}
            for name, of_class in views.items()
        },
        "label": {"name": LABEL, "color": LABEL_COLOR},
        "bars": SCALE_BARS_MM,
        "volumes": {case: _volume(case, runs) for case in cases} if all(s.root for s in runs) else None,
    }
    page = (PAGE / "report.html").read_text(encoding="utf-8")
    parts = {
        "title": html.escape(title),
        "subtitle": html.escape(f"{counted(len(cases), 'case')}; {_lists(runs)}"),
        "summary": _of_each(views, runs, _summary),
        "note": html.escape(comparison_note(runs)),
        "outputs": _of_each(views, runs, _outputs),
        "paper": _printed(blocks),
        "agreement": _of_each(views, runs, _agreement_table),
        "facts": _side_by_side(runs, [facts(run) for run in runs]),
        "options": _side_by_side(runs, [options(run) for run in runs]),
        "css": (PAGE / "report.css").read_text(encoding="utf-8"),
        "data": json.dumps(data, allow_nan=False).replace("</", "<\\/"),
        "plotly": get_plotlyjs(),
        "script": "\n".join((PAGE / name).read_text(encoding="utf-8") for name in SCRIPTS),
    }
    pieces = page.split("{{")  # not one replacement after another: a part may hold the mark of a later one
    text = pieces[0] + "".join(parts[name] + rest for name, rest in (piece.split("}}", 1) for piece in pieces[1:]))
    with files.atomic(path, flag) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _views(runs: Sequence[TestedRun]) -> dict[str, Sequence[TestedRun]]:
    """The runs of the mean over classes, and of each class that all of them have; {} for one class."""
    names = [name for name in runs[0].by_class if all(name in run.by_class for run in runs)]
    if not names:
        return {}
    return {name: [dataclasses.replace(run, of=name) for run in runs] for name in (MEAN, *names)}


# --- tables


def _of_each(
    views: Mapping[str, Sequence[TestedRun]], runs: Sequence[TestedRun], table: Callable[[Sequence[TestedRun]], str]
) -> str:
    """A table of the runs; with several classes one for each, of which the page shows that of its switch."""
    parts = (f'<div data-class="{html.escape(name)}">{table(of_class)}</div>' for name, of_class in views.items())
    return "".join(parts) or table(runs)


def _lists(runs: Sequence[TestedRun]) -> str:
    """Which test list; the challenge's own is called official, and no other."""
    data = [run.content.get("data", {}) for run in runs]
    if all(found.get("official") for found in data):
        return "the official lists of the left atrium challenge"
    named = dict.fromkeys(Path(found["test_list"]).name for found in data if "test_list" in found)
    return ", ".join([*(f"test list {name}" for name in named), counted(len(runs), "run")])


def _row(cells: Sequence[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return _framed(_row(header, "th"), (_row(row, "td") for row in rows))


def _framed(head: str, rows: Iterable[str]) -> str:
    table = f"<table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<div class="scroll" tabindex="0">{table}</div>'


def _summary(runs: Sequence[TestedRun]) -> str:
    """The comparison as the terminal has it; outputs by the names that a reader knows."""
    header, rows = comparison_rows(runs)
    header = [heading.replace("95 %", "95\N{NO-BREAK SPACE}%") for heading in header]
    return _table(header, [[row[0], ", ".join(map(output_name, row[1].split(", "))), *row[2:]] for row in rows])


def _outputs(runs: Sequence[TestedRun]) -> str:
    """mean ± sd of every run, output and filter."""
    columns = columns_of([score for run in runs for score in run.scores])
    rows = []
    for run in runs:
        for head, post in dict.fromkeys((score["head"], score["post"]) for score in run.scores):
            summary = summarise(pick(run.scores, head, post))
            star = " ★" if (head, post) == run.kind else ""
            means = (mean_sd(metric, summary[metric]) for metric in columns)
            rows.append([run.name, output_name(head), f"{FILTER_NAMES[post]}{star}", *means])
    return _table(["run", "output", "filter", *columns.values()], rows)


def _printed(blocks: Sequence[str]) -> str:
    given = dict.fromkeys(filter(None, blocks))
    return "".join(
        f'<div class="paper scroll">{"".join(map(_paragraph, block.split(2 * chr(10))))}</div>' for block in given
    )


def _paragraph(text: str) -> str:
    """A table keeps its columns, a sentence is broken where the page ends."""
    tag = "pre" if "\n" in text.strip() else "p"
    return f"<{tag}>{html.escape(text)}</{tag}>"


def _agreement(run: TestedRun) -> dict[str, float] | None:
    """Mean difference in volume and its limits; None where the scores have no volumes."""
    scores = list(run.reported.values())
    if not all("volume_ml" in score for score in scores):
        return None
    found = agreement([score["label_ml"] for score in scores], [score["volume_ml"] for score in scores])
    return {name: _number(value) for name, value in found._asdict().items()}


def _agreement_table(runs: Sequence[TestedRun]) -> str:
    """Mean volumes, and prediction minus label with the limits of agreement."""
    rows = []
    for run in runs:
        if found := _agreement(run):
            means = [np.mean([s[key] for s in run.reported.values()]) for key in ("label_ml", "volume_ml")]
            low, high = ("-" if found[end] is None else f"{found[end]:+.2f}" for end in ("low", "high"))
            rows.append([run.name, *(f"{mean:.2f}" for mean in means), f"{found['mean']:+.2f}", f"{low} to {high}"])
    header = ["run", "label [mL]", "prediction [mL]", "mean difference [mL]", "95 % limits of agreement [mL]"]
    return _table(header, rows) if rows else ""


def _side_by_side(runs: Sequence[TestedRun], columns: Sequence[dict[str, str]]) -> str:
    """A row for each fact that any run has: a cell for every run, or one for all where they agree."""
    rows = []
    for name in dict.fromkeys(name for of_run in columns for name in of_run):
        values = [of_run.get(name, "") for of_run in columns]
        if not any(values):
            continue
        same = len(set(values)) == 1
        cells = values[:1] if same else values
        wide = f' colspan="{len(values)}"' if same else ""
        cells = "".join(f"<td{wide}>{html.escape(value) or '–'}</td>" for value in cells)
        rows.append(f"<tr><td>{html.escape(name)}</td>{cells}</tr>")
    return _framed(_row(["", *(run.name for run in runs)], "th"), rows)


# --- data of the script


def _metrics(runs: Sequence[TestedRun]) -> list[dict[str, Any]]:
    """What every run has, and whether it is plotted: a distance in mm rather than in voxels."""
    found = columns_of([score for run in runs for score in run.scores])
    has_mm = "asd_mm" in found
    metrics = [
        {"key": key, "heading": heading, "factor": ALL_METRIC_COLUMNS[key][1], "decimals": ALL_METRIC_COLUMNS[key][2]}
        | {"low": key not in HIGH_IS_GOOD, "plotted": not (has_mm and key.endswith("_vox"))}
        for key, heading in found.items()
    ]
    if all("volume_ml" in score for run in runs for score in run.reported.values()):
        error = {"key": VOLUME_ERROR, "heading": "Volume error [mL]", "factor": 1, "decimals": 2}
        metrics.append(error | {"low": True, "plotted": False})
    return metrics


def _curves(folder: Path) -> dict[str, dict[str, list[float | None]]]:
    """Each column of curves.csv over the iterations that have it, thinned; a value that is not finite is a gap."""
    rows, curves = read_curves(folder), {}
    for name in dict.fromkeys(name for row in rows for name in row if name not in NO_CURVES):
        points = [(row["iteration"], _number(row[name])) for row in rows if name in row]  # validation has own rows
        kept = np.linspace(0, len(points) - 1, min(len(points), CURVE_POINTS)).astype(int)  # first and last among them
        curves[name] = {"x": [points[index][0] for index in kept], "y": [points[index][1] for index in kept]}
    return curves


def _cases(runs: Sequence[TestedRun], cases: Sequence[str]) -> list[dict[str, Any]]:
    return [{"id": case, "scores": [_scores(run, case) for run in runs]} for case in cases]


def _scores(run: TestedRun, case: str) -> dict[str, float | None] | None:
    row = run.reported.get(case)
    if row is None:
        return None
    scores = {key: _number(row[key]) for key in (*ALL_METRIC_COLUMNS, "volume_ml", "label_ml") if key in row}
    if "volume_ml" in row:
        scores[VOLUME_ERROR] = abs(row["volume_ml"] - row["label_ml"])
    return scores


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _volume(case: str, runs: Sequence[TestedRun]) -> dict[str, Any]:
    """A scan, its label maps and their surfaces, packed; None for one that was not written or is on another grid.

    Scan and label are those of the first run that was tested on the case. Of several classes a surface is a list.
    """
    root = next(run.root for run in runs if case in run.reported)
    image, (spacing, _, direction) = case_files.read_image(root, case), case_files.read_geometry(root, case)
    classes = max(1, len(class_names(runs[0].content)))
    label = case_files.read_label(root, case, classes)
    maps = [label, *(_prediction(run.masks, case, label.shape) for run in runs)]
    surfaces = [_surfaces(maps, number, spacing) for number in range(1, classes + 1)]
    low, high = gray_window(image)
    levels = np.clip((image - low) / (high - low) * (GRAYS - 1), 0, GRAYS - 1).round().astype(np.uint8)
    return {
        "shape": list(image.shape),
        "spacing": [float(size) for size in spacing],
        "anatomical": axes_are_lps(direction),  # else no sides are named
        "centre": informative_voxel({LABEL: label > 0}, label.shape),
        "image": pack(residual(levels)),
        "masks": [None if found is None else pack(found if classes > 1 else np.packbits(found > 0)) for found in maps],
        "surfaces": surfaces[0] if classes == 1 else [list(of_map) for of_map in zip(*surfaces, strict=True)],
    }


def _prediction(folder: Path | None, case: str, shape: Sequence[int]) -> np.ndarray | None:
    path = folder and folder / f"{case}.nii.gz"
    if path is None or not path.exists():
        return None
    found = np.asarray(nib.load(path).dataobj)
    return found.astype(np.uint8) if found.shape == shape else None


def _surfaces(maps: Sequence[np.ndarray | None], number: int, spacing: Sequence[float]) -> list[dict[str, Any] | None]:
    """A class in every label map, the label the first, to whose surface the distances are."""
    masks = [None if found is None else found == number for found in maps]
    label = masks[0]
    distance = signed_surface_distance(label) if label.any() and not label.all() else np.zeros(label.shape)
    return [_surface(mask, distance, spacing) for mask in masks]


def _surface(mask: np.ndarray | None, distance: np.ndarray, spacing: Sequence[float]) -> dict[str, Any] | None:
    """Triangles in mm, and at each point the distance to the label's surface in voxels; None for no surface."""
    if mask is None or not mask.any():
        return None
    surface = mesh(mask, TRIANGLES)
    wide = np.uint16 if len(surface.vertices) <= 1 << 16 else np.uint32
    return {
        "points": _steps(surface.vertices * spacing, POINT_MM),
        "faces": pack(surface.faces.astype(wide)),
        "bytes": wide().itemsize,
        "distance": _steps(sample(distance, surface.vertices), DISTANCE_VOX),
        "steps": [POINT_MM, DISTANCE_VOX],
    }


def residual(levels: np.ndarray) -> np.ndarray:
    """Each voxel minus the mean of those before it along the first two axes, modulo 256: a quarter less once packed."""
    before = np.pad(levels.astype(np.int16), ((1, 0), (1, 0), (0, 0)))
    return (levels - (before[:-1, 1:] + before[1:, :-1]) // 2).astype(np.uint8)


def pack(values: np.ndarray) -> str:
    """Bytes of an array in C order, gzip, base64; the same bytes for the same array."""
    return base64.b64encode(gzip.compress(np.ascontiguousarray(values).tobytes(), 6, mtime=0)).decode()


def _steps(values: np.ndarray, step: float) -> str:
    """Values rounded to whole steps, 16 bits each: a third of the bytes of floats once they are packed."""
    return pack(np.clip(np.rint(values / step), -(1 << 15), (1 << 15) - 1).astype(np.int16))
