"""V-Net: parameter counts of the public architecture, any input size, heads, dropout, norms, memory format."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from networks import NETWORKS
from networks.vnet import VNet
from utils.constants import MIN_PATCH

TRUNK = 9_448_832  # at width 16, without heads; the public vnet.py with two classes has 34 more


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def volume(*size: int, cases: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(cases, 1, *size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def make_network():
    """A seeded small V-Net in eval mode whose batch norms have seen data: make_network("seg", "sdm", norm="group")."""

    def build(*heads: str, **settings) -> VNet:
        torch.manual_seed(0)
        network = VNet(heads, **{"n_filters": 8, "dropout": 0.5} | settings)
        with torch.no_grad():
            network(volume(32, 32, 32, cases=2))
        return network.eval()

    return build


@pytest.mark.parametrize(
    ("heads", "parameters"),
    [
        ((), TRUNK),
        (("softmax",), 9_448_866),
        (("seg",), 9_448_849),
        (("sdm",), 9_448_849),
        (("sdm", "seg"), 9_448_866),
    ],
)
def test_parameter_counts(heads, parameters):
    assert count(VNet(heads)) == parameters


def test_the_papers_map_head_has_a_block_before_it(make_network):
    """A 3x3x3 convolution of 16 to 16 channels (6928 parameters) and its batch norm (32)."""
    assert count(VNet(("sdm", "seg"), sdm_head="block")) == 9_448_866 + 6928 + 32
    network, image = make_network("sdm", "seg", sdm_head="block"), volume(32, 32, 32)
    block, last = network.heads["sdm"]
    with torch.no_grad():
        features = network.features(image)
        conv = F.conv3d(features, block[0].weight, block[0].bias, padding=1)
        outputs = network(image)
        torch.testing.assert_close(outputs["sdm"], last(F.relu(block[1](conv))).tanh())
        torch.testing.assert_close(outputs["seg"], network.heads["seg"](features))


def test_dtml_has_two_single_head_networks(tiny_options):
    """The public implementation's two dual-head networks have 18,897,732; 17 of each are never used."""
    from methods import METHODS

    assert count(METHODS["dtml"](tiny_options("dtml", "--n_filters", "16"))) == 18_897_732 - 2 * 17


def test_width_and_depth_of_every_stage():
    network = VNet(("seg",), n_filters=8)
    shapes = {}
    for name in ("encoder", "down", "up", "decoder"):
        for level, stage in enumerate(getattr(network, name)):
            stage.register_forward_hook(lambda m, i, out, key=(name, level): shapes.update({key: tuple(out.shape[1:])}))
    network(volume(32, 48, 16, cases=2))
    for level in range(5):
        size = (32 >> level, 48 >> level, 16 >> level)
        assert shapes["encoder", level] == (8 << level, *size)
        if level < 4:
            assert shapes["down", level] == (16 << level, *(length // 2 for length in size))
            assert shapes["up", 3 - level] == shapes["decoder", 3 - level] == (8 << level, *size)
    convs = [sum(isinstance(layer, nn.Conv3d) for layer in stage) for stage in (*network.encoder, *network.decoder)]
    assert convs == [1, 2, 3, 3, 3, 3, 3, 2, 1]


def test_skips_are_additions_of_the_same_level(make_network):
    """With the way up silenced, the features are those of the last block on the first level alone."""
    network = make_network("seg")
    for stage in network.up:
        nn.init.zeros_(stage[1].weight)
        nn.init.zeros_(stage[1].bias)
    image = volume(32, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(network.features(image), network.decoder[3](network.encoder[0](image)))


# --- input sizes


@pytest.mark.parametrize("size", [(33, 47, 32), (32, 32, 35), (50, 32, 63), (1, 5, 17)])
def test_any_size_is_the_crop_of_the_padded_computation(make_network, size):
    network, image = make_network("seg", "sdm"), volume(*size)
    before = [(-length % VNet.stride) // 2 for length in size]
    after = [-length % VNet.stride - b for length, b in zip(size, before, strict=True)]
    padded = F.pad(image, [n for b, a in zip(before[::-1], after[::-1], strict=True) for n in (b, a)], "replicate")
    assert all(length % VNet.stride == 0 for length in padded.shape[2:])
    window = (..., *(slice(b, b + length) for b, length in zip(before, size, strict=True)))
    with torch.no_grad():
        actual, expected = network(image), network(padded)
    for head in ("seg", "sdm"):
        assert actual[head].shape == (1, 1, *size)
        torch.testing.assert_close(actual[head], expected[head][window])


def test_smallest_patch_trains():
    network = VNet(("seg", "sdm"), n_filters=8)
    outputs = network(volume(MIN_PATCH, MIN_PATCH, MIN_PATCH, cases=2))
    sum(output.square().mean() for output in outputs.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_multiples_of_the_stride_are_not_padded(make_network, monkeypatch):
    monkeypatch.setattr(F, "pad", lambda *args: pytest.fail("padded"))
    assert make_network("seg")(volume(32, 48, 16))["seg"].shape == (1, 1, 32, 48, 16)


# --- heads


def test_only_the_heads_asked_for_are_computed(make_network):
    network, image = make_network("seg", "sdm", "softmax"), volume(32, 32, 32)
    calls = []
    for name, head in network.heads.items():
        head.register_forward_hook(lambda *_, name=name: calls.append(name))
    with torch.no_grad():
        everything = network(image)
        assert list(everything) == calls == ["seg", "sdm", "softmax"]
        assert [output.shape[1] for output in everything.values()] == [1, 1, 2]
        calls.clear()
        some = network(image, ["sdm"])
    assert list(some) == calls == ["sdm"]
    torch.testing.assert_close(some["sdm"], everything["sdm"])


def test_sdm_is_the_tanh_of_its_layer(make_network):
    network, image = make_network("seg", "sdm"), volume(32, 32, 32)
    network.heads["sdm"].weight.data *= 50
    with torch.no_grad():
        outputs, features = network(image), network.features(image)
        torch.testing.assert_close(outputs["sdm"], torch.tanh(network.heads["sdm"](features)))
        torch.testing.assert_close(outputs["seg"], network.heads["seg"](features))
    assert outputs["sdm"].abs().max() <= 1 and outputs["sdm"].std() > 0.5


def test_heads_are_float32_under_autocast(make_network):
    network, image = make_network("seg", "sdm"), volume(32, 32, 32)
    dtypes = []
    network.decoder[3].register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        outputs, features = network(image), network.features(image)
        assert dtypes[0] == torch.bfloat16, "autocast has no effect on the trunk"
        exact = F.conv3d(features.double(), *(p.double() for p in network.heads["seg"].parameters()))
    assert all(output.dtype == torch.float32 for output in outputs.values())
    torch.testing.assert_close(outputs["seg"].double(), exact, rtol=1e-5, atol=1e-5)  # bf16 would be 1e-2 off


# --- dropout


def test_dropout_is_off_in_eval(make_network):
    network, image = make_network("seg"), volume(32, 32, 32)
    with torch.no_grad():
        outputs = [network(image)["seg"] for _ in range(2)]
        torch.testing.assert_close(*outputs, rtol=0, atol=0)
        network.dropout.train()
        assert not torch.equal(network(image)["seg"], outputs[0])


def test_dropout_drops_whole_channels_after_the_deepest_block_and_before_the_heads(make_network):
    network = make_network("seg", n_filters=16, dropout=0.25)
    network.dropout.train()
    inputs = []
    network.up[0].register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    network.heads["seg"].register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    kept = {}
    network.encoder[-1].register_forward_hook(lambda m, i, out: kept.update(deep=out))
    network.decoder[-1].register_forward_hook(lambda m, i, out: kept.update(last=out))
    with torch.no_grad():
        network(volume(32, 32, 32, cases=4))
    for dropped, full in zip(inputs, (kept["deep"], kept["last"]), strict=True):
        alive = dropped.flatten(2).abs().amax(2) > 0  # (B, C)
        was_alive = full.flatten(2).abs().amax(2) > 0
        expected = alive[:, :, None, None, None] * full / 0.75
        torch.testing.assert_close(dropped, expected)
        assert 0.5 < alive.sum() / was_alive.sum() < 0.95  # 3/4 expected, 64 channels at least


def test_dropout_can_be_turned_off(make_network):
    network, image = make_network("seg", dropout=0.0), volume(32, 32, 32)
    with torch.no_grad():
        expected = network(image)["seg"]
        network.dropout.train()
        torch.testing.assert_close(network(image)["seg"], expected, rtol=0, atol=0)


# --- norms and memory format


@pytest.mark.parametrize(
    ("norm", "layer"), [("batch", nn.BatchNorm3d), ("instance", nn.InstanceNorm3d), ("group", nn.GroupNorm)]
)
def test_norms(make_network, norm, layer):
    network = make_network("seg", norm=norm, dropout=0.0)
    layers = [module for module in network.modules() if isinstance(module, layer)]
    assert len(layers) == 29, "one after each convolution of the trunk"
    assert all(module.weight is not None and module.bias is not None for module in layers)
    alone, both = volume(32, 32, 32), volume(32, 32, 32, cases=2)
    both[:1] = alone
    with torch.no_grad():
        network.train()
        independent = torch.allclose(network(both)["seg"][:1], network(alone)["seg"], atol=1e-4)
    assert independent == (norm != "batch"), "only batch norm mixes the cases of a batch"


def test_unknown_norm_raises():
    with pytest.raises(ValueError, match="unknown norm 'layer'"):
        VNet(norm="layer")


def test_channels_last_gives_the_same_output(make_network):
    network, image = make_network("seg", "sdm"), volume(33, 32, 40, cases=2)
    other = copy.deepcopy(network).to(memory_format=torch.channels_last_3d)
    assert other.encoder[1][0].weight.is_contiguous(memory_format=torch.channels_last_3d)
    with torch.no_grad():
        expected, actual = network(image), other(image.to(memory_format=torch.channels_last_3d))
    for head in expected:
        torch.testing.assert_close(actual[head], expected[head], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("network", NETWORKS.values())
@pytest.mark.parametrize("classes", [1, 2, 4])
def test_heads_have_a_channel_per_class_and_the_softmax_one_for_the_background(network, classes):
    outputs = network(("seg", "sdm", "softmax"), n_filters=2, num_classes=classes)(torch.rand(2, 1, 16, 16, 16))
    assert {name: x.shape[1] for name, x in outputs.items()} == {"seg": classes, "sdm": classes, "softmax": classes + 1}
    assert outputs["sdm"].abs().max() <= 1
