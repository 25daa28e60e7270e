"""Real torchrun: a rank that is killed, runs that go on with other numbers of processes, the commands of the docs."""

import csv
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from runtime import runs
from utils.files import REPOSITORY

DOCS = REPOSITORY / "docs" / "distributed.md"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
SMALL = (
    "--preset demo --patch_size 32 32 32 --n_filters 2 --batch_size 2 --labelnum 3 --image_every 0 --method supervised"
)
SHORT = {  # what makes a command of the docs small enough; the last of two equal flags wins
    "train_dtml.py": "--labelnum 2 --patch_size 32 32 32 --n_filters 8 --max_iterations 2 --scale 1 --num_workers 0 "
    "--amp off",
    "test_LA.py": "--stride_xy 32 --stride_z 32",
}
SECONDS = 300


@pytest.fixture
def start(tmp_path) -> Callable[..., subprocess.Popen]:
    """Start a command in the repository; output goes to the file `output` of the test's folder."""
    started = []

    def run(*argv: str) -> subprocess.Popen:
        output = (tmp_path / "output").open("w")
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(argv, cwd=REPOSITORY, env=environment, stdout=output, stderr=output)
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()


@pytest.fixture
def train(start, phantom, tmp_path) -> Callable[..., subprocess.Popen]:
    def run(processes: int, *flags: str) -> subprocess.Popen:
        where = ["--root_path", str(phantom), "--model_path", str(tmp_path), "--exp", "run", "--device", "cpu"]
        launcher = [*TORCHRUN, "--nproc_per_node", str(processes)] if processes > 1 else [sys.executable]
        return start(*launcher, "code/train.py", *SMALL.split(), *where, *flags)

    return run


def children(process: subprocess.Popen) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def iterations(folder: Path) -> list[int]:
    with open(folder / runs.CURVES, newline="") as file:
        return [int(row["iteration"]) for row in csv.DictReader(file)]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert process.poll() is None and time.monotonic() < end, "the training ended or hangs"
        time.sleep(0.1)


@pytest.mark.slow  # each start of a process imports PyTorch
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_run_which_goes_on_with_any_number_of_processes(train, tmp_path, victim):
    folder, flags = tmp_path / "run", ("--max_iterations", "100000", "--save_every", "2", "--log_every", "1")
    process = train(2, *flags)
    wait_for((folder / runs.LAST).exists, process)
    os.kill(children(process)[victim], signal.SIGKILL)
    assert process.wait(SECONDS) != 0
    output = (tmp_path / "output").read_text()
    messages = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(messages) == victim and all(f"{folder / runs.LAST} with --resume" in line for line in messages)
    assert 'code/train.py", line' not in output  # no traceback of ours beside torchrun's report
    if victim:
        assert str(folder / runs.LAST) in (folder / runs.LOG).read_text().splitlines()[-1]
    for processes in (2, 1):
        before = runs.load_checkpoint(folder / runs.LAST)["iteration"]
        process = train(processes, *flags, "--resume")
        wait_for(lambda before=before: runs.load_checkpoint(folder / runs.LAST)["iteration"] > before, process)
        process.terminate()
        process.wait(SECONDS)
        state = runs.load_checkpoint(folder / runs.LAST)
        assert state["world_size"] == processes
        assert iterations(folder) == list(range(1, state["iteration"] + 1))
    log = (folder / runs.LOG).read_text()
    assert log.count("stopped and saved at iteration") == 2
    assert log.count("2 before, 1 now") == 1


def commands() -> list[list[str]]:
    blocks = re.findall(r"```bash\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    return [shlex.split(line) for line in "".join(blocks).splitlines()]


@pytest.mark.slow
def test_the_commands_of_the_docs_run_in_order(phantom, tmp_path, start):
    scans = shutil.copytree(phantom, tmp_path / "scans")
    for name in ("train", "test"):
        shutil.copy(scans / f"{name}.list", scans / f"dev_{name}.list")
    where = ["--root_path", str(scans), "--model_path", str(tmp_path / "model"), "--device", "cpu"]
    together = []
    assert len(commands()) >= 8
    for launcher, *argv in commands():
        (script,) = [word for word in argv if word.startswith("code/")]
        argv = [*argv, *SHORT[Path(script).name].split(), *where]
        process = start(*(TORCHRUN if launcher == "torchrun" else [sys.executable]), *argv)
        together.append(process)
        if "--node_rank" in argv and argv[argv.index("--node_rank") + 1] == "0":
            continue  # the other machine is the next command
        for process in together:
            assert process.wait(SECONDS) == 0, (argv, (tmp_path / "output").read_text())
        together = []
    assert runs.load_checkpoint(tmp_path / "model" / "dtml_nodes" / runs.LAST)["world_size"] == 2
    assert (tmp_path / "model" / "dtml_2" / runs.METRICS_JSON).exists()


def test_the_links_of_the_docs_lead_somewhere():
    links = re.findall(r"\]\((?!https?://)([^)#]+)\)", DOCS.read_text(encoding="utf-8"))
    assert links and all((DOCS.parent / link).exists() for link in links)
