"""Precedence of defaults, schedule lengths, and the refusal of values that make no sense."""

from argparse import Namespace

import pytest

import test_LA
from options import flags, parsing
from options.flags import PAPER_ITERATIONS
from options.methods import FLAGS, flags_of_method
from options.parsing import parse_training
from options.presets import PRESETS
from train import parse_options
from utils.errors import InputError


def parse(*argv: str, method: str | None = None) -> Namespace:
    return parse_options(list(argv), method)


def refusal(*argv: str) -> str:
    """The sentence about a command line that is refused."""
    with pytest.raises(InputError) as error:
        parse(*argv)
    return str(error.value)


def test_a_supervised_batch_is_all_labeled():
    options = parse("--method", "supervised")
    assert (options.batch_size, options.labeled_bs, options.unlabelnum) == (4, 4, 0)
    assert parse("--unlabelnum", "0").labeled_bs == 4
    assert parse("--batch_size", "5").labeled_bs == 2
    assert parse("--batch_size", "5", "--labeled_bs", "4").labeled_bs == 4


# --- precedence: given > --compat > the method's own preset > --preset > the method's defaults > flags.py


def test_a_methods_default_wins_over_the_shared_one(monkeypatch):
    assert FLAGS["dtml"].defaults["consistency"] == 1.0 == parse("--method", "dtml").consistency
    assert parse("--method", "ua_mt").consistency == 0.1
    monkeypatch.setattr(FLAGS["ua_mt"], "defaults", {"consistency": 0.7})
    assert parse("--method", "ua_mt").consistency == 0.7


def test_a_preset_wins_over_the_methods_default(monkeypatch):
    monkeypatch.setitem(PRESETS, "demo", PRESETS["demo"] | {"consistency": 0.3})
    assert parse("--preset", "demo").consistency == 0.3
    assert parse().consistency == 1.0


def test_a_methods_own_preset_wins_over_the_shared_one(monkeypatch):
    monkeypatch.setattr(FLAGS["dtml"], "presets", {"demo": {"n_filters": 3, "sdm_k": 7.0}})
    options = parse("--preset", "demo")
    assert (options.n_filters, options.sdm_k) == (3, 7.0)
    assert parse("--preset", "demo", "--method", "supervised").n_filters == PRESETS["demo"]["n_filters"]
    assert parse().n_filters == 16


def test_compat_wins_over_presets(monkeypatch):
    monkeypatch.setitem(PRESETS, "demo", PRESETS["demo"] | {"flip": "random", "ramp": "smooth"})
    monkeypatch.setattr(FLAGS["dtml"], "presets", {"demo": {"ramp": "smooth"}})
    options = parse("--preset", "demo", "--compat", "public")
    assert (options.flip, options.ramp) == ("always", "stairs")


def test_a_given_flag_wins_over_everything():
    assert parse("--compat", "public", "--flip", "random").flip == "random"
    assert parse("--preset", "cpu", "--scale", "1").scale == 1
    assert parse("--method", "dtml", "--consistency", "0.1").consistency == 0.1
    assert parse("--n_filters", "8").n_filters == 8
    assert parse("--n_filters", "8", "--preset", "cpu", "--compat", "public").n_filters == 8


def test_which_flags_were_given_is_known():
    def given(*argv: str, method: str | None = None) -> set[str]:
        return parse_training(argv, "", FLAGS, method)[1]

    argv = ("--seed", "3", "--patch_size", "32", "32", "48", "--deterministic", "--preset", "cpu")
    assert given(*argv) == {"seed", "patch_size", "deterministic", "preset"}
    assert given() == set()
    assert given("--seed", "1337") == {"seed"}  # also where it is the default
    assert given(method="supervised") == {"method"}


# --- schedule lengths


@pytest.mark.parametrize("total", [PAPER_ITERATIONS, 600, 60, 1])
def test_schedule_lengths_scale_with_the_training(total):
    options = parse("--max_iterations", str(total))
    assert options.lr_step == max(1, round(total * 2500 / 6000))
    assert options.save_every == max(1, round(total / 6))
    assert options.ramp_iterations == total
    assert options.val_every == options.save_every


def test_schedule_lengths_that_are_given_stay():
    hand = ("--lr_step", "7", "--save_every", "3", "--consistency_rampup", "2", "--val_every", "5")
    options = parse("--max_iterations", "600", *hand)
    assert (options.lr_step, options.save_every, options.val_every) == (7, 3, 5)
    assert options.ramp_iterations == 2 * 150  # the public implementations count in units of 150 iterations
    assert parse("--consistency_rampup", "40").ramp_iterations == PAPER_ITERATIONS
    assert parse("--consistency_rampup", "0").ramp_iterations == 0
    share = ("--max_iterations", "400", "--rampup_share", "0.375")
    assert parse(*share).ramp_iterations == 150
    assert parse(*share, "--consistency_rampup", "2").ramp_iterations == 300


def test_a_presets_precision_is_for_the_presets_patch(monkeypatch):
    monkeypatch.setattr(parsing, "cpu_has_bf16", lambda: True)
    small = ("--preset", "cpu", "--patch_size", "32", "64", "48")
    assert parse("--preset", "cpu").amp == "bf16"
    assert parse(*small).amp == "off"
    assert parse(*small, "--amp", "bf16").amp == "bf16"  # and then refused on a CPU
    assert parse("--preset", "cpu", "--gpu", "0").amp == "off"
    monkeypatch.setattr(parsing, "cpu_has_bf16", lambda: False)
    assert parse("--preset", "cpu").amp == "off" and parse("--amp", "bf16").amp == "bf16"


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
    monkeypatch.setattr(FLAGS["dtml"], "presets", {"demo": {"labeled_bs": 3}})
    assert parse("--preset", "demo", *argv.split()).labeled_bs == labeled


# --- refusals


@pytest.mark.parametrize(
    ("argv", "flag"),
    [
        ("--patch_size 0 32 32", "--patch_size"),
        ("--patch_size -8 32 32", "--patch_size"),
        ("--patch_size 32 32 16", "--patch_size"),
        ("--max_iterations -1", "--max_iterations"),
        ("--batch_size 0", "--batch_size"),
        ("--labeled_bs 0", "--labeled_bs"),
        ("--labeled_bs 5", "--labeled_bs"),
        ("--n_filters 0", "--n_filters"),
        ("--norm group --n_filters 12", "--n_filters"),
        ("--recompute --norm instance", "--no-recompute"),
        ("--recompute --compile", "--no-recompute"),
        ("--method supervised --unlabelnum 3", "--unlabelnum"),
        ("--stride_xy 49 --patch_size 48 64 48", "--stride_xy"),
        ("--stride_z 33 --patch_size 48 48 32", "--stride_z"),
        ("--labelnum 0", "--labelnum"),
        ("--labelnum -1", "--labelnum"),
        ("--unlabelnum -1", "--unlabelnum"),
        ("--scale 0", "--scale"),
        ("--scale nan", "--scale"),
        ("--base_lr -0.1", "--base_lr"),
        ("--base_lr inf", "--base_lr"),
        ("--dropout 1", "--dropout"),
        ("--momentum -1", "--momentum"),
        ("--weight_decay -1", "--weight_decay"),
        ("--lr_gamma 0", "--lr_gamma"),
        ("--lr_step 0", "--lr_step"),
        ("--warmup -1", "--warmup"),
        ("--consistency -1", "--consistency"),
        ("--consistency_rampup -1", "--consistency_rampup"),
        ("--rampup_share -1", "--rampup_share"),
        ("--rampup_share 1.5", "--rampup_share"),
        ("--save_every 0", "--save_every"),
        ("--log_every 0", "--log_every"),
        ("--image_every -1", "--image_every"),
        ("--val_every 0", "--val_every"),
        ("--val_cases -1", "--val_cases"),
        ("--num_workers -1", "--num_workers"),
        ("--seed -1", "--seed"),
        ("--seed 9223372036854775808", "--seed"),
        ("--sdm_k 0", "--sdm_k"),
        ("--sdm_k_start -5", "--sdm_k_start"),
        ("--con_scale -1", "--con_scale"),
        ("--method sassnet --critic_lr 0", "--critic_lr"),
        ("--method sassnet --adv_weight -1", "--adv_weight"),
        ("--method asdnet --adv_weight -1", "--adv_weight"),
        ("--method double_uncertainty --unc_weight -1", "--unc_weight"),
        ("--stride_xy 0", "--stride_xy"),
        ("--stride_z -4", "--stride_z"),
        ("--window_batch 0", "--window_batch"),
        ("--aug_zoom -0.1", "--aug_zoom"),
        ("--gpu -1", "--gpu"),
    ],
)
def test_numbers_without_a_meaning_are_bad_input_naming_the_flag(argv, flag):
    assert flag in refusal(*argv.split())


@pytest.mark.parametrize("norm", ["--norm group --n_filters 8", "--norm group --n_filters 2", "--n_filters 12"])
def test_widths_that_work_pass(norm):
    parse(*norm.split())


@pytest.mark.parametrize("method", FLAGS)
def test_a_flag_of_another_method_names_that_method(method):
    foreign, owner = ("--mc_passes", "ua_mt") if "--mc_passes" not in own_flags(method) else ("--sdm_k", "dtml")
    sentence = refusal("--method", method, foreign, "5")
    assert foreign in sentence and owner in sentence


def own_flags(method: str) -> list[str]:
    return flags_of_method(FLAGS[method])


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        ("--max_iter 5", "--max_iterations"),
        ("--labelnumm=5", "--labelnum"),
        ("--device gpu", "--device"),
        ("--method dmtl", "--method"),
        ("--preset gpu", "--preset"),
        ("--preset", "--preset"),
        ("--compat --seed 1", "--compat"),
        ("--patch_size 32", "--patch_size"),
        ("--resume --overwrite", "--overwrite"),
        ("something", "something"),
    ],
)
def test_typing_errors_are_refused_and_answered(argv, named):
    assert named in refusal(*argv.split())


def test_the_published_command_has_no_choice_of_method():
    with pytest.raises(InputError, match="--method"):
        parse("--method", "supervised", method="dtml")


def test_tests_refuse_numbers_without_a_meaning_too():
    trained = vars(parse())
    with pytest.raises(InputError, match="--stride_xy"):
        test_LA.parse_options(["--exp", "a", "--stride_xy", "0"], "a", trained)


@pytest.mark.parametrize("method", FLAGS)
def test_the_short_help_shows_common_flags_and_the_whole_one_all(method, capsys):
    texts = []
    for flag in ("--help", "--help_all"):
        with pytest.raises(SystemExit) as end:
            parse("--method", method, flag)
        assert end.value.code == 0
        texts.append(capsys.readouterr().out)
    short, whole = texts
    assert "--labelnum" in short and "--crop_bound" not in short and "--crop_bound" in whole
    assert all(flag in short for flag in own_flags(method))


def test_networks_are_those_of_the_room_that_needs_pytorch():
    from networks import NETWORKS

    assert flags.NETWORK_NAMES == tuple(NETWORKS)
