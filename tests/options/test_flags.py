"""Defaults of the shared flags, and the paths that they mean."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from options import flags
from options.flags import list_paths
from options.parser import HelpFormatter
from options.types import PathHere
from train import parse_options
from utils.files import REPOSITORY, repository_path


def parse(*argv: str, method: str | None = None) -> Namespace:
    return parse_options(list(argv), method)


def test_the_defaults_are_the_papers():
    options = vars(parse())
    expected = {
        "method": "dtml",
        "preset": "paper",
        "patch_size": [112, 112, 80],
        "batch_size": 4,
        "labeled_bs": 2,
        "labelnum": 16,
        "base_lr": 0.01,
        "momentum": 0.9,
        "weight_decay": 1e-4,
        "optimizer": "sgd",
        "max_iterations": 6000,
        "lr_schedule": "steps",
        "lr_step": 2500,
        "lr_gamma": 0.1,
        "seed": 1337,
        "n_filters": 16,
        "dropout": 0.5,
        "norm": "batch",
        "save_every": 1000,
        "consistency": 1.0,
        "ramp_iterations": 6000,
        "sdm_k": 1500.0,
        "con_scale": 1.0,
        "stride_xy": 18,
        "stride_z": 4,
        "post": "none",
        "eval_empty": "nan",
        "val_cases": 0,
        "scale": 1.0,
        "root_path": "data/LA",
        "model_path": "model",
    }
    assert {name: options[name] for name in expected} == expected


def test_default_paths_start_at_the_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert repository_path("data/LA") == REPOSITORY / "data" / "LA"
    assert repository_path(tmp_path / "x") == tmp_path / "x"
    assert (REPOSITORY / "code" / "options" / "flags.py").samefile(flags.__file__)


def test_lists_follow_split_unless_named():
    def lists(*argv: str) -> tuple[Path, Path]:
        return list_paths(parse("--root_path", "/d", *argv))

    assert lists() == (Path("/d/train.list"), Path("/d/test.list"))
    assert lists("--split", "dev") == (Path("/d/dev_train.list"), Path("/d/dev_test.list"))
    assert lists("--split", "dev", "--test_list", "/t") == (Path("/d/dev_train.list"), Path("/t"))
    assert lists("--train_list", "/t") == (Path("/t"), Path("/d/test.list"))


def test_help_calls_values_by_their_kind_and_tells_defaults_that_say_something():
    parser = ArgumentParser(formatter_class=HelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="seed")
    parser.add_argument("--weight", type=float, default=0.0, help="weight")
    parser.add_argument("--scans", action=PathHere, default="a/b", help="folder")
    parser.add_argument("--head", help="output")
    parser.add_argument("--skip", nargs="*", default=[], help="parts")
    parser.add_argument("--size", nargs=2, default=[1, 2], help="size")
    parser.add_argument("--fast", action="store_true", help="speed")
    lines = [" ".join(line.split()) for line in parser.format_help().partition("exit\n")[2].splitlines()]
    assert lines == [
        "--seed N seed (default: 0)",
        "--weight X weight (default: 0.0)",
        "--scans PATH folder (default: a/b)",
        "--head NAME output",
        "--skip [NAME ...] parts",
        "--size NAME NAME size (default: 1 2)",
        "--fast speed",
    ]
