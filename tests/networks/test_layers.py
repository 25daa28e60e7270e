import copy
import gc

import pytest
import torch
from torch import nn

from networks import layers as fused
from networks.layers import accelerate
from networks.vnet import VNet

CHANNELS_LAST = torch.channels_last_3d
FEW_ROUNDINGS = 5e-7  # relative; of float32, on any processor


def plain(conv, norm, x):
    return norm(conv(x)).relu()


def with_gradients(form, layers, x, towards):
    """Output, gradients and running statistics of one pass in training mode."""
    conv, norm = copy.deepcopy(layers)
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    out = form(conv, norm, x)
    (out * towards).sum().backward()
    grads = {f"{kind}.{key}": p.grad for kind, m in (("conv", conv), ("norm", norm)) for key, p in m.named_parameters()}
    return {"out": out.detach(), "x": x.grad, **grads, **dict(norm.named_buffers())}


def fast(layout, *heads, recompute=False, **settings):
    """A seeded small V-Net in a memory format, accelerated."""
    torch.manual_seed(1)
    network = VNet(heads or ("seg",), **{"n_filters": 8, "dropout": 0.0} | settings).to(memory_format=layout)
    accelerate(network, recompute)
    return network


# --- what a network says is what runs


def leaky(network):
    for block in (m for m in network.modules() if isinstance(m, nn.Sequential)):
        for index, layer in enumerate(block):
            if isinstance(layer, nn.ReLU):
                block[index] = nn.LeakyReLU(0.5)


def dilated(network):
    for conv in (m for m in network.decoder.modules() if isinstance(m, nn.Conv3d)):
        conv.dilation, conv.padding = (2, 2, 2), (2, 2, 2)


def circular(network):
    for stage in (*network.encoder, *network.decoder):
        for index in range(0, len(stage), 3):
            conv = stage[index]
            stage[index] = nn.Conv3d(conv.in_channels, conv.out_channels, 3, padding=1, padding_mode="circular")
            stage[index].load_state_dict(conv.state_dict())


def without_bias(network):
    for conv in (m for m in network.modules() if isinstance(m, nn.Conv3d | nn.ConvTranspose3d)):
        conv.bias = None


def other_batch_norm(network):
    class Doubled(nn.BatchNorm3d):
        def forward(self, x):
            return 2 * super().forward(x)

    norm = network.decoder[-1][1]
    network.decoder[-1][1] = Doubled(norm.num_features)


CHANGES = [leaky, dilated, circular, without_bias, other_batch_norm]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_layer_has_its_effect(change, when, training):
    """That of the same change to PyTorch's own layers, be it made before the acceleration or after it."""

    def output(*steps):
        torch.manual_seed(0)
        network = VNet(("seg",), n_filters=8, dropout=0.0).to(memory_format=CHANNELS_LAST)
        for parameter in network.parameters():
            if parameter.dim() == 1:  # biases matter, and running statistics are not those of the batch
                nn.init.uniform_(parameter, 0.5, 1)
        for step in steps:
            step(network)
        with torch.set_grad_enabled(training):
            return network.train(training)(torch.randn(2, 1, 32, 32, 32))["seg"]

    unchanged, expected = output(), output(change)
    if change is not without_bias or not training:  # batch statistics cancel it
        assert (unchanged - expected).abs().max() > 1e-2
    actual = output(change, accelerate) if when == "before" else output(accelerate, change)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"])
@pytest.mark.parametrize("first", [False, True])
def test_hooks_fire_on_every_layer(first, hook, training):
    network, called = fast(CHANNELS_LAST) if first else VNet(n_filters=8, dropout=0.0), set()
    layers = {name: m for name, m in network.named_modules() if not isinstance(m, nn.ModuleList | nn.ModuleDict)}
    for name, layer in layers.items():
        getattr(layer, hook)(lambda *call, name=name: called.add(name))
    if not first:
        accelerate(network)
    network.train(training)(torch.randn(2, 1, 32, 32, 32).requires_grad_())["seg"].sum().backward()
    assert called >= layers.keys() - {""}  # the network's own output is a dictionary, whose gradient PyTorch passes by


def test_accelerating_keeps_names_weights_and_modules():
    network = VNet(("seg", "sdm"), n_filters=8, sdm_head="block")
    before, modules = dict(network.state_dict(keep_vars=True)), list(network.modules())
    accelerate(network)
    accelerate(network)
    after = network.state_dict(keep_vars=True)
    assert list(after) == list(before) and all(value is before[name] for name, value in after.items())
    assert all(a is b for a, b in zip(network.modules(), modules, strict=True))


@pytest.mark.parametrize("training", [False, True])
def test_every_layer_of_the_vnet_is_accelerated(training, monkeypatch):
    """29 of a convolution, a batch norm and a ReLU, and the head."""
    network, calls = fast(CHANNELS_LAST), []
    for layer in (nn.Conv3d, nn.ConvTranspose3d, nn.BatchNorm3d, nn.ReLU):
        monkeypatch.setattr(layer, "forward", lambda self, *call: calls.append(self))
    with torch.set_grad_enabled(training):
        network.train(training)(torch.randn(2, 1, 32, 32, 32))
    assert calls == []


# --- the faster forms


@pytest.mark.parametrize("channels", [8, 16, 32, 12])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("layout", [CHANNELS_LAST, torch.contiguous_format])
def test_conv_norm_relu_is_the_plain_form(channels, transposed, layout):
    torch.manual_seed(0)
    kind = nn.ConvTranspose3d if transposed else nn.Conv3d
    conv = kind(4, channels, 2, stride=2).to(memory_format=layout)
    norm = nn.BatchNorm3d(channels, momentum=0.3)
    nn.init.uniform_(norm.weight, 0.5, 2.0)
    nn.init.normal_(norm.bias)
    x = (torch.randn(2, 4, 8, 8, 8) + 0.5).contiguous(memory_format=layout)
    towards = torch.randn_like(conv(x)) / 10
    ours = with_gradients(fused.conv_norm_relu, (conv, norm), x, towards)
    expected = with_gradients(plain, (conv, norm), x, towards)
    for name, value in expected.items():
        noise = 5e-3 if name == "conv.bias" else 1e-4  # a gradient that is 0, and there a sum of rounding errors
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=noise, msg=lambda m, name=name: f"{name}: {m}")
    assert torch.equal(ours["conv.bias"], torch.zeros(channels))


@pytest.mark.parametrize(("channels", "size"), [(8, 48), (64, 32)])
def test_batch_norm_sums_as_exactly_as_contiguous_layers(channels, size):
    """Against float64; a million rows in one float32 sum would be off by a hundred times as much."""
    torch.manual_seed(0)
    layers = nn.Conv3d(2, channels, 2, stride=2), nn.BatchNorm3d(channels)
    nn.init.constant_(layers[1].bias, 12)  # no ReLU at its kink: rounding switches none
    x = torch.randn(2, 2, 2 * size, 2 * size, 2 * size) + 1
    with torch.no_grad():
        out = plain(*copy.deepcopy(layers), x)
    towards = out / 10 + torch.randn_like(out)

    def errors(form, layout):
        ours = [copy.deepcopy(layer).to(memory_format=layout) for layer in layers]
        values = with_gradients(form, ours, *(value.contiguous(memory_format=layout) for value in (x, towards)))
        return {name: float((values[name].double() - value).norm() / value.norm()) for name, value in exact.items()}

    exact = with_gradients(plain, [copy.deepcopy(layer).double() for layer in layers], x.double(), towards.double())
    del exact["conv.bias"], exact["num_batches_tracked"]  # 0; a counter
    ours, expected = errors(fused.conv_norm_relu, CHANNELS_LAST), errors(plain, torch.contiguous_format)
    worse = {
        name: error / expected[name] for name, error in ours.items() if error > 2 * max(expected[name], FEW_ROUNDINGS)
    }
    assert worse == {}


def test_folded_form_is_what_full_resolution_takes():
    assert fused._folds(torch.zeros(2, 8, 8, 8, 8).contiguous(memory_format=CHANNELS_LAST))
    assert not fused._folds(torch.zeros(2, 8, 8, 8, 8))
    assert not fused._folds(torch.zeros(1, 8, 3, 3, 3).contiguous(memory_format=CHANNELS_LAST))


@pytest.mark.parametrize("kind", [nn.Conv3d, nn.ConvTranspose3d])
@pytest.mark.parametrize("grad", [False, True])
def test_evaluation_uses_running_statistics_and_leaves_them(kind, grad):
    conv, norm = kind(4, 8, 2, stride=2), nn.BatchNorm3d(8).eval()
    for values in (norm.running_mean, norm.weight.data, norm.bias.data):
        values.normal_()
    norm.running_var.uniform_(0.5, 2)
    before = copy.deepcopy(norm.state_dict())
    x = torch.randn(1, 4, 8, 8, 8)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(fused.conv_norm_relu(conv, norm, x), plain(conv, norm, x), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(value, before[key]) for key, value in norm.state_dict().items())


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("layout", [CHANNELS_LAST, torch.contiguous_format])
@pytest.mark.parametrize("channels", [8, 12])
def test_pointwise_is_a_convolution(channels, outputs, layout):
    torch.manual_seed(0)
    conv = nn.Conv3d(channels, outputs, 1)
    accelerate(conv)
    assert type(conv) is fused.Pointwise
    x = torch.randn(2, channels, 8, 8, 4).contiguous(memory_format=layout)
    towards = torch.randn(2, outputs, 8, 8, 4)

    def gradients(function):
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        out = function(leaf)
        return out, *torch.autograd.grad((out * towards).sum(), [leaf, *conv.parameters()])

    for ours, expected in zip(gradients(conv), gradients(lambda x: nn.Conv3d.forward(conv, x)), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_training_step_is_that_of_plain_layers():
    """Parameters and statistics after steps of SGD: those of the same network, contiguous, by PyTorch's layers."""

    def trained(network, layout):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
        generator = torch.Generator().manual_seed(2)
        for _ in range(2):
            image = torch.randn(2, 1, 48, 48, 48, generator=generator).contiguous(memory_format=layout)
            loss = sum(output.square().mean() for output in network(image).values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return loss.item(), network.state_dict()

    loss, state = trained(fast(CHANNELS_LAST, "seg", "softmax"), CHANNELS_LAST)
    torch.manual_seed(1)
    plain_network = VNet(("seg", "softmax"), n_filters=8, dropout=0.0)
    expected_loss, expected = trained(plain_network, torch.contiguous_format)
    assert loss == pytest.approx(expected_loss, abs=1e-5)
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, rtol=1e-3, atol=5e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_first_level_is_channels_last():
    image = torch.randn(2, 1, 32, 32, 32).contiguous(memory_format=CHANNELS_LAST)
    assert fast(CHANNELS_LAST).encoder[0](image).is_contiguous(memory_format=CHANNELS_LAST)
    assert fast(torch.contiguous_format).encoder[0](image).is_contiguous()


def held_for_backward(network, image):
    """Bytes that a forward pass leaves behind, its outputs included."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        outputs = network(image)
    assert all(output.requires_grad for output in outputs.values())
    return sum(event.self_cpu_memory_usage for event in seen.key_averages())


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize(("layout", "width"), [(CHANNELS_LAST, 8), (torch.contiguous_format, 8), (CHANNELS_LAST, 12)])
def test_recomputing_changes_no_bit(amp, dropout, layout, width):
    def trained(recompute):
        network = fast(layout, "seg", "sdm", recompute=recompute, n_filters=width, dropout=dropout)
        image = torch.randn(2, 1, 48, 48, 48)
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            loss = sum(output.square().mean() for output in network(image).values())
        loss.backward(retain_graph=True)
        loss.backward()  # a second pass over the graph finds what it needs
        return {name: p.grad for name, p in network.named_parameters()} | dict(network.named_buffers())

    expected = trained(False)
    for name, value in trained(True).items():
        assert torch.equal(value, expected[name]), name


def test_recomputing_keeps_half_as_much():
    image = torch.randn(2, 1, 32, 32, 32)
    held = [held_for_backward(fast(CHANNELS_LAST, dropout=0.5, recompute=on), image) for on in (False, True)]
    assert held[1] < 0.55 * held[0]


def test_recomputing_lets_go_of_everything_in_the_backward_pass():
    """So that nothing but the output dies with the graph."""

    def held() -> int:
        gc.collect()
        return sum(x.numel() for x in gc.get_objects() if type(x) is torch.Tensor)

    out = fast(CHANNELS_LAST, recompute=True)(torch.randn(2, 1, 32, 32, 32))["seg"]
    out.sum().backward()
    before, size = held(), out.numel()
    del out
    assert before - held() <= size


@pytest.mark.parametrize("layout", [CHANNELS_LAST, torch.contiguous_format])
def test_a_training_network_is_one_graph_to_the_compiler(layout):
    """A break in it would leave layers out of what is compiled."""
    network = fast(layout, "seg", "sdm")
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    sum(output.sum() for output in compiled(torch.randn(2, 1, 32, 32, 32)).values()).backward()
    assert network.encoder[0][0].weight.grad is not None
