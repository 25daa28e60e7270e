"""Published weights: a reference V-Net with the published names gives the outputs that ours must reproduce."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from methods import METHODS
from networks.published import load_published
from networks.vnet import VNet
from train import main
from utils.errors import InputError

WIDTH = 4
TOLERANCE = 1e-6


class Stage(nn.Module):
    """Some convolutions, each with norm and ReLU, under the published name `conv`."""

    def __init__(self, *convs: nn.Module):
        super().__init__()
        layers = [layer for conv in convs for layer in (conv, nn.BatchNorm3d(conv.out_channels), nn.ReLU())]
        self.conv = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def stay(count: int, width: int, source: int | None = None) -> Stage:
    return Stage(*(nn.Conv3d(source if source and i == 0 else width, width, 3, padding=1) for i in range(count)))


def halve(width: int) -> Stage:
    return Stage(nn.Conv3d(width, 2 * width, 2, stride=2))


def double(width: int) -> Stage:
    return Stage(nn.ConvTranspose3d(width, width // 2, 2, stride=2))


class PublishedVNet(nn.Module):
    """The V-Net of the public implementations, stage by stage; `classes` of out_conv and, if any, of out_conv2."""

    def __init__(self, *classes: int, width: int = WIDTH):
        super().__init__()
        self.block_one, self.block_one_dw = stay(1, width, source=1), halve(width)
        self.block_two, self.block_two_dw = stay(2, 2 * width), halve(2 * width)
        self.block_three, self.block_three_dw = stay(3, 4 * width), halve(4 * width)
        self.block_four, self.block_four_dw = stay(3, 8 * width), halve(8 * width)
        self.block_five, self.block_five_up = stay(3, 16 * width), double(16 * width)
        self.block_six, self.block_six_up = stay(3, 8 * width), double(8 * width)
        self.block_seven, self.block_seven_up = stay(3, 4 * width), double(4 * width)
        self.block_eight, self.block_eight_up = stay(2, 2 * width), double(2 * width)
        self.block_nine = stay(1, width)
        self.out_conv = nn.Conv3d(width, classes[0], 1)
        if len(classes) > 1:
            self.out_conv2 = nn.Conv3d(width, classes[1], 1)
        self.dropout = nn.Dropout3d(0.5)  # without parameters, so it leaves no name in a file

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        x1 = self.block_one(image)
        x2 = self.block_two(self.block_one_dw(x1))
        x3 = self.block_three(self.block_two_dw(x2))
        x4 = self.block_four(self.block_three_dw(x3))
        x5 = self.dropout(self.block_five(self.block_four_dw(x4)))
        x6 = self.block_six(self.block_five_up(x5) + x4)
        x7 = self.block_seven(self.block_six_up(x6) + x3)
        x8 = self.block_eight(self.block_seven_up(x7) + x2)
        x9 = self.dropout(self.block_nine(self.block_eight_up(x8) + x1))
        if hasattr(self, "out_conv2"):
            return torch.tanh(self.out_conv(x9)), self.out_conv2(x9)
        return (self.out_conv(x9),)


def published(*classes: int, width: int = WIDTH, seed: int = 0) -> PublishedVNet:
    """A published network as after training: random statistics, scales and shifts in every batch norm."""
    torch.manual_seed(seed)
    network = PublishedVNet(*classes, width=width)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm3d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            module.num_batches_tracked += 6000
    return network.eval()


def image(seed: int = 0) -> Tensor:
    return torch.randn(2, 1, 32, 32, 16, generator=torch.Generator().manual_seed(seed))


def snapshot(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


LAYOUTS = {  # of a file: channels of its output layers, and the heads of ours that they are
    "UA-MT": ((2,), ("softmax",)),
    "SASSNet, DTC, DTML": ((1, 1), ("sdm", "seg")),
    "one class": ((1,), ("seg",)),
    "dual of two classes": ((1, 2), ("sdm", "softmax")),
}


@pytest.mark.parametrize(("classes", "heads"), LAYOUTS.values(), ids=LAYOUTS)
def test_same_outputs(tmp_path, classes, heads):
    theirs = published(*classes)
    torch.save(theirs.state_dict(), tmp_path / "iter_6000.pth")
    ours = VNet(heads, n_filters=WIDTH).eval()
    assert load_published(ours, tmp_path / "iter_6000.pth") == []
    with torch.no_grad():
        expected, actual = theirs(image()), ours(image())
    for head, output in zip(heads, expected, strict=True):
        assert output.std() > 0.01, "the comparison would be empty"
        torch.testing.assert_close(actual[head], output, rtol=0, atol=TOLERANCE)
    counters = [value for name, value in ours.state_dict().items() if name.endswith("num_batches_tracked")]
    assert len(counters) == 29 and all(counter == 6000 for counter in counters)


def test_every_parameter_is_taken_at_full_width(tmp_path):
    theirs = published(1, 1, width=16)
    torch.save(theirs.state_dict(), tmp_path / "best_model.pth")
    ours = VNet(("sdm", "seg"))
    load_published(ours, tmp_path / "best_model.pth")
    assert len(ours.state_dict()) == len(theirs.state_dict())
    assert sum(p.numel() for p in theirs.parameters()) == 9_448_866
    total = [sum(value.double().sum() for value in network.state_dict().values()) for network in (ours, theirs)]
    torch.testing.assert_close(*total)


WRAPPERS = {
    "state_dict": lambda weights: {"epoch": 3, "state_dict": weights},
    "net": lambda weights: {"net": weights, "optimizer": {"state": {}}},
    "model": lambda weights: {"model": weights},
    "DataParallel": lambda weights: {f"module.{name}": value for name, value in weights.items()},
    "both": lambda weights: {"state_dict": {f"module.{name}": value for name, value in weights.items()}},
    "without counters": lambda weights: {k: v for k, v in weights.items() if not k.endswith("num_batches_tracked")},
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrapped_files(tmp_path, wrap, legacy):
    theirs, path = published(2), tmp_path / "weights.pth"
    torch.save(wrap(theirs.state_dict()), path, _use_new_zipfile_serialization=not legacy)
    ours = VNet(("softmax",), n_filters=WIDTH).eval()
    load_published(ours, path)
    with torch.no_grad():
        torch.testing.assert_close(ours(image())["softmax"], theirs(image())[0], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("classes", "heads", "lacking"),
    [
        ((2,), ("seg", "sdm"), ["seg", "sdm"]),
        ((1, 1), ("softmax",), ["softmax"]),
        ((1,), ("seg", "sdm"), ["sdm"]),
        ((2, 2), ("sdm", "softmax"), ["sdm"]),
        ((3,), ("seg",), ["seg"]),
    ],
)
def test_heads_that_the_file_lacks_keep_their_values(tmp_path, classes, heads, lacking):
    torch.save(published(*classes).state_dict(), tmp_path / "weights.pth")
    ours = VNet(heads, n_filters=WIDTH)
    before = snapshot(ours)
    assert load_published(ours, tmp_path / "weights.pth") == lacking
    for name, value in ours.state_dict().items():
        kept = name.startswith(tuple(f"heads.{head}." for head in lacking))
        assert torch.equal(value, before[name]) == kept, name


@pytest.mark.parametrize(
    ("classes", "heads"), [((1, 1), ("sdm", "seg")), ((2,), ("softmax",)), ((2,), ("seg",)), ((1, 2), ("sdm", "seg"))]
)
def test_heads_of_several_classes_keep_their_values(tmp_path, classes, heads):
    """Also those that have as many channels as a layer of the file, for other classes."""
    torch.save(published(*classes).state_dict(), tmp_path / "weights.pth")
    ours = VNet(heads, n_filters=WIDTH, num_classes=2)
    before = snapshot(ours)
    assert load_published(ours, tmp_path / "weights.pth") == list(heads)
    changed = {name.split(".")[0] for name, value in ours.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"encoder", "down", "up", "decoder"}


def test_a_map_head_of_the_papers_form_keeps_its_values(tmp_path):
    path, network = tmp_path / "dtc.pth", VNet(("sdm", "seg"), WIDTH, sdm_head="block")
    torch.save(published(1, 1).state_dict(), path)
    before = snapshot(network)
    assert load_published(network, path) == ["sdm"]
    changed = {key for key, value in network.state_dict().items() if not torch.equal(value, before[key])}
    assert not any(key.startswith("heads.sdm.") for key in changed)
    assert {"heads.seg.weight", "encoder.0.0.weight", "decoder.3.0.weight"} <= changed


def without(*names: str):
    return lambda weights: {name: value for name, value in weights.items() if name not in names}


BAD = {  # what is done to the file, and what the message must say besides the name of the file
    "missing": (without("block_seven.conv.3.weight"), "block_seven.conv.3.weight is missing"),
    "no norm": (
        lambda weights: {k: v for k, v in weights.items() if v.ndim != 1 or "bias" in k},
        r"missing.*--pretrained",
    ),
    "foreign": (lambda weights: weights | {"attention.weight": torch.ones(3)}, "attention.weight is not part of it"),
    "channels": (
        lambda weights: weights | {"block_one.conv.0.weight": torch.zeros(WIDTH, 3, 3, 3, 3)},
        "block_one.conv.0.weight has another shape",
    ),
    "other network": (lambda weights: {"conv1.weight": torch.ones(3)}, "no V-Net in the layout"),
    "two networks": (lambda weights: {"student": weights, "teacher": weights}, r"several networks \(student, teacher"),
    "a list": (lambda weights: list(weights.values()), "no V-Net in the layout"),
    "code": (lambda weights: Path("weights"), "not a readable state dict"),
}


@pytest.mark.parametrize(("spoil", "message"), BAD.values(), ids=BAD)
def test_what_does_not_fit_is_named_and_changes_nothing(tmp_path, spoil, message):
    path = tmp_path / "spoilt.pth"
    torch.save(spoil(published(2).state_dict()), path)
    ours = VNet(("softmax",), n_filters=WIDTH)
    before = snapshot(ours)
    with pytest.raises(InputError, match=f"spoilt.pth.*{message}") as error:
        load_published(ours, path)
    assert "--pretrained" in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())


def test_another_width_is_named_with_its_flag(tmp_path):
    torch.save(published(2, width=8).state_dict(), tmp_path / "wide.pth")
    with pytest.raises(InputError, match="wide.pth .*--n_filters 8"):
        load_published(VNet(("softmax",), n_filters=WIDTH), tmp_path / "wide.pth")


@pytest.mark.parametrize("norm", ["instance", "group"])
def test_another_norm_is_named_with_its_flag(tmp_path, norm):
    torch.save(published(2).state_dict(), tmp_path / "weights.pth")
    with pytest.raises(InputError, match=f"weights.pth.*--norm batch .*--n_filters {WIDTH}"):
        load_published(VNet(("softmax",), n_filters=WIDTH, norm=norm), tmp_path / "weights.pth")


def test_unreadable_files(tmp_path):
    with pytest.raises(InputError, match="none.pth.*--pretrained"):
        load_published(VNet(n_filters=WIDTH), tmp_path / "none.pth")
    torch.save(published(2).state_dict(), tmp_path / "whole.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:1000])
    (tmp_path / "empty.pth").touch()
    for name in ("cut.pth", "empty.pth", "."):
        with pytest.raises(InputError, match=re.escape(str(tmp_path / name))):
            load_published(VNet(n_filters=WIDTH), tmp_path / name)


# --- the flag


def save_pair(folder: Path, width: int = 8) -> list[PublishedVNet]:
    """DTML's two files, dual heads both: iter_6000_seg.pth and iter_6000_dis.pth."""
    pair = [published(1, 1, width=width, seed=seed) for seed in (1, 2)]
    for network, name in zip(pair, ("seg", "dis"), strict=True):
        torch.save(network.state_dict(), folder / f"iter_6000_{name}.pth")
    return pair


def test_two_files_go_to_the_two_networks_in_order(tmp_path, tiny_options):
    seg, dis = save_pair(tmp_path)
    method = METHODS["dtml"](tiny_options("dtml")).eval()
    sentences = method.load_pretrained([tmp_path / "iter_6000_seg.pth", tmp_path / "iter_6000_dis.pth"])
    assert [sentence.split()[0] for sentence in sentences] == ["m_s", "m_d"]
    with torch.no_grad():
        torch.testing.assert_close(method.m_s(image())["seg"], seg(image())[1], rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(method.m_d(image())["sdm"], dis(image())[0], rtol=0, atol=TOLERANCE)


def test_one_file_goes_to_both_networks(tmp_path, tiny_options):
    seg, _ = save_pair(tmp_path)
    method = METHODS["dtml"](tiny_options("dtml")).eval()
    assert len(method.load_pretrained([tmp_path / "iter_6000_seg.pth"])) == 2
    with torch.no_grad():
        torch.testing.assert_close(method.m_s(image())["seg"], seg(image())[1], rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(method.m_d(image())["sdm"], seg(image())[0], rtol=0, atol=TOLERANCE)


def test_wrong_number_of_files(tmp_path, tiny_options):
    save_pair(tmp_path)
    files = [tmp_path / "iter_6000_seg.pth"] * 3
    with pytest.raises(InputError, match="--pretrained .*m_s, m_d"):
        METHODS["dtml"](tiny_options("dtml")).load_pretrained(files)
    with pytest.raises(InputError, match="--pretrained"):
        METHODS["supervised"](tiny_options("supervised")).load_pretrained(files[:2])


@pytest.fixture
def run_training(tmp_path, phantom):
    """train.main on the phantom: run_training(*flags) -> (exit status, run folder)."""

    def run(*flags: str) -> tuple[int, Path]:
        small = ["--preset", "demo", "--patch_size", "32", "32", "32", "--n_filters", "8", "--batch_size", "2"]
        where = ["--root_path", str(phantom), "--model_path", str(tmp_path / "model"), "--exp", "run"]
        quiet = ["--device", "cpu", "--image_every", "0", "--labelnum", "2"]
        return main([*small, *where, *quiet, *flags]), tmp_path / "model" / "run"

    return run


def networks_of(folder: Path) -> dict[str, Tensor]:
    return torch.load(folder / "last.pth", weights_only=True)["networks"]


def test_training_starts_from_the_files_and_resumes_without_them(tmp_path, run_training):
    pair = save_pair(tmp_path)
    files = [tmp_path / f"iter_6000_{name}.pth" for name in ("seg", "dis")]
    pretrained = ["--pretrained", ",".join(map(str, files))]
    slow = ["--method", "dtml", "--base_lr", "1e-9"]  # the weights stay what they were at the start
    status, folder = run_training(*slow, *pretrained, "--max_iterations", "1")
    assert status == 0
    first = networks_of(folder)
    for name, network in zip(("m_s", "m_d"), pair, strict=True):
        torch.testing.assert_close(first[f"{name}.encoder.2.3.weight"], network.block_three.conv[3].weight)
    log = (folder / "log.txt").read_text()
    assert f"m_s starts from {files[0]}" in log and f"m_d starts from {files[1]}" in log
    assert json.loads((folder / "options.json").read_text())["pretrained"] == pretrained[1]

    save_pair(tmp_path, width=4)  # a resumed run that read them would stop
    status, folder = run_training(*slow, *pretrained, "--max_iterations", "1", "--resume")
    assert status == 0
    torch.testing.assert_close(networks_of(folder)["m_s.encoder.2.3.weight"], first["m_s.encoder.2.3.weight"])
    assert (folder / "log.txt").read_text().count("starts from") == 2


def test_resume_without_a_checkpoint_loads_the_file_and_names_the_head_that_it_lacks(tmp_path, run_training):
    theirs = published(1, 1, width=8)
    torch.save(theirs.state_dict(), tmp_path / "dtc.pth")
    flags = ["--method", "supervised", "--base_lr", "1e-9", "--max_iterations", "1", "--resume"]
    status, folder = run_training(*flags, "--pretrained", str(tmp_path / "dtc.pth"))
    assert status == 0
    torch.testing.assert_close(networks_of(folder)["network.up.0.0.weight"], theirs.block_five_up.conv[0].weight)
    assert any("dtc.pth" in line and "softmax" in line for line in (folder / "log.txt").read_text().splitlines())


def test_the_sentence_on_a_head_of_several_classes(tmp_path, tiny_options):
    torch.save(published(2, width=8).state_dict(), tmp_path / "weights.pth")
    method = METHODS["supervised"](tiny_options("supervised", "--num_classes", "2"))
    (sentence,) = method.load_pretrained([tmp_path / "weights.pth"])
    assert "softmax" in sentence and "2 classes" in sentence and "scratch" in sentence


def test_a_bad_file_costs_no_existing_run(tmp_path, run_training):
    flags = ["--method", "supervised", "--max_iterations", "1", "--pretrained", str(tmp_path / "none.pth")]
    with pytest.raises(InputError, match=r"none.pth; see --pretrained"):
        run_training(*flags)
    folder = tmp_path / "model" / "run"
    assert not folder.exists()
    folder.mkdir(parents=True)
    (folder / "options.json").write_text("{}")
    with pytest.raises(InputError, match=r"none.pth; see --pretrained"):
        run_training(*flags, "--overwrite")
    assert (folder / "options.json").exists()
