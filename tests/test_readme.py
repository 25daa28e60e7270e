"""The README holds what it says: its commands run, in order, and its example is a complete ninth method."""

import importlib
import re
import shlex
import shutil
from pathlib import Path

import pytest

from methods import METHODS
from train import main as train

README = Path(__file__).resolve().parents[1] / "README.md"
SHORT = {  # what makes a command small enough for a test; the last of two equal flags wins
    "train": "--labelnum 2 --patch_size 32 32 32 --n_filters 8 --max_iterations 2 --scale 1 --num_workers 0 --amp off",
    "test_LA": "--stride_xy 32 --stride_z 32",
    "check_data": "--labelnum 2",
}
SHORT["train_dtml"] = SHORT["train"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def commands() -> list[list[str]]:
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("python code/")]


@pytest.fixture
def scans(phantom, tmp_path) -> Path:
    """The phantom data set with the lists that the commands ask for."""
    folder = shutil.copytree(phantom, tmp_path / "LA")
    for name in ("train", "test"):
        shutil.copy(folder / f"{name}.list", folder / f"dev_{name}.list")
    return folder


def test_every_command_runs_in_order(scans, tmp_path):
    assert len(commands()) >= 5
    for script, *flags in commands():
        name = Path(script).stem
        where = ["--root_path", str(scans)]
        if name != "check_data":
            where += ["--model_path", str(tmp_path / "model"), "--device", "cpu"]
        status = importlib.import_module(name).main([*flags, *SHORT[name].split(), *where])
        assert not status, f"{script} {flags} ended with {status}"


def test_every_make_target_exists():
    makefile = (README.parent / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"`?make ([a-z-]+)", README.read_text(encoding="utf-8"))
    assert targets
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def test_every_link_into_the_repository_leads_somewhere():
    links = re.findall(r"\]\((?!https?://)([^)#]+)\)", README.read_text(encoding="utf-8"))
    assert links
    assert [link for link in links if not (README.parent / link).exists()] == []


def test_the_example_method_trains(scans, tmp_path, monkeypatch):
    (example,) = blocks("python")
    namespace: dict = {}
    exec(example, namespace)  # noqa: S102  the example as it is printed
    monkeypatch.setitem(METHODS, "mean_teacher", namespace["MeanTeacher"])
    flags = ["--method", "mean_teacher", "--ema_decay", "0.9", "--preset", "demo", *SHORT["train"].split()]
    where = ["--root_path", str(scans), "--model_path", str(tmp_path / "model"), "--exp", "ninth", "--device", "cpu"]
    assert train([*flags, *where]) == 0
    assert (tmp_path / "model" / "ninth" / "last.pth").exists()
