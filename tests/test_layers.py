"""No arrow runs up: a file imports from its own room and from rooms below it, and predicting loads no trainer."""

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from utils.files import REPOSITORY

CODE = REPOSITORY / "code"
LAYERS = (  # from the top; rooms of one line do not import each other
    "benchmark",
    "benchmarks",
    "reproduce train_dtml test_LA predict prepare_LA prepare_scans make_phantom check_data",
    "paper",
    "train",
    "training",
    "engine",
    "inference",
    "evaluation",
    "methods",
    "scans",
    "dataloaders",
    "runtime",
    "options",
    "networks",
    "utils",
)
COMMANDS = sorted({"benchmark", "train", *LAYERS[2].split()})
SHARED = {
    "main",
    "parse_options",
    "make_parser",
    "recipe_of",
    "CRITIC_WIDTH",
}  # public names of several files, alike in each
LEVEL = {room: -depth for depth, layer in enumerate(LAYERS) for room in layer.split()}


def imported(path: Path) -> set[str]:
    """The rooms that a file names in its import statements, wherever they stand."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return {name.partition(".")[0] for name in names} & LEVEL.keys()


@pytest.mark.parametrize("room", LEVEL)
def test_a_room_imports_only_rooms_below_it(room):
    files = [CODE / f"{room}.py"] if (CODE / f"{room}.py").exists() else sorted((CODE / room).rglob("*.py"))
    assert files
    for path in files:
        assert not {other for other in imported(path) if other != room and LEVEL[other] >= LEVEL[room]}, path


def test_every_file_has_its_place():
    assert {path.relative_to(CODE).parts[0].removesuffix(".py") for path in CODE.rglob("*.py")} == LEVEL.keys()


def defined(path: Path) -> set[str]:
    """The public names that a file defines at its top level."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = [node.target] if isinstance(node, ast.AnnAssign) else node.targets
            names |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    return {name for name in names if not name.startswith("_")}


def test_a_name_stands_for_one_thing():
    count = Counter(name for path in CODE.rglob("*.py") for name in defined(path))
    assert {name for name, files in count.items() if files > 1} <= SHARED


def loaded(statements: str) -> set[str]:
    """The modules that a fresh interpreter holds after some statements."""
    code = f"import sys\nsys.path.insert(0, {str(CODE)!r})\n{statements}\nprint(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split())


def test_predicting_loads_no_trainer():
    whole = loaded("import predict, inference.segmenting")
    assert "torch" in whole and not whole & {"engine", "train", "tensorboard", "torch.utils.tensorboard"}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_does_not_wait_for_pytorch(command):
    assert "torch" not in loaded(f"import {command}\ntry: {command}.main(['--help'])\nexcept SystemExit: pass")
