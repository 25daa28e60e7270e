"""README and docs hold what they say: commands run, in order, and the example is a complete ninth method."""

import contextlib
import importlib
import re
import shlex
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from methods import METHODS
from train import main as train
from utils import files

README = Path(__file__).resolve().parents[1] / "README.md"
DOCS = sorted((README.parent / "docs").glob("*.md"))
PREDICT = README.parent / "docs" / "predict.md"
SHORT = {  # what makes a command small enough for a test; the last of two equal flags wins
    "train": "--labelnum 2 --patch_size 32 32 32 --n_filters 2 --max_iterations 2 --scale 1 --num_workers 0 --amp off "
    "--device cpu --image_every 0",
    "test_LA": "--stride_xy 32 --stride_z 32 --device cpu --skip figures",
    "check_data": "--labelnum 2",
    "predict": "--device cpu",
}
SHORT["train_dtml"] = SHORT["train"]


def blocks(language: str, page: Path = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def commands(page: Path = README) -> list[list[str]]:
    lines = "\n".join(blocks("bash", page)).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("python code/")]


def starts_several_processes(page: Path) -> bool:
    """Its commands need processes of their own, and run in test_torchrun.py."""
    return "torchrun" in "".join(blocks("bash", page))


PAGES = [page for page in [README, *DOCS] if commands(page) and not starts_several_processes(page)]


@pytest.fixture
def repository(phantom, raw_scans, challenge, tmp_path, monkeypatch) -> Path:
    """Where relative paths of the commands start: a folder with the data sets that the pages speak of."""
    scans = shutil.copytree(phantom, tmp_path / "data" / "LA")
    for name in ("train", "test"):
        shutil.copy(scans / f"{name}.list", scans / f"dev_{name}.list")
    shutil.copytree(raw_scans, tmp_path / "raw")
    shutil.copytree(README.parent / "model" / "pretrained", tmp_path / "model" / "pretrained")
    shutil.copytree(challenge, tmp_path / "raw" / "challenge")
    decathlon(raw_scans, tmp_path / "data" / "hippocampus")
    monkeypatch.setattr(files, "REPOSITORY", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def decathlon(raw_scans: Path, folder: Path) -> None:
    """A small Task04_Hippocampus and the table of its scans."""
    task, rows = folder / "Task04_Hippocampus", ["image,label,id,split"]
    for kind in ("images", "labels"):
        shutil.copytree(raw_scans / kind, task / f"{kind}Tr")
    for label in sorted((task / "labelsTr").iterdir()):
        part = "test" if len(rows) == 1 else "train"
        rows.append(f"{task.name}/imagesTr/{label.name},{task.name}/labelsTr/{label.name},,{part}")
    (folder / "scans.csv").write_text("\n".join(rows))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_runs_in_order(page, repository):
    for table in blocks("csv", page):
        (repository / "raw" / "scans.csv").write_text(table)
    for script, *flags in commands(page):
        name = Path(script).stem
        status = importlib.import_module(name).main([*flags, *SHORT.get(name, "").split()])
        assert not status, f"{script} {flags} ended with {status}"
    if page == PREDICT:
        onnx_example_agrees(repository)


def onnx_example_agrees(repository: Path) -> None:
    """The example of docs/predict.md computes the probability that predict.py writes."""
    flags = "--exp mine --input raw/images/scan0.nii.gz --output predictions/check --save prob".split()
    assert importlib.import_module("predict").main([*flags, *SHORT["predict"].split()]) == 0
    (example,), namespace = blocks("python", PREDICT), {}
    with contextlib.chdir(repository):
        exec(example, namespace)  # noqa: S102  the example as it is printed
    expected = np.asarray(nib.load(repository / "predictions" / "check" / "scan0_prob.nii.gz").dataobj)
    np.testing.assert_allclose(namespace["prob"], expected, atol=1e-4)
    assert expected.std() > 1e-3 and (repository / "predictions" / "mask.nii.gz").exists()


def test_pages_with_commands_are_found():
    assert {page.stem for page in PAGES} >= {"README", "own_data", "hippocampus"}
    assert len(commands(README)) >= 5


def test_every_make_target_exists():
    makefile = (README.parent / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"`?make ([a-z-]+)", README.read_text(encoding="utf-8"))
    assert targets
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


@pytest.mark.parametrize("page", [README, *DOCS], ids=lambda page: page.stem)
def test_every_link_into_the_repository_leads_somewhere(page):
    links = re.findall(r"\]\((?!https?://)([^)#]+)\)", page.read_text(encoding="utf-8"))
    assert links or page != README
    assert [link for link in links if not (page.parent / link).exists()] == []


EXAMPLES = {
    re.search(r"class (\w+)", block)[1]: block
    for page in (README, *DOCS)
    for block in blocks("python", page)
    if "Method)" in block
}


@pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES)
def test_the_example_method_trains(example, repository, monkeypatch):
    namespace: dict = {}
    exec(example, namespace)  # noqa: S102  the example as it is printed
    (example_class,) = [item for item in namespace.values() if getattr(item, "__module__", "") == "builtins"]
    monkeypatch.setitem(METHODS, "ninth", example_class)
    flags = ["--method", "ninth", "--preset", "demo", *SHORT["train"].split()]
    assert train([*flags, "--root_path", "data/LA", "--exp", "ninth"]) == 0
    assert (repository / "model" / "ninth" / "last.pth").exists()
