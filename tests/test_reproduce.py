import csv
import errno
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

import test_LA
import train
from dataloaders.case_files import read_label
from dataloaders.split import settle
from options.flags import OFFICIAL
from paper import work
from paper.jobs import plan, systems_of
from paper.systems import SYSTEMS, TABLES
from paper.work import choose_cases, claim, run_script_of
from reproduce import main, parse_options
from runtime import runs
from utils import files
from utils.errors import INTERRUPTED, InputError
from utils.files import REPOSITORY
from utils.nifti import write_nifti

DICE = {"phantom_006": 0.8, "phantom_007": 0.9}  # the test cases of the phantom
SECONDS = {"supervised": 0.5, "dtml": 1.6}  # of a step
TABLE2 = [f"{row}_seed1337" for row in ("v_net", "m_d", "dtml_labeled")]


@pytest.fixture
def flags(phantom, tmp_path) -> list[str]:
    """What makes every run tiny and keeps it out of the repository."""
    where = ["--root_path", str(phantom), "--model_path", str(tmp_path / "model"), "--out", str(tmp_path / "out")]
    size = "--preset demo --max_iterations 2 --patch_size 32 32 32 --n_filters 8 --image_every 0 --labelnum 2"
    return [*size.split(), "--device", "cpu", *where]


class Calls(list):
    """(script, run) of every call; training of the runs in `fail` fail."""

    def __init__(self):
        super().__init__()
        self.fail: set[str] = set()


@pytest.fixture
def scripts(monkeypatch, make_scores):
    """train.py and test_LA.py replaced by what takes no time."""
    calls = Calls()

    def fake(command, lock):
        script, name = command[0], command[command.index("--exp") + 1]
        calls.append((script, name))
        if script == "train.py":
            if name in calls.fail:
                raise InputError("the loss is not finite")
            options = train.parse_options(command[1:])
            settle(options)
            folder = runs.run_folder(options.model_path, name)
            folder.mkdir(parents=True)
            files.write_json(folder / runs.OPTIONS, vars(options))
            (folder / runs.CURVES).write_text("iteration,step_seconds\n2,0.5\n")
            return
        folder = runs.run_folder(command[command.index("--model_path") + 1], name)
        options = json.loads((folder / runs.OPTIONS).read_text())
        scores = make_scores(DICE, options["seed"])
        scores["training_seconds"] = SECONDS.get(options["method"], 1.0) * scores["iteration"]
        files.write_json(folder / runs.METRICS_JSON, scores | {"options": options})
        (folder / runs.METRICS_CSV).write_text("case\n")

    monkeypatch.setattr(work, "run_script_of", fake)
    return calls


@pytest.fixture
def reproduce(flags, scripts, capsys):
    """reproduce("table2", ...) -> the calls of scripts and what was printed."""

    def run(*argv: str) -> tuple[list, str]:
        scripts.clear()
        capsys.readouterr()
        assert main([argv[0], *flags, *argv[1:]]) == 0
        return list(scripts), capsys.readouterr().out

    return run


# --- the command line


def test_help_is_short_and_tells_tables_and_rows(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(word in text for word in (*TABLES, *SYSTEMS, "--tables_only", "train.py"))


def test_flags_of_train_are_handed_on_in_order_and_results_go_to_model():
    argv = ["table2", "--patch_size", "32", "32", "32", "--only", "m_d", "--base_lr", "0.1", "--seeds", "1", "2", "1"]
    options, handed_on = parse_options(argv)
    assert handed_on == ["--patch_size", "32", "32", "32", "--base_lr", "0.1"]
    assert options.seeds == [1, 2] and options.only == ["m_d"]
    assert options.out == options.model_path == "model/reproduce"


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        ("table2 --max_iteration 3", "--max_iteration"),
        ("table2 --sdm_k 3", "--sdm_k"),  # a flag of DTML, which the V-Net of the same table lacks
        ("table2 -n 3", "-n"),
        ("table2 --seed 3", "--seed"),
        ("table2 --method dtc", "--method"),
        ("table2 --overwrite", "--overwrite"),
        ("table2 --exp mine", "--exp"),
        ("table2 --labelnum 99", "--labelnum"),
        ("table2 --base_lr -1", "--base_lr"),
        ("table2 --root_path nowhere", "nowhere"),
        ("table2 --only ua_mt", "v_net, m_d, dtml_labeled"),
        ("table1 --only unet", "--only"),
        ("table1 --preset gpu", "--preset"),
        ("table4", "table4"),
        ("paired", "--only"),
        ("paired --only v_net", "--only"),
        ("paired --only v_net v_net", "--only"),
        ("paired --only v_net m_d dtml", "--only"),
    ],
)
def test_bad_input_names_its_flag_before_anything_is_trained(flags, scripts, argv, named):
    target, *rest = argv.split()
    with pytest.raises(InputError, match=named):
        main([target, *flags, *rest])
    assert not scripts


@pytest.mark.parametrize(
    ("argv", "rows"),
    [
        ("table1", {"m_d", "dtml_dis", "dtml", "dtml_both"}),
        ("table3 --only dtml v_net", {"dtml", "v_net"}),
        ("figure2", {"v_net", "dtml"}),
        ("figure2 --only ua_mt", {"v_net", "dtml", "ua_mt"}),
        ("paired --only dtc m_d", {"dtc", "m_d"}),
        ("all", set(SYSTEMS)),
        ("all --only dtc", {"dtc"}),
    ],
)
def test_rows_of_a_target(argv, rows):
    assert {system.key for system in systems_of(parse_options(argv.split())[0])} == rows


def test_plan_has_the_first_seed_of_all_rows_first(flags):
    options, handed_on = parse_options(["table3", *flags, "--seeds", "1", "2", "--only", "v_net_all", "v_net", "dtml"])
    jobs, waiting = plan(systems_of(options), options, handed_on)
    assert not waiting
    assert [job.name for job in jobs] == [
        f"{row}_seed{seed}" for seed in (1, 2) for row in ("v_net", "dtml", "v_net_all")
    ]
    counts = {job.row: (job.options.labelnum, job.options.unlabelnum) for job in jobs}
    assert counts == {"v_net": (2, 0), "dtml": (2, 4), "v_net_all": (6, 0)}  # the phantom has 6 training scans


def test_what_makes_a_row_is_not_overruled(flags):
    options, handed_on = parse_options(["table2", *flags, "--only", "m_d", "--unlabelnum", "3"])
    (job,), _ = plan(systems_of(options), options, handed_on)
    assert (job.options.branch, job.options.unlabelnum) == ("sdm", 0)


# --- training what is missing


def test_a_table_is_trained_tested_stored_and_printed_once(reproduce, tmp_path, phantom):
    calls, output = reproduce("table2")
    assert calls == [(script, name) for name in TABLE2 for script in ("train.py", "test_LA.py")]
    results = tmp_path / "out" / "runs" / TABLE2[0]
    assert {path.name for path in results.iterdir()} == {"options.json", "curves.csv", "metrics.csv", "metrics.json"}
    assert {path.suffix for path in (tmp_path / "out").glob("table2.*")} == {".md", ".csv", ".tex"}
    assert "85.00" in output
    assert reproduce("table2")[0] == []
    (tmp_path / "scans").symlink_to(phantom)  # stored results count without the run folder and wherever the scans are
    elsewhere = ["--model_path", str(tmp_path / "other"), "--root_path", str(tmp_path / "scans")]
    assert reproduce("table2", *elsewhere)[0] == [] and not (tmp_path / "other").exists()


def test_other_options_are_another_run_and_destroy_nothing(reproduce, tmp_path):
    rate = ["--only", "v_net", "--base_lr"]
    reproduce("table2", *rate, "0.02")
    stored = tmp_path / "out" / "runs" / "v_net_seed1337" / "metrics.json"
    before = stored.stat().st_mtime_ns
    ((_, name), _), output = reproduce("table2", *rate, "0.1")
    assert name.startswith("v_net_seed1337_") and name in output and "--base_lr 0.02" in output
    assert stored.stat().st_mtime_ns == before
    assert reproduce("table2", *rate, "0.1")[0] == []


def test_a_row_of_equal_time_waits_for_the_rows_that_say_how_long_that_is(reproduce, tmp_path):
    rows = ["--only", "v_net_equal_time", "v_net", "dtml", "--seeds", "1", "2"]
    calls, output = reproduce("table3", *rows)
    assert [call[1] for call in calls[-4::2]] == ["v_net_equal_time_seed1", "v_net_equal_time_seed2"]
    options = json.loads((tmp_path / "out" / "runs" / "v_net_equal_time_seed2" / "options.json").read_text())
    assert options["max_iterations"] == 640  # 200 iterations of 1.6 s, in steps of 0.5 s
    assert "V-Net, DTML's seconds: 200 iterations" in output
    assert reproduce("table3", *rows)[0] == []
    assert reproduce("table3", *rows, "3", "--tables_only")[0] == []  # a further seed: one is planned, one waits
    calls, _ = reproduce("table3", *rows, "3")
    assert [call[1] for call in calls[::2]] == ["v_net_seed3", "dtml_seed3", "v_net_equal_time_seed3"]
    with open(tmp_path / "out" / "table3.csv", newline="", encoding="utf-8") as file:
        line = next(line for line in csv.DictReader(file) if line["method"] == "V-Net, DTML's seconds")
    assert line["seeds"] == "3"


def test_a_row_of_equal_time_alone_says_what_it_waits_for(flags, scripts):
    with pytest.raises(InputError, match="v_net_equal_time"):
        main(["table3", *flags, "--only", "v_net_equal_time"])
    assert not scripts


def test_tables_only_trains_nothing(reproduce, tmp_path):
    reproduce("table2", "--only", "v_net")
    calls, output = reproduce("table2", "--tables_only")
    assert calls == [] and all(name in output for name in TABLE2[1:])
    assert output.rpartition("Table 2")[2].count("not run yet") == 2
    assert reproduce("curves", "--tables_only")[0] == []
    assert (tmp_path / "out" / "curves.png").stat().st_size > 1000


def test_report_shows_slices_of_the_runs_whose_predictions_are_those_that_were_scored(
    reproduce, flags, tmp_path, phantom
):
    with pytest.raises(InputError, match="--report"):
        main(["table2", *flags, "--tables_only", "--report"])
    reproduce("table2")
    folders = [tmp_path / "model" / name for name in TABLE2]
    for folder in folders[:2]:
        (folder / runs.PREDICTIONS).mkdir()
        for case in DICE:
            mask = read_label(phantom, case)
            write_nifti(folder / runs.PREDICTIONS / f"{case}.nii.gz", mask, (1.0, 1.0, 1.0))
    other = json.loads((folders[1] / runs.METRICS_JSON).read_text())
    other["cases"][0]["dice"] = 0.1  # tested anew since its scores were stored
    files.write_json(folders[1] / runs.METRICS_JSON, other)
    _, output = reproduce("table2", "--tables_only", "--report")
    assert str(tmp_path / "out" / "report.html") in output
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert all(word in text for word in (*TABLE2, "Table 2"))
    data = json.loads(text.partition('<script id="data" type="application/json">')[2].partition("</script>")[0])
    assert [run["name"] for run in data["runs"]] == ["V-Net 2/0", "M_d only 2/0", "DTML 2/0"]
    assert data["volumes"].keys() == DICE.keys()
    label, v_net, m_d, dtml = data["volumes"]["phantom_006"]["masks"]
    assert v_net == label and m_d is None and dtml is None
    assert str(tmp_path) not in text.partition('<script id="data"')[0].partition("Options, versions")[0]


def test_a_row_that_fails_is_reported_and_the_others_go_on(reproduce, flags, scripts, capsys):
    scripts.fail.add("m_d_seed1337")
    with pytest.raises(InputError, match="m_d_seed1337"):
        main(["table2", *flags])
    shown = capsys.readouterr()
    assert "m_d_seed1337" in shown.err
    assert ("test_LA.py", "dtml_labeled_seed1337") in scripts and shown.out.count("85.00") >= 2  # V-Net and DTML
    scripts.fail.clear()
    assert {name for _, name in reproduce("table2")[0]} == {"m_d_seed1337"}


@pytest.mark.parametrize("target", ["table2", "curves --tables_only"])
def test_a_file_in_the_place_of_out_is_refused_before_anything_is_trained(flags, scripts, tmp_path, target):
    (tmp_path / "out").touch()
    with pytest.raises(InputError, match=f"{tmp_path / 'out'}: .*--out"):
        main([*target.split(), *flags])
    assert not scripts


@pytest.mark.parametrize(
    ("argv", "file"), [("table2", "metrics.csv"), ("table2 --report", "report.html"), ("curves", "curves.png")]
)
def test_a_full_disk_asks_for_another_out(flags, scripts, monkeypatch, capsys, argv, file):
    replace = os.replace

    def full(source, target):
        if os.path.basename(target) == file:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(InputError) as stop:
        main([*argv.split(), *flags])
    assert re.search(f"{file}: .*--out", f"{capsys.readouterr().err}{stop.value}")


def test_a_run_that_another_process_works_on_is_left_to_it(reproduce, tmp_path):
    with claim(tmp_path / "model" / "v_net_seed1337") as lock:
        assert lock is not None
        calls, output = reproduce("table2")
    assert {name for _, name in calls} == set(TABLE2[1:]) and "v_net_seed1337: another process" in output
    with claim(tmp_path / "model" / "v_net_seed1337") as lock:
        assert lock is not None  # and free again


def test_all_prints_every_table_with_what_is_done(reproduce, monkeypatch):
    drawn = []
    monkeypatch.setattr(work, "draw_figure", lambda options, jobs, out: drawn.append([job.row for job in jobs]))
    _, output = reproduce("all", "--only", "v_net", "m_d")
    assert all(f"Table {n}: " in output for n in (1, 2, 3)) and drawn == [["v_net", "m_d"]]


def test_paired_compares_what_is_there_and_trains_nothing(reproduce, flags, tmp_path):
    pair = ["--only", "m_d", "v_net", "--seeds", "1", "2"]
    reproduce("table2", "--only", "m_d", "--seeds", "1")
    for out in (tmp_path / "out", tmp_path / "nothing"):
        with pytest.raises(InputError, match=rf"{out}.*--out"):
            main(["paired", *flags, *pair, "--out", str(out)])
    reproduce("table2", "--only", "v_net", "--seeds", "2")
    with pytest.raises(InputError, match="--seeds"):
        main(["paired", *flags, *pair])
    reproduce("table2", *pair)
    calls, output = reproduce("paired", *pair)
    assert calls == [] and "V-Net 2/0 - M_d only 2/0" in output
    with pytest.raises(InputError, match="--class valve"):
        main(["paired", *flags, *pair, "--class", "valve"])


def test_the_papers_metrics_stand_on_the_official_lists_alone(reproduce, tmp_path):
    reproduce("table2", "--tables_only")
    assert "printed" not in (tmp_path / "out" / "table2.csv").read_text()
    reproduce("table2", "--tables_only", *(f"--{name}_list={OFFICIAL / name}.list" for name in ("train", "test")))
    assert (tmp_path / "out" / "table2.csv").read_text().count("printed") == len(TABLES["table2"])


def test_a_keyboard_interrupt_names_the_command_that_continues(flags, scripts, monkeypatch, capsys):
    def interrupted(command, lock):
        raise KeyboardInterrupt

    monkeypatch.setattr(work, "run_script_of", interrupted)
    assert main(["table2", "--out", "a folder", *flags]) == INTERRUPTED
    assert "python code/reproduce.py table2 --out 'a folder' --preset demo" in capsys.readouterr().err


# --- processes


@pytest.fixture
def script(tmp_path, monkeypatch):
    """Put a small script into the place of code/: script(text) gives its name."""
    monkeypatch.setattr(work, "CODE", tmp_path)

    def write(text):
        (tmp_path / "small.py").write_text(text)
        return "small.py"

    return write


@pytest.fixture
def lock(tmp_path):
    with claim(tmp_path / "run") as lock:
        yield lock


def test_a_script_gets_its_flags_and_its_failure_is_told(script, lock, tmp_path):
    name = script("import sys, pathlib; pathlib.Path(sys.argv[1]).write_text('x'); sys.exit(int(sys.argv[2]))")
    run_script_of([name, str(tmp_path / "made"), "0"], lock)
    assert (tmp_path / "made").exists()
    with pytest.raises(InputError, match=r"code/small.py .* 3`"):
        run_script_of([name, str(tmp_path / "made"), "3"], lock)


SAVES = """
import pathlib, signal, sys, time
def save(number, frame):
    time.sleep(0.5)  # longer than subprocess.run would wait
    pathlib.Path(sys.argv[1]).write_text('saved')
    sys.exit(0)  # as a script that was done at that moment
signal.signal(signal.SIGTERM, save)
pathlib.Path(sys.argv[1]).write_text('ready')
time.sleep(60)
"""


@pytest.fixture
def heed_signals():
    """As in a terminal, also where the tests run in the background and Ctrl-C is ignored."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in work.HEEDED_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_passed_on_and_the_script_may_save(script, lock, tmp_path, number, heed_signals):
    state, name = tmp_path / "state", script(SAVES)
    sending = f"import os, pathlib, time\nwhile not pathlib.Path({str(state)!r}).exists(): time.sleep(0.05)\n"
    sending += f"time.sleep(0.2)\nos.kill({os.getpid()}, {int(number)})"
    sender = subprocess.Popen([sys.executable, "-c", sending])
    with pytest.raises(KeyboardInterrupt):
        run_script_of([name, str(state)], lock)
    sender.wait()
    assert state.read_text() == "saved"
    assert all(signal.getsignal(n) == signal.default_int_handler for n in work.HEEDED_SIGNALS)


def test_a_script_that_was_stopped_from_outside_ends_the_command(script, lock):
    with pytest.raises(KeyboardInterrupt):
        run_script_of([script("import os, signal; os.kill(os.getpid(), signal.SIGTERM)")], lock)


def test_a_hangup_that_nohup_ignores_stays_ignored(script, lock):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        run_script_of([script(f"import os, signal; os.kill({os.getpid()}, signal.SIGHUP)")], lock)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_claim_lasts_as_long_as_the_script(script, lock, tmp_path):
    """An orphan of a killed command keeps a second command away from its run."""
    run_script_of([script(f"import os; os.fstat({lock})")], lock)  # fails where the lock is not inherited
    with claim(tmp_path / "other") as other:
        orphan = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[other])
    with claim(tmp_path / "other") as again:
        assert again is None
    orphan.communicate(b"\n")
    with claim(tmp_path / "other") as again:
        assert again is not None


# --- the figure


SCORES = {case: {"dice": dice} for case, dice in zip("abcde", (0.5, 0.9, 0.7, 0.8, 0.6), strict=True)}


def test_cases_are_the_best_the_median_and_the_worst():
    assert choose_cases(None, SCORES) == {"b": "best  b", "c": "median  c", "a": "worst  a"}
    assert choose_cases(["d", "a"], SCORES) == {"d": "d", "a": "a"}
    assert list(choose_cases(None, {"a": {"dice": 0.5}})) == ["a"]
    with pytest.raises(InputError, match="--cases x"):
        choose_cases(["a", "x"], SCORES)


def test_figure_without_predictions_says_what_is_missing(flags, scripts, tmp_path):
    with pytest.raises(InputError, match="model/v_net_seed1337"):
        main(["figure2", *flags, "--tables_only"])
    with pytest.raises(InputError, match="phantom_007.nii.gz"):  # scores, but no predictions
        main(["figure2", *flags])


def test_figure_without_any_row_is_bad_input(flags, scripts):
    with pytest.raises(InputError, match="figure2.*--only"):
        main(["all", *flags, "--tables_only", "--only", "v_net_equal_time"])


# --- all of it


@pytest.fixture
def in_process(monkeypatch):
    """train.py and test_LA.py called as functions, which saves their start."""
    mains = {"train.py": train.main, "test_LA.py": test_LA.main}
    monkeypatch.setattr(work, "run_script_of", lambda command, lock: mains[command[0]](command[1:]))


def test_one_row_end_to_end(flags, in_process, tmp_path, capsys):
    assert main(["table2", *flags, "--only", "m_d"]) == 0
    scores = json.loads((tmp_path / "out" / "runs" / "m_d_seed1337" / "metrics.json").read_text())
    for machine in (scores["training_machine"], scores["test_machine"]):
        assert machine["processor"] and machine["threads"] == 1 and machine["gpu"] is None
    assert scores["training_seconds"] > 0 and scores["test_seconds"] > 0 and scores["peak_memory_gib"] > 0
    assert capsys.readouterr().out.rpartition("Table 2")[2].count("not run yet") == 2
    assert main(["table2", *flags, "--only", "m_d"]) == 0  # a planned and a finished run agree on their options
    assert "done: 1 run" in capsys.readouterr().out


@pytest.mark.slow
def test_every_target_end_to_end(flags, in_process, tmp_path, capsys):
    assert main(["all", *flags, "--cases", "phantom_006"]) == 0
    out = tmp_path / "out"
    for table in TABLES:
        with open(out / f"{table}.csv", newline="", encoding="utf-8") as file:
            lines = list(csv.DictReader(file))
        measured = [line["method"] for line in lines if line["source"] == "measured"]
        assert measured == [SYSTEMS[row].name for row in TABLES[table]]
    assert all((out / f"figure2.{end}").stat().st_size > 10_000 for end in ("png", "pdf"))
    capsys.readouterr()
    assert main(["all", *flags]) == 0
    assert "done: 14 runs" in capsys.readouterr().out


@pytest.mark.slow
def test_interrupted_for_real_and_continued(flags, tmp_path):
    command = [sys.executable, str(REPOSITORY / "code" / "reproduce.py"), "table2", *flags, "--only", "v_net"]
    command += ["--max_iterations", "60", "--save_every", "60", "--log_every", "1"]
    log = tmp_path / "model" / "v_net_seed1337" / runs.CURVES
    first = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not log.exists():  # it appears with the first iteration
        assert first.poll() is None
        time.sleep(0.2)
    first.send_signal(signal.SIGTERM)
    error = first.communicate(timeout=120)[1]
    assert first.returncode == INTERRUPTED and "continues: python code/reproduce.py table2" in error
    saved = runs.load_checkpoint(log.parent / runs.LAST)["iteration"]
    assert 0 < saved < 60
    second = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"resumed at iteration {saved}" in second.stdout and "measured, filtered" in second.stdout
