import json
from argparse import Namespace

import pytest

from paper.jobs import Job, decisive, differences, progress, read_scores, run_name, scores_of, what_is_left
from runtime import runs
from train import parse_options
from utils import files
from utils.errors import InputError

CASES = {"labeled": ["a"], "unlabeled": ["b"], "validation": [], "test": ["c", "d"]}
SCORES = {"trained_on": {key: CASES[key] for key in ("labeled", "unlabeled", "validation")}}
SCORES |= {"cases": [{"case": case} for case in ("d", "c", "d")], "iteration": 100, "training_seconds": 50.0}
SCORES |= {"summary": {}, "reported": {}, "options": {}}


def options(tmp_path, *flags) -> Namespace:
    return parse_options(["--method", "dtml", "--preset", "demo", "--model_path", str(tmp_path / "model"), *flags])


@pytest.fixture
def save(tmp_path):
    """Write what a run leaves into a folder: save("runs/dtml_seed1", options, SCORES)."""

    def write(name, options, scores=None):
        folder = tmp_path / name
        folder.mkdir(parents=True, exist_ok=True)
        files.write_json(folder / runs.OPTIONS, vars(options))
        if scores:
            files.write_json(folder / runs.METRICS_JSON, scores)
        return folder

    return write


def test_where_and_how_fast_a_run_is_computed_decides_nothing(tmp_path, save):
    folder = save("a", options(tmp_path), SCORES)
    same = options(
        tmp_path, "--exp", "x", "--root_path", "elsewhere", "--device", "cpu", "--num_workers", "2", "--resume"
    )
    assert differences(same, CASES, options(tmp_path), folder) == []
    assert "patch_size" in decisive(same) and "device" not in decisive(same)


@pytest.mark.parametrize(
    "flags",
    [["--base_lr", "0.1"], ["--patch_size", "32", "32", "32"], ["--amp", "bf16"], ["--sdm_k", "9"], ["--seed", "1"]],
)
def test_what_decides_a_result_is_told_apart_and_named(tmp_path, save, flags):
    folder = save("a", options(tmp_path), SCORES)
    found = getattr(options(tmp_path), flags[0][2:])
    assert differences(options(tmp_path, *flags), CASES, options(tmp_path), folder) == [f"{flags[0]} {found}"]


@pytest.mark.parametrize("kind", ["labeled", "unlabeled", "test"])
def test_other_cases_are_other_data(tmp_path, save, kind):
    folder = save("a", options(tmp_path), SCORES)
    assert differences(options(tmp_path), CASES | {kind: ["z"]}, options(tmp_path), folder) == [f"other {kind} cases"]


def test_a_flag_newer_than_a_run_counts_with_its_default(tmp_path, save):
    old = options(tmp_path)
    del old.con_scale
    folder = save("a", old, SCORES | {"trained_on": None})
    assert differences(options(tmp_path), CASES, options(tmp_path), folder) == []
    assert differences(options(tmp_path, "--con_scale", "2"), CASES, options(tmp_path), folder) == ["--con_scale 1.0"]


@pytest.mark.parametrize("where", ["runs/dtml_seed1", "model/dtml_seed1"])
def test_a_name_that_is_taken_gets_a_digest(tmp_path, save, where):
    ours, theirs = options(tmp_path), options(tmp_path, "--base_lr", "0.1")
    assert run_name("dtml_seed1", ours, CASES, ours, tmp_path / "runs") == ("dtml_seed1", [])
    save(where, theirs)
    name, others = run_name("dtml_seed1", ours, CASES, ours, tmp_path / "runs")
    assert name.startswith("dtml_seed1_") and others == ["--base_lr 0.1"]
    again = options(tmp_path, "--exp", "x", "--device", "cpu")
    assert run_name("dtml_seed1", again, CASES, ours, tmp_path / "runs")[0] == name
    assert run_name("dtml_seed1", ours, CASES | {"test": ["z"]}, ours, tmp_path / "runs")[0] != name
    assert run_name("dtml_seed1", theirs, CASES, ours, tmp_path / "runs") == ("dtml_seed1", [])


@pytest.fixture
def make_job(tmp_path):
    def build(row, *flags):
        return Job(row, f"{row}_seed1", (), options(tmp_path, *flags), tmp_path / "runs" / f"{row}_seed1")

    return build


def curves(job, seconds):
    job.folder.mkdir(parents=True)
    rows = "".join(f"{10 * (i + 1)},{s}\n" for i, s in enumerate(seconds))
    (job.folder / runs.CURVES).write_text("iteration,step_seconds\n" + rows)


def test_progress_of_a_run_that_is_done_under_way_or_not_begun(make_job, save):
    done, under_way, new = make_job("v_net"), make_job("dtml"), make_job("m_d")
    save("runs/v_net_seed1", done.options, SCORES)
    curves(under_way, [9.0] * 6 + [0.25] * 10)
    assert progress(done) == (100, 0.5)
    assert progress(under_way) == (160, 0.25)  # the first steps, of a busy machine, are out of the window
    assert progress(new) == (0, None)


def test_what_is_left_counts_the_iterations_left_at_their_pace(make_job, save):
    done, under_way, new = (make_job(row, "--max_iterations", "200") for row in ("v_net", "dtml", "m_d"))
    jobs = [done, under_way, new]
    assert what_is_left(jobs) == "3 of 3 runs left; no step time is measured yet"
    save("runs/v_net_seed1", done.options, SCORES)
    curves(under_way, [1.0] * 10)
    # 100 iterations at 1 s, and 200 at the mean of 0.5 and 1 s
    assert what_is_left(jobs) == (
        "2 of 3 runs left; about 0:04:10 of training (rows without a measured step, 1, at the mean of the others)"
    )
    assert "(dtml_seed1, m_d_seed1)" in what_is_left(jobs, names=True)
    assert "1 run" in what_is_left([done]) and "left" not in what_is_left([done])


def test_scores_that_cannot_be_read_are_named(make_job):
    job = make_job("dtml")
    assert scores_of(job) is None
    job.results.mkdir(parents=True)
    (job.results / runs.METRICS_JSON).write_text(json.dumps(SCORES)[:20])
    with pytest.raises(InputError, match="metrics.json"):
        scores_of(job)


@pytest.mark.parametrize("text", ["{", "[]", '{"cases": []}'])
def test_damaged_scores_are_bad_input_that_names_the_file(tmp_path, text):
    path = tmp_path / runs.METRICS_JSON
    path.write_text(text)
    with pytest.raises(InputError, match=str(path)):
        read_scores(path)
