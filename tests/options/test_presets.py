"""Presets and --compat: what they hold, and that every entry is a flag."""

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path

import pytest

from inference.trained import reported_output
from methods import METHODS
from options import presets
from options.flags import add_preset_options
from options.methods import FLAGS
from options.presets import COMPAT, PRESETS, cpu_has_bf16
from train import parse_options

RUNS = Path(__file__).parents[2] / "docs/results/hippocampus/runs"
# What is no setting of the preset.
OF_A_RUN = {"preset", "exp", "resume", "image_every", "save_every", "unlabelnum", "device", "num_classes"}


def parse(*argv: str, method: str | None = None) -> Namespace:
    return parse_options(list(argv), method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_method_has_every_preset(method, preset):
    options = parse("--method", method, "--preset", preset, "--compat", "public")
    assert options.method == method and options.preset == preset


def test_compat_sets_exactly_the_group_of_public_quirks():
    assert COMPAT["public"] == {
        "flip": "always",  # no 1 of the registry of disagreements
        "crop_bound": "exclusive",  # 2
        "ramp": "stairs",  # 5
        "eval_empty": "zeros",  # 6
        "sdm_empty": "zeros",  # 7
        "con_scale": 2.0,  # 10
        "post": "lcc",  # the public test options
        "head": None,  # the first output: the segmentation, of M_s in DTML
    }
    plain, public = vars(parse()), vars(parse("--compat", "public"))
    differ = {name for name in plain if plain[name] != public[name]}
    assert differ == {*COMPAT["public"], "compat"} - {"head"}
    assert parse("--compat", "public", "--head", "mean").head == "mean"


@pytest.mark.parametrize("method", METHODS)
def test_compat_reports_the_segmentation_where_there_is_one(tiny_options, method):
    options = tiny_options(method, "--compat", "public")
    assert reported_output(METHODS[method](options), options) == "seg"


def test_compat_goes_with_a_run_of_the_map_alone(tiny_options):
    options = tiny_options("dtml", "--compat", "public", "--branch", "sdm")
    assert reported_output(METHODS["dtml"](options), options) == "sdm"


def test_every_entry_of_a_preset_is_a_flag():
    everywhere = set().union(*(vars(parse("--method", method)) for method in METHODS))
    for name, group in (PRESETS | COMPAT).items():
        assert group.keys() <= everywhere, name
    for method, cls in FLAGS.items():
        own = vars(parse("--method", method)).keys()
        assert cls.defaults.keys() <= own, method
        assert set(cls.presets) <= set(PRESETS), method
        assert set().union(*cls.presets.values()) <= own, method


@pytest.mark.parametrize("method", FLAGS)
def test_a_methods_defaults_are_those_that_differ_from_the_shared_ones(monkeypatch, method):
    own = FLAGS[method].defaults
    monkeypatch.setattr(FLAGS[method], "defaults", {})
    shared = vars(parse("--method", method))
    assert [name for name, value in own.items() if shared[name] == value] == []


def test_the_help_says_what_each_preset_is_for():
    parser = ArgumentParser()
    add_preset_options(parser)
    (text,) = (action.help for action in parser._actions if action.dest == "preset")
    assert all(name in text for name in PRESETS)


@pytest.mark.parametrize(("text", "has"), [("flags : fma amx_tile", True), ("flags : fma avx512f", False), ("", False)])
def test_the_processor_says_whether_it_has_bf16(tmp_path, monkeypatch, text, has):
    monkeypatch.setattr(presets, "CPUINFO", tmp_path / "cpuinfo")
    assert not cpu_has_bf16.__wrapped__()
    presets.CPUINFO.write_text(f"processor : 0\n{text}\n")
    assert cpu_has_bf16.__wrapped__() is has


@pytest.mark.parametrize("method", METHODS)
def test_the_hippocampus_preset_has_the_settings_of_its_published_runs(method):
    row = "v_net" if method == "supervised" else method
    published = json.loads((RUNS / f"{row}_seed1337/options.json").read_text())
    ours = vars(parse("--method", method, "--preset", "hippocampus"))
    settings = (published.keys() & ours.keys()) - OF_A_RUN
    assert {"sdm_k", "base_lr", "labeled_bs", "consistency"} & published.keys() <= settings
    assert {name: ours[name] for name in settings} == {name: published[name] for name in settings}
