"""What the tests share: small options, a random batch, a phantom data set, and where real scans may lie."""

import json
import locale
import math
import multiprocessing
import os
import pickle
import socket
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from scipy.spatial.transform import Rotation

from dataloaders.batch import Batch
from evaluation.metrics import class_mean, summarise
from train import parse_options
from utils.errors import run_script
from utils.labels import MEAN
from utils.sdm import signed_distance_batch

IDS = ("case", "head", "post")  # what tells the scores of a run apart
PATCH = 32  # the smallest patch that every method supports
TINY = (  # of its own lengths and rate, so that the demo can change without the tests
    "--preset demo --max_iterations 200 --base_lr 0.01 --lr_schedule steps --patch_size 32 32 32 --n_filters 8 "
    "--device cpu --image_every 0"
).split()


def pytest_addoption(parser):
    parser.addoption(
        "--la_dir", default=os.environ.get("DTML_LA_DIR"), help="folder of real scans, <case>/mri_norm2.h5"
    )


@pytest.fixture(autouse=True)
def same_locale():
    """SimpleITK sets the C locale when it writes DICOM; later tests would then read and write text as ASCII."""
    before = locale.setlocale(locale.LC_ALL)
    yield
    locale.setlocale(locale.LC_ALL, before)


@pytest.fixture(autouse=True)
def few_threads():
    """Small tensors are faster on one thread, and results do not depend on the machine's cores."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_options() -> Callable[..., Namespace]:
    """Parsed options of a method at the smallest size: tiny_options("dtml", "--branch", "sdm")."""

    def build(method: str, *flags: str) -> Namespace:
        return parse_options(["--method", method, *TINY, *flags])

    return build


@pytest.fixture(scope="session")
def make_batch() -> Callable[..., Batch]:
    """A seeded random batch: ellipsoid labels with their distance maps, images that show them; labeled cases first.

    Of several classes each has a slab of the ellipsoid; the last `absent` ones are in no label.
    """

    def build(
        labeled: int = 2, unlabeled: int = 2, size: int = PATCH, seed: int = 0, classes: int = 1, absent: int = 0
    ) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        axis = torch.linspace(-1, 1, size)
        distance = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij")).square()
        count = labeled + unlabeled
        radii = 0.4 + 0.4 * torch.rand(count, 3, 1, 1, 1, generator=generator)
        mask = ((distance / radii.square()).sum(dim=1, keepdim=True) < 1).float()  # (B, 1, W, H, D)
        slabs = torch.arange(size) * classes // size == torch.arange(classes)[:, None]
        label = mask * slabs[..., None, None]  # (B, C, W, H, D)
        gray = (label * torch.arange(1, classes + 1).view(-1, 1, 1, 1) / classes).sum(dim=1, keepdim=True)
        image = gray + 0.3 * torch.randn(mask.shape, generator=generator)
        label = label[:labeled]
        label[:, classes - absent :] = 0
        cases = tuple(f"case{index}" for index in range(count))
        return Batch(image, label, cases, signed_distance_batch(label))

    return build


@pytest.fixture
def plain_layers(monkeypatch) -> Callable[[], None]:
    """Called, it leaves PyTorch's own layers to every network that is placed in the rest of the test."""
    return lambda: monkeypatch.setattr("runtime.device.accelerate", lambda network, recompute: None)


@dataclass
class Outcome:
    """How one of several processes ended: its exit status, what its function returned, and what it printed."""

    status: int
    value: Any
    output: str


@pytest.fixture(scope="session")
def in_ranks(tmp_path_factory) -> Callable[..., list[Outcome]]:
    """Run a function in processes that find what torchrun provides: in_ranks(work, size=2).

    They are forked, for PyTorch is loaded already; `work` is run as a script's `main` is, and returns plain data.
    """

    def run(work: Callable[[], Any], size: int = 2) -> list[Outcome]:
        folder = tmp_path_factory.mktemp("ranks")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
        world |= {"LOCAL_WORLD_SIZE": str(size), "TORCHELASTIC_USE_AGENT_STORE": "True"}

        def one(rank: int) -> None:
            os.environ.update(world, RANK=str(rank), LOCAL_RANK=str(rank))
            with open(folder / f"output{rank}", "w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
            torch.set_num_threads(1)
            run_script(lambda: (folder / f"value{rank}").write_bytes(pickle.dumps(work())) and 0)

        processes = [multiprocessing.get_context("fork").Process(target=one, args=(rank,)) for rank in range(size)]
        for process in processes:
            process.start()
        store = torch.distributed.TCPStore("127.0.0.1", port, size, is_master=True, wait_for_workers=False)
        for process in processes:
            process.join(120)
            process.kill()  # only if it hangs
            process.join()
        del store
        values = [folder / f"value{rank}" for rank in range(size)]
        return [
            Outcome(
                process.exitcode,
                pickle.loads(value.read_bytes()) if value.exists() else None,
                (folder / f"output{rank}").read_text(),
            )
            for rank, (process, value) in enumerate(zip(processes, values, strict=True))
        ]

    return run


@pytest.fixture
def make_scores() -> Callable[..., dict]:
    """Content of a metrics.json, as far as tables read it: make_scores({"a": 0.8, "b": 0.9}, seed=1338).

    Dice per case; None is a missed one. Options are those of the flags, the training took 0.5 s per iteration.
    """

    def build(dice: dict[str, float | None], seed: int = 1337, flags: tuple[str, ...] = ()) -> dict:
        options = parse_options(["--method", "supervised", *TINY, "--seed", str(seed), *flags])
        options.unlabelnum = options.unlabelnum or 0
        scores = []
        for case, value in dice.items():
            for post, gain in (("none", 0.0), ("lcc", 0.01)):  # the filter helps a little
                hit = value is not None
                overlap = (
                    {"dice": value + gain, "jaccard": value / (2 - value)} if hit else {"dice": 0.0, "jaccard": 0.0}
                )
                distance = {"asd_vox": 2 * (1 - value), "hd95_vox": 10 * (1 - value)} if hit else {}
                nothing = {"asd_vox": math.nan, "hd95_vox": math.nan, "diagonal_vox": 100.0}
                scores.append({"case": case, "head": "seg", "post": post, **overlap, **nothing, **distance})
        summary = {
            f"seg/{post}": summarise([score for score in scores if score["post"] == post]) for post in ("none", "lcc")
        }
        content = {
            "reported": {"head": "seg", "post": "none", "weights": "last"},
            "iteration": options.max_iterations,
            "training_seconds": 0.5 * options.max_iterations,
            "training_machine": {"processor": "Abacus 80", "threads": 2, "gpu": None},
            "peak_memory_gib": 1.5,
            "options": vars(options),
            "summary": summary,
            "cases": scores,
        }
        return json.loads(json.dumps(content), parse_constant=lambda _: None)  # as on the disk: NaN is null

    return build


@pytest.fixture
def make_class_scores(make_scores) -> Callable[..., dict]:
    """The same of several classes: make_class_scores({"rim": {"a": 0.8, "b": 0.9}, "core": {"a": 0.7, "b": None}})."""

    def build(dice: dict[str, dict[str, float | None]], seed: int = 1337, flags: tuple[str, ...] = ()) -> dict:
        contents = {name: make_scores(of_class, seed, flags) for name, of_class in dice.items()}
        content, cases, means = next(iter(contents.values())), [], []
        for rows in zip(*(one["cases"] for one in contents.values()), strict=True):
            mean = class_mean(
                [{k: math.nan if v is None else v for k, v in row.items() if k not in IDS} for row in rows]
            )
            means.append({**{key: rows[0][key] for key in IDS}, "class": MEAN, **mean})
            cases += [{**row, "class": name} for name, row in zip(dice, rows, strict=True)] + means[-1:]
        summary = {f"seg/{post}": summarise([s for s in means if s["post"] == post]) for post in ("none", "lcc")}
        content |= {"classes": [{"name": name, "values": [number]} for number, name in enumerate(dice, start=1)]}
        content |= {"class_summary": {name: one["summary"] for name, one in contents.items()}}
        return json.loads(json.dumps(content | {"cases": cases, "summary": summary}), parse_constant=lambda _: None)

    return build


@pytest.fixture(scope="session")
def phantom(tmp_path_factory) -> Path:
    """A folder of small phantom cases in the LA layout, with train.list (6) and test.list (2)."""
    from make_phantom import main

    folder = tmp_path_factory.mktemp("phantom")
    flags = ["--train", "6", "--test", "2", "--shape", "40", "36", "32"]
    assert main(["--dest", str(folder), "--overwrite", *flags]) == 0
    return folder


@pytest.fixture(scope="session")
def two_classes(tmp_path_factory) -> Path:
    """The same with the appendage as a class of its own."""
    from make_phantom import main

    folder = tmp_path_factory.mktemp("two_classes")
    flags = ["--train", "6", "--test", "2", "--shape", "40", "36", "32", "--classes", "2"]
    assert main(["--dest", str(folder), "--overwrite", *flags]) == 0
    return folder


@pytest.fixture(scope="session")
def raw_scans(tmp_path_factory) -> Path:
    """Scans as a scanner leaves them: images/ (6) and labels/ (4) of int16 and uint8, in three formats and on grids of
    other spacing, position and rotation. The label is 1 below the middle of the body and 2 above.
    """
    from make_phantom import make_case

    root = tmp_path_factory.mktemp("raw")
    for folder in ("images", "labels"):
        (root / folder).mkdir()
    for index, suffix in enumerate((".nii.gz", ".nrrd", ".mha", ".nii.gz", ".nrrd", ".nii.gz")):
        image, label = make_case(7, index, (34, 32, 30))
        label = label * np.where(np.arange(label.shape[2]) < label.shape[2] // 2, 1, 2).astype(np.uint8)
        turn = Rotation.from_euler("zxy", [8 * index, 15, -5], degrees=True).as_matrix()
        for folder, array in (("images", (300 + 100 * image).astype(np.int16)), ("labels", label)):
            if folder == "images" or index < 4:
                scan = sitk.GetImageFromArray(np.ascontiguousarray(array.T))
                scan.SetSpacing((2.0, 2.0, 2.0 + index / 4))
                scan.SetOrigin((10.0 * index, -20.0, 30.0))
                scan.SetDirection(turn.ravel().tolist())
                sitk.WriteImage(scan, str(root / folder / f"scan{index}{suffix}"))
    return root


@pytest.fixture(scope="session")
def challenge(tmp_path_factory) -> Path:
    """Four case folders as the 2018 challenge has them, flat ones, with a block of 41 x 31 x 4 voxels as atrium."""
    root = tmp_path_factory.mktemp("challenge")
    for index, case in enumerate(("A0", "B1", "C2", "D3")):
        (root / case).mkdir()
        label = np.zeros((150, 140, 6), np.uint8)
        label[50:91, 60 + index : 91 + index, 1:5] = 255
        noise = np.random.default_rng(index).integers(0, 60, label.shape)
        for name, array in (("lgemri", (40 * (label > 0) + noise).astype(np.uint8)), ("laendo", label)):
            scan = sitk.GetImageFromArray(np.ascontiguousarray(array.T))
            scan.SetSpacing((0.625, 0.625, 1.25))
            sitk.WriteImage(scan, str(root / case / f"{name}.nrrd"), useCompression=True)
    return root


@pytest.fixture(scope="session")
def la_dir(request) -> Path:
    """The folder of real scans; tests that need it are skipped, with a message, where there is none."""
    folder = request.config.getoption("--la_dir")
    if not folder or not Path(folder).is_dir():
        pytest.skip("no real scans: set DTML_LA_DIR or pass --la_dir")
    return Path(folder)
