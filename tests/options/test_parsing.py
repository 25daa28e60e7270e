"""Precedence of defaults, schedule lengths, and the refusal of values that make no sense."""

from argparse import ArgumentParser, Namespace

import pytest

import test_LA
from methods import METHODS
from options.flags import PAPER_ITERATIONS
from options.parsing import parse_in_two_strides
from options.presets import PRESETS
from train import parse_options
from utils.errors import InputError


def parse(*argv: str, method: str | None = None) -> Namespace:
    return parse_options(list(argv), method)


def refusal(capsys, *argv: str) -> str:
    """What argparse says about a command line that it refuses."""
    with pytest.raises(SystemExit) as end:
        parse(*argv)
    assert end.value.code == 2
    return capsys.readouterr().err


def test_a_supervised_batch_is_all_labeled():
    options = parse("--method", "supervised")
    assert (options.batch_size, options.labeled_bs, options.unlabelnum) == (4, 4, 0)
    assert parse("--unlabelnum", "0").labeled_bs == 4
    assert parse("--batch_size", "5").labeled_bs == 2
    assert parse("--batch_size", "5", "--labeled_bs", "4").labeled_bs == 4


# --- precedence: by hand > --compat > the method's own preset > --preset > the method's defaults > options.py


def test_a_methods_default_wins_over_the_shared_one(monkeypatch):
    assert METHODS["dtml"].defaults["consistency"] == 1.0 == parse("--method", "dtml").consistency
    assert parse("--method", "ua_mt").consistency == 0.1
    monkeypatch.setattr(METHODS["ua_mt"], "defaults", {"consistency": 0.7})
    assert parse("--method", "ua_mt").consistency == 0.7


def test_a_preset_wins_over_the_methods_default(monkeypatch):
    monkeypatch.setitem(PRESETS, "demo", PRESETS["demo"] | {"consistency": 0.3})
    assert parse("--preset", "demo").consistency == 0.3
    assert parse().consistency == 1.0


def test_a_methods_own_preset_wins_over_the_shared_one(monkeypatch):
    monkeypatch.setattr(METHODS["dtml"], "presets", {"demo": {"n_filters": 3, "sdm_k": 7.0}})
    options = parse("--preset", "demo")
    assert (options.n_filters, options.sdm_k) == (3, 7.0)
    assert parse("--preset", "demo", "--method", "supervised").n_filters == PRESETS["demo"]["n_filters"]
    assert parse().n_filters == 16


def test_compat_wins_over_presets(monkeypatch):
    monkeypatch.setitem(PRESETS, "demo", PRESETS["demo"] | {"flip": "random", "ramp": "smooth"})
    monkeypatch.setattr(METHODS["dtml"], "presets", {"demo": {"ramp": "smooth"}})
    options = parse("--preset", "demo", "--compat", "public")
    assert (options.flip, options.ramp) == ("always", "stairs")


def test_by_hand_wins_over_everything():
    assert parse("--compat", "public", "--flip", "random").flip == "random"
    assert parse("--preset", "cpu", "--scale", "1").scale == 1
    assert parse("--method", "dtml", "--consistency", "0.1").consistency == 0.1
    assert parse("--n_filters", "8").n_filters == 8
    assert parse("--n_filters", "8", "--preset", "cpu", "--compat", "public").n_filters == 8


def test_what_was_given_by_hand_is_known():
    def by_hand(*argv: str, method: str | None = None) -> set[str]:
        return parse_in_two_strides(argv, "", METHODS, method)[1]

    argv = ("--seed", "3", "--patch_size", "32", "32", "48", "--deterministic", "--preset", "cpu")
    assert by_hand(*argv) == {"seed", "patch_size", "deterministic", "preset"}
    assert by_hand() == set()
    assert by_hand("--seed", "1337") == {"seed"}  # also where it is the default
    assert by_hand(method="supervised") == {"method"}


# --- schedule lengths


@pytest.mark.parametrize("total", [PAPER_ITERATIONS, 600, 60, 1])
def test_schedule_lengths_scale_with_the_training(total):
    options = parse("--max_iterations", str(total))
    assert options.lr_step == max(1, round(total * 2500 / 6000))
    assert options.save_every == max(1, round(total / 6))
    assert options.ramp_iterations == total
    assert options.val_every == options.save_every


def test_schedule_lengths_given_by_hand_stay():
    hand = ("--lr_step", "7", "--save_every", "3", "--consistency_rampup", "2", "--val_every", "5")
    options = parse("--max_iterations", "600", *hand)
    assert (options.lr_step, options.save_every, options.val_every) == (7, 3, 5)
    assert options.ramp_iterations == 2 * 150  # the public codes count in units of 150 iterations
    assert parse("--consistency_rampup", "40").ramp_iterations == PAPER_ITERATIONS
    assert parse("--consistency_rampup", "0").ramp_iterations == 0
    share = ("--max_iterations", "400", "--rampup_share", "0.375")
    assert parse(*share).ramp_iterations == 150
    assert parse(*share, "--consistency_rampup", "2").ramp_iterations == 300


def test_a_presets_precision_is_for_the_presets_patch(monkeypatch):
    monkeypatch.setitem(PRESETS["cpu"], "amp", "bf16")
    small = ("--preset", "cpu", "--patch_size", "32", "64", "48")
    assert parse("--preset", "cpu").amp == "bf16"
    assert parse(*small).amp == "off"
    assert parse(*small, "--amp", "bf16").amp == "bf16"  # by hand, and then refused on a CPU


@pytest.mark.parametrize(
    ("argv", "labeled"),
    [
        ("", 3),
        ("--batch_size 2", 1),
        ("--batch_size 8", 4),
        ("--unlabelnum 0", 4),
        ("--labeled_bs 1 --unlabelnum 0", 1),
    ],
)
def test_a_presets_labeled_part_is_of_the_presets_batch(monkeypatch, argv, labeled):
    monkeypatch.setattr(METHODS["dtml"], "presets", {"demo": {"labeled_bs": 3}})
    assert parse("--preset", "demo", *argv.split()).labeled_bs == labeled


# --- refusals


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--patch_size 0 32 32", "--patch_size 0 32 32"),
        ("--patch_size -8 32 32", "--patch_size -8 32 32"),
        ("--patch_size 32 32 16", "at least 32"),
        ("--max_iterations 0", "--max_iterations 0 must be at least 1"),
        ("--batch_size 0", "--batch_size"),
        ("--labeled_bs 0", "--labeled_bs 0"),
        ("--labeled_bs 5", "--labeled_bs 5"),
        ("--n_filters 0", "--n_filters"),
        ("--norm group --n_filters 12", "--n_filters 12 must be a multiple of 8"),
        ("--recompute --norm instance", "--recompute computes batch norms again, not --norm instance"),
        ("--recompute --compile", "--recompute has no effect on compiled networks"),
        ("--method supervised --unlabelnum 3", "--unlabelnum 3 asks for unlabeled cases, and --method supervised uses"),
        ("--stride_xy 49 --patch_size 48 64 48", "leave gaps; lower --stride_xy or --stride_z"),
        ("--stride_z 33 --patch_size 48 48 32", "leave gaps"),
        ("--labelnum 0", "--labelnum"),
        ("--labelnum -1", "--labelnum -1"),
        ("--unlabelnum -1", "--unlabelnum"),
        ("--scale 0", "--scale"),
        ("--scale nan", "--scale"),
        ("--base_lr -0.1", "--base_lr -0.1"),
        ("--base_lr inf", "--base_lr inf must be a finite number"),
        ("--dropout 1", "--dropout"),
        ("--momentum -1", "--momentum"),
        ("--weight_decay -1", "--weight_decay"),
        ("--lr_gamma 0", "--lr_gamma"),
        ("--lr_step 0", "--lr_step"),
        ("--warmup -1", "--warmup"),
        ("--consistency -1", "--consistency"),
        ("--consistency_rampup -1", "--consistency_rampup"),
        ("--rampup_share -1", "--rampup_share"),
        ("--rampup_share 1.5", "--rampup_share 1.5 must be at most 1"),
        ("--save_every 0", "--save_every"),
        ("--log_every 0", "--log_every"),
        ("--image_every -1", "--image_every"),
        ("--val_every 0", "--val_every"),
        ("--val_cases -1", "--val_cases"),
        ("--num_workers -1", "--num_workers"),
        ("--seed -1", "--seed"),
        ("--seed 9223372036854775808", "--seed 9223372036854775808 must be at most 9223372036854775807"),
        ("--sdm_k 0", "--sdm_k 0.0 must be positive"),
        ("--sdm_k_start -5", "--sdm_k_start"),
        ("--con_scale -1", "--con_scale"),
        ("--method sassnet --critic_lr 0", "--critic_lr"),
        ("--method sassnet --adv_weight -1", "--consistency -1.0"),
        ("--method asdnet --adv_weight -1", "--adv_weight"),
        ("--method double_uncertainty --unc_weight -1", "--unc_weight"),
        ("--stride_xy 0", "--stride_xy"),
        ("--stride_z -4", "--stride_z"),
        ("--window_batch 0", "--window_batch"),
        ("--aug_zoom -0.1", "--aug_zoom"),
    ],
)
def test_numbers_without_a_meaning_are_bad_input_naming_the_flag(argv, words):
    with pytest.raises(InputError) as error:
        parse(*argv.split())
    assert words in str(error.value)


@pytest.mark.parametrize("norm", ["--norm group --n_filters 8", "--norm group --n_filters 2", "--n_filters 12"])
def test_widths_that_work_pass(norm):
    parse(*norm.split())


@pytest.mark.parametrize("method", METHODS)
def test_flags_of_another_method_are_foreign(method, capsys):
    own = ArgumentParser()
    METHODS[method].add_arguments(own)
    known = {flag for action in own._actions for flag in action.option_strings}
    foreign = "--sdm_k" if "--sdm_k" not in known else "--ema_decay"
    assert f"unrecognized arguments: {foreign} 5" in refusal(capsys, "--method", method, foreign, "5")


def test_typing_errors_are_refused_and_not_guessed(capsys):
    assert "unrecognized arguments: --max_iter 5" in refusal(capsys, "--max_iter", "5")
    assert "invalid choice: 'gpu'" in refusal(capsys, "--device", "gpu")
    assert "expected 3 arguments" in refusal(capsys, "--patch_size", "32")
    assert "not allowed with argument" in refusal(capsys, "--resume", "--overwrite")


def test_the_published_command_has_no_choice_of_method(capsys):
    with pytest.raises(SystemExit):
        parse("--method", "supervised", method="dtml")
    assert "unrecognized arguments: --method supervised" in capsys.readouterr().err


def test_tests_refuse_numbers_without_a_meaning_too():
    trained = vars(parse())
    with pytest.raises(InputError, match="--stride_xy 0"):
        test_LA.parse_options(["--exp", "a", "--stride_xy", "0"], "a", trained)
