import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import test_LA
import train
from dataloaders.case_files import read_label
from options.flags import OFFICIAL
from paper import work
from paper.jobs import plan, systems_of
from paper.systems import SYSTEMS, TABLES
from paper.work import choose_cases, claim, run_script_of
from reproduce import main, parse_options
from runtime import runs
from utils import files
from utils.errors import INTERRUPTED, InputError
from utils.nifti import write_nifti

REPOSITORY = Path(__file__).resolve().parents[1]
DICE = {"phantom_006": 0.8, "phantom_007": 0.9}  # the test cases of the phantom
GAIN = {"iteration_1": -0.3, "iteration_2": 0.02, "iteration_10": -0.1}  # of checkpoints over the last one
SECONDS = {"supervised": 0.5, "dtml": 1.6}  # of a step


@pytest.fixture
def flags(phantom, tmp_path) -> list[str]:
    """What makes every run tiny and keeps it out of the repository."""
    where = ["--root_path", str(phantom), "--model_path", str(tmp_path / "model"), "--out", str(tmp_path / "out")]
    size = "--preset demo --max_iterations 2 --patch_size 32 32 32 --n_filters 8 --image_every 0 --labelnum 2"
    return [*size.split(), "--device", "cpu", *where]


class Calls(list):
    """(script, run) of every call; trainings of the runs in `fail` fail."""

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
            train.settle(options)
            folder = runs.run_folder(options.model_path, name)
            folder.mkdir(parents=True)
            files.write_json(folder / runs.OPTIONS, vars(options))
            (folder / runs.CURVES).write_text("iteration,step_seconds\n2,0.5\n")
            for iteration in (1, 10, 2) if options.keep_checkpoints else ():
                runs.checkpoint_path(folder, runs.iteration_name(iteration)).touch()
            return
        folder = runs.run_folder(command[command.index("--model_path") + 1], name)
        options = json.loads((folder / runs.OPTIONS).read_text())
        scores = make_scores(DICE, options["seed"])
        if "--weights" in command:
            weights = command[command.index("--weights") + 1]
            calls[-1] = (script, name, weights)
            scores = make_scores({case: dice + GAIN[weights] for case, dice in DICE.items()}, options["seed"])
            folder /= weights
            folder.mkdir()
        scores["training_seconds"] = SECONDS.get(options["method"], 1.0) * scores["iteration"]
        files.write_json(folder / runs.METRICS_JSON, scores | {"options": options})
        (folder / runs.METRICS_CSV).write_text("case\n")

    monkeypatch.setattr(work, "run_script_of", fake)
    return calls


# --- the command line


def test_importing_and_help_are_silent_and_short(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(word in text for word in (*TABLES, *SYSTEMS, "--tables_only", "go to train.py"))


def test_flags_of_train_are_handed_on_in_order():
    argv = ["table2", "--patch_size", "32", "32", "32", "--only", "m_d", "--base_lr", "0.1", "--seeds", "1", "2", "1"]
    options, handed_on = parse_options(argv)
    assert handed_on == ["--patch_size", "32", "32", "32", "--base_lr", "0.1"]
    assert options.seeds == [1, 2] and options.only == ["m_d"]


@pytest.mark.parametrize("wrong", ["--max_iteration", "--sdm_k", "-n"])
def test_a_misspelt_or_foreign_flag_is_an_error_before_anything_is_trained(flags, scripts, wrong):
    with pytest.raises(InputError, match=wrong):  # --sdm_k is a flag of DTML, which the V-Net of the same table lacks
        main(["table2", *flags, wrong, "3"])
    assert not scripts


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (["--seed", "3"], "--seed is not for"),
        (["--method", "dtc"], "--method is not for"),
        (["--overwrite"], "--overwrite is not for"),
        (["--exp", "mine"], "--exp is not for"),
        (["--labelnum", "99"], "--labelnum 99"),
        (["--base_lr", "-1"], "--base_lr"),
        (["--root_path", "nowhere"], "nowhere"),
        (["--only", "ua_mt"], "no row of table2: v_net, m_d, dtml_labeled"),
    ],
)
def test_bad_input_is_one_sentence_before_anything_is_trained(flags, scripts, wrong, words):
    with pytest.raises(InputError, match=words):
        main(["table2", *flags, *wrong])
    assert not scripts


@pytest.mark.parametrize(
    "rows", [[], ["--only", "v_net"], ["--only", "v_net", "v_net"], ["--only", *list(SYSTEMS)[:3]]]
)
def test_paired_takes_two_rows(rows):
    with pytest.raises(InputError, match="two rows"):
        parse_options(["paired", *rows])


@pytest.mark.parametrize("argv", [["table4"], [], ["table1", "--only", "unet"], ["table1", "--preset", "gpu"]])
def test_unknown_words_are_refused(argv):
    with pytest.raises(InputError):
        parse_options(argv)


@pytest.mark.parametrize(
    ("argv", "rows"),
    [
        (["table1"], {"m_d", "dtml_dis", "dtml", "dtml_both"}),
        (["table3", "--only", "dtml", "v_net"], {"dtml", "v_net"}),
        (["figure2"], {"v_net", "dtml"}),
        (["figure2", "--only", "ua_mt"], {"v_net", "dtml", "ua_mt"}),
        (["paired", "--only", "dtc", "m_d"], {"dtc", "m_d"}),
        (["all"], set(SYSTEMS)),
        (["all", "--only", "dtc"], {"dtc"}),
    ],
)
def test_rows_of_a_target(argv, rows):
    assert {system.key for system in systems_of(parse_options(argv)[0])} == rows


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


def test_table_is_trained_tested_kept_and_printed_once(flags, scripts, tmp_path, capsys):
    assert main(["table2", *flags]) == 0
    names = ["v_net_seed1337", "m_d_seed1337", "dtml_labeled_seed1337"]
    assert scripts == [(script, name) for name in names for script in ("train.py", "test_LA.py")]
    kept = tmp_path / "out" / "runs" / names[0]
    assert {path.name for path in kept.iterdir()} == {"options.json", "curves.csv", "metrics.csv", "metrics.json"}
    output = capsys.readouterr().out
    assert "3 of 3 runs left" in output and "85.00" in output
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "runs",
        *(f"table2.{end}" for end in ("md", "csv", "tex")),
    }
    scripts.clear()
    assert main(["table2", *flags]) == 0
    assert not scripts and "all 3 runs are done" in capsys.readouterr().out


def test_kept_results_count_without_the_run_folder_and_wherever_the_scans_are(flags, scripts, tmp_path, phantom):
    main(["table2", *flags])
    scripts.clear()
    (tmp_path / "scans").symlink_to(phantom)
    elsewhere = ["--model_path", str(tmp_path / "other"), "--root_path", str(tmp_path / "scans")]
    assert main(["table2", *flags, *elsewhere]) == 0
    assert not scripts and not (tmp_path / "other").exists()


def test_other_options_are_another_run_and_destroy_nothing(flags, scripts, tmp_path, capsys):
    main(["table2", *flags, "--only", "v_net", "--base_lr", "0.02"])
    before = (tmp_path / "out" / "runs" / "v_net_seed1337" / "metrics.json").stat().st_mtime_ns
    scripts.clear()
    assert main(["table2", *flags, "--only", "v_net", "--base_lr", "0.1"]) == 0
    assert "v_net_seed1337 is there with --base_lr 0.02 and stays" in capsys.readouterr().out
    ((_, name), _) = scripts
    assert name.startswith("v_net_seed1337_")
    assert (tmp_path / "out" / "runs" / "v_net_seed1337" / "metrics.json").stat().st_mtime_ns == before
    scripts.clear()
    assert main(["table2", *flags, "--only", "v_net", "--base_lr", "0.1"]) == 0
    assert not scripts


def test_a_row_of_equal_time_waits_for_the_rows_that_say_how_long_that_is(flags, scripts, tmp_path, capsys):
    rows = ["--only", "v_net_equal_time", "v_net", "dtml", "--seeds", "1", "2"]
    assert main(["table3", *flags, *rows]) == 0
    assert "4 of 4 runs left" in (output := capsys.readouterr().out) and "; then v_net_equal_time" in output
    assert [call[1] for call in scripts[-4::2]] == ["v_net_equal_time_seed1", "v_net_equal_time_seed2"]
    options = json.loads((tmp_path / "out" / "runs" / "v_net_equal_time_seed2" / "options.json").read_text())
    assert options["max_iterations"] == 640  # 200 iterations of 1.6 s, in steps of 0.5 s
    assert output.count("V-Net, DTML's seconds") >= 2
    assert "V-Net, DTML's seconds: 200 iterations, at the step time of V-Net the training time of DTML." in output
    scripts.clear()
    assert main(["table3", *flags, *rows]) == 0
    assert not scripts and "all 6 runs are done" in capsys.readouterr().out
    assert main(["table3", *flags, *rows, "3", "--tables_only"]) == 0  # a further seed: one is planned, one waits
    assert main(["table3", *flags, *rows, "3"]) == 0
    assert [call[1] for call in scripts[::2]] == ["v_net_seed3", "dtml_seed3", "v_net_equal_time_seed3"]
    with open(tmp_path / "out" / "table3.csv", newline="", encoding="utf-8") as file:
        line = next(line for line in csv.DictReader(file) if line["method"] == "V-Net, DTML's seconds")
    assert line["seeds"] == "3"


def test_a_row_of_equal_time_alone_says_what_it_waits_for(flags, scripts):
    with pytest.raises(InputError, match=r"v_net_equal_time \(waits for the step times of dtml and v_net\)"):
        main(["table3", *flags, "--only", "v_net_equal_time"])
    assert not scripts


def test_the_optimistic_column_is_loud_and_only_there_by_its_flag(flags, scripts, tmp_path, capsys):
    rows = ["--only", "v_net"]
    assert main(["table2", *flags, *rows, "--optimistic_best_on_test"]) == 0
    last = [("train.py", "v_net_seed1337"), ("test_LA.py", "v_net_seed1337")]
    assert scripts == [*last, *(("test_LA.py", "v_net_seed1337", f"iteration_{n}") for n in (1, 2, 10))]
    output = capsys.readouterr().out
    assert "OPTIMISTIC, NOT A RESULT" in output and "best on the test list" in output
    assert "The last column, and it alone, is chosen on the test list" in output
    table = (tmp_path / "out" / "table2.md").read_text(encoding="utf-8")
    (line,) = (line for line in table.splitlines() if line.startswith("| V-Net | 2 | 0 | measured |"))
    assert "| 85.00 |" in line and line.endswith("| 87.00 |")  # the last one, and the best of all
    scripts.clear()
    assert main(["table2", *flags, *rows, "--optimistic_best_on_test"]) == 0
    assert not scripts
    assert main(["table2", *flags, *rows]) == 0  # the same run
    assert not scripts and "OPTIMISTIC" not in (tmp_path / "out" / "table2.md").read_text(encoding="utf-8")


def test_runs_that_kept_no_checkpoints_are_not_run_again_for_the_optimistic_column(flags, scripts, tmp_path):
    main(["table2", *flags, "--only", "v_net"])
    scripts.clear()
    assert main(["table2", *flags, "--only", "v_net", "--optimistic_best_on_test"]) == 0
    assert not scripts
    assert "| 87.00 |" not in (tmp_path / "out" / "table2.md").read_text(encoding="utf-8")


def test_tables_only_trains_nothing(flags, scripts, capsys):
    main(["table2", *flags, "--only", "v_net"])
    scripts.clear()
    assert main(["table2", *flags, "--tables_only"]) == 0
    output = capsys.readouterr().out
    assert not scripts and "2 of 3 runs left (m_d_seed1337, dtml_labeled_seed1337); about 0:00:02" in output
    assert output.rpartition("Table 2")[2].count("not run yet") == 2


def test_report_needs_the_kept_results_alone(flags, scripts, tmp_path, capsys):
    with pytest.raises(InputError, match="no row is done yet"):
        main(["table2", *flags, "--tables_only", "--report"])
    assert main(["table2", *flags, "--report"]) == 0
    report = tmp_path / "out" / "report.html"
    assert f"report: {report}" in capsys.readouterr().out
    assert all(row in report.read_text(encoding="utf-8") for row in ("v_net_seed1337", "m_d_seed1337", "Table 2"))


def test_report_shows_slices_of_the_runs_whose_predictions_are_those_that_were_scored(
    flags, scripts, tmp_path, phantom
):
    main(["table2", *flags])
    folders = [tmp_path / "model" / f"{row}_seed1337" for row in ("v_net", "m_d", "dtml_labeled")]
    for folder in folders[:2]:
        (folder / runs.PREDICTIONS).mkdir()
        for case in DICE:
            mask = read_label(phantom, case)
            write_nifti(folder / runs.PREDICTIONS / f"{case}.nii.gz", mask, (1.0, 1.0, 1.0))
    other = json.loads((folders[1] / runs.METRICS_JSON).read_text())
    other["cases"][0]["dice"] = 0.1  # tested anew since its scores were kept
    files.write_json(folders[1] / runs.METRICS_JSON, other)
    main(["table2", *flags, "--tables_only", "--report"])
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    data = json.loads(text.partition('<script id="data" type="application/json">')[2].partition("</script>")[0])
    assert [system["name"] for system in data["systems"]] == ["V-Net 2/0", "M_d only 2/0", "DTML 2/0"]
    assert data["volumes"].keys() == DICE.keys()
    label, v_net, m_d, dtml = data["volumes"]["phantom_006"]["masks"]
    assert v_net == label and m_d is None and dtml is None
    assert str(tmp_path) not in text.partition('<script id="data"')[0].partition("Options, versions")[0]


def test_curves_of_what_is_done(flags, scripts, tmp_path, capsys):
    main(["table2", *flags, "--only", "v_net"])
    scripts.clear()
    assert main(["curves", *flags, "--tables_only"]) == 0
    assert not scripts and (tmp_path / "out" / "curves.png").stat().st_size > 1000


def test_a_row_that_fails_is_reported_and_the_others_go_on(flags, scripts, capsys):
    scripts.fail.add("m_d_seed1337")
    with pytest.raises(InputError, match="not finished: m_d_seed1337;"):
        main(["table2", *flags])
    shown = capsys.readouterr()
    assert "m_d_seed1337: the loss is not finite" in shown.err
    assert ("test_LA.py", "dtml_labeled_seed1337") in scripts and shown.out.count("85.00") >= 2  # V-Net and DTML
    scripts.fail.clear()
    scripts.clear()
    assert main(["table2", *flags]) == 0
    assert {name for _, name in scripts} == {"m_d_seed1337"}


def test_a_run_that_another_process_works_on_is_left_to_it(flags, scripts, tmp_path, capsys):
    with claim(tmp_path / "model" / "v_net_seed1337") as lock:
        assert lock is not None
        assert main(["table2", *flags]) == 0
    assert {name for _, name in scripts} == {"m_d_seed1337", "dtml_labeled_seed1337"}
    assert "v_net_seed1337: another process is working on it" in capsys.readouterr().out
    with claim(tmp_path / "model" / "v_net_seed1337") as lock:
        assert lock is not None  # and free again


def test_all_prints_every_table_with_what_is_done(flags, scripts, capsys, monkeypatch):
    drawn = []
    monkeypatch.setattr(work, "draw_figure", lambda options, jobs, out: drawn.append([job.row for job in jobs]))
    assert main(["all", *flags, "--only", "v_net", "m_d"]) == 0
    output = capsys.readouterr().out
    assert all(f"Table {n}: " in output for n in (1, 2, 3)) and drawn == [["v_net", "m_d"]]


def test_paired_compares_what_is_there_and_trains_nothing(flags, scripts, tmp_path, capsys):
    pair = ["--only", "m_d", "v_net", "--seeds", "1", "2"]
    main(["table2", *flags, "--only", "m_d", "--seeds", "1"])
    for out in (tmp_path / "out", tmp_path / "nothing"):
        with pytest.raises(InputError, match=rf"{out}.*--out"):
            main(["paired", *flags, *pair, "--out", str(out)])
    main(["table2", *flags, "--only", "v_net", "--seeds", "2"])
    with pytest.raises(InputError, match="--seeds"):
        main(["paired", *flags, *pair])
    main(["table2", *flags, *pair])
    scripts.clear()
    assert main(["paired", *flags, *pair]) == 0
    assert not scripts and "V-Net 2/0 - M_d only 2/0" in capsys.readouterr().out


@pytest.mark.parametrize("target", TABLES)
def test_results_go_to_model_unless_told_otherwise(target):
    options, _ = parse_options([target])
    assert options.out == options.model_path == "model/reproduce"


def test_the_papers_metrics_stand_on_the_official_lists_alone(flags, scripts, tmp_path):
    main(["table2", *flags, "--tables_only"])
    assert "printed" not in (tmp_path / "out" / "table2.csv").read_text()
    lists = [f"--{name}_list={OFFICIAL / name}.list" for name in ("train", "test")]
    main(["table2", *flags, "--tables_only", *lists])
    assert (tmp_path / "out" / "table2.csv").read_text().count("printed") == len(TABLES["table2"])


def test_a_keyboard_interrupt_names_the_command_that_continues(flags, scripts, monkeypatch, capsys):
    def interrupted(command, lock):
        raise KeyboardInterrupt

    monkeypatch.setattr(work, "run_script_of", interrupted)
    assert main(["table2", "--out", "a folder", *flags]) == INTERRUPTED
    assert "continues: python code/reproduce.py table2 --out 'a folder' --preset demo" in capsys.readouterr().err


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
    with pytest.raises(InputError, match=r"code/small.py .* 3` ended with status 3"):
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
    before = {number: signal.signal(number, signal.default_int_handler) for number in work.STOP_SIGNALS}
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
    assert all(signal.getsignal(n) == signal.default_int_handler for n in work.STOP_SIGNALS)


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
    with pytest.raises(InputError, match="--cases x is no test case; there are: a, b, c, d, e"):
        choose_cases(["a", "x"], SCORES)


def test_figure_without_predictions_says_what_is_missing(flags, scripts, tmp_path):
    with pytest.raises(InputError, match="predictions of v_net, dtml, .*model/v_net_seed1337"):
        main(["figure2", *flags, "--tables_only"])
    with pytest.raises(InputError, match="phantom_007.nii.gz"):  # scores, but no predictions
        main(["figure2", *flags])


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
    assert "all 1 runs are done" in capsys.readouterr().out


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
    assert "all 14 runs are done" in capsys.readouterr().out


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
