"""Critics: published size and output, any patch, gradient paths, and nothing that asking them alters."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.critics import ConfidenceNet, SDMCritic, critic_optimizer

PUBLISHED_SDM_CRITIC = 11_020_290
# Table of the public implementation: 2->32 (3^3), 32->64->128->256 (4^3) and back (with batch norm), 32->1 (1^3).
DOWN = [(2, 32, 27), (32, 64, 64), (64, 128, 64), (128, 256, 64)]
UP = [(256, 128, 64), (128, 64, 64), (64, 32, 64)]


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def two_classes(foreground: Tensor) -> Tensor:
    return torch.cat((1 - foreground, foreground), dim=1)


@pytest.fixture
def critic() -> SDMCritic:
    torch.manual_seed(0)
    return SDMCritic(n_filters=4).eval()


@pytest.fixture
def confidence() -> ConfidenceNet:
    torch.manual_seed(0)
    return ConfidenceNet(n_filters=4)


def test_parameter_counts_are_the_published_ones():
    assert count(SDMCritic()) == PUBLISHED_SDM_CRITIC
    layers = sum(a * b * taps + b for a, b, taps in [*DOWN, *UP, (32, 1, 1)])
    assert count(ConfidenceNet()) == layers + sum(2 * b for _, b, _ in UP) == 5_507_937


def published(critic: SDMCritic, sdm: Tensor, image: Tensor, pooling: tuple[int, int, int]) -> Tensor:
    """SASSNet's public critic in evaluation mode, layer by layer, with its average pooling of fixed size."""

    def conv(layer: nn.Conv3d, x: Tensor) -> Tensor:
        return F.conv3d(x, layer.weight, layer.bias, stride=2, padding=1)

    x = F.leaky_relu(conv(critic.embed_map, sdm) + conv(critic.embed_image, image), 0.2)
    for layer in critic.down:
        x = F.leaky_relu(conv(layer, x), 0.2)
    x = nn.AvgPool3d(pooling)(x).view(len(sdm), -1)
    return F.linear(x, critic.classifier.weight, critic.classifier.bias)


def test_output_at_the_published_patch_is_that_of_the_fixed_pooling(critic):
    sdm, image = noise(1, 1, 112, 112, 80).tanh(), noise(1, 1, 112, 112, 80, seed=1)
    with torch.no_grad():
        torch.testing.assert_close(critic(sdm, image), published(critic, sdm, image, (7, 7, 5)))
        assert (critic(sdm, image) - critic(-sdm, image)).abs().max() > 1e-3  # not merely both constant


@pytest.mark.parametrize("size", [(32, 32, 32), (33, 47, 36)])
def test_any_patch_works(critic, confidence, size):
    x = noise(2, 1, *size)
    assert critic(x.tanh(), x).shape == (2, 2)
    assert confidence(two_classes(x.sigmoid())).shape == (2, 1, *size)


def test_the_verdict_depends_on_map_image_and_no_other_case(critic):
    sdm, image = noise(2, 1, 32, 32, 32).tanh(), noise(2, 1, 32, 32, 32, seed=1)
    verdict = critic(sdm, image)
    torch.testing.assert_close(critic(sdm[:1], image[:1]), verdict[:1])
    assert not torch.allclose(critic(sdm.flip(0), image), verdict)
    assert not torch.allclose(critic(sdm, image.flip(0)), verdict)


def test_the_sdm_critic_drops_features_in_training_only(critic):
    x = noise(1, 1, 32, 32, 32)
    assert torch.equal(critic(x, x), critic(x, x))
    critic.train()
    assert not torch.equal(critic(x, x), critic(x, x))


def test_every_level_of_the_confidence_net_acts(confidence):
    """In the public implementation the deepest level has no effect, for its output is never read."""
    # An even function: batch norm centres each channel, so the plain sum of its output would have no gradient.
    confidence(two_classes(noise(2, 1, 32, 32, 32).sigmoid())).square().sum().backward()
    for name, parameter in confidence.named_parameters():
        # Batch norm takes away what a bias in front of it adds.
        if not (name.startswith("up.") and name.endswith("bias")):
            assert parameter.grad.abs().max() > 1e-4, name


def test_skips_act_too(confidence):
    prob = two_classes(noise(1, 1, 32, 32, 32).sigmoid())
    before = confidence(prob)
    for norm in confidence.norm:  # silences the up path; what is left comes from the uppermost skip
        nn.init.zeros_(norm.weight)
        nn.init.zeros_(norm.bias)
    skip = F.leaky_relu(confidence.stem(prob), 0.2)
    torch.testing.assert_close(confidence(prob), confidence.head(F.relu(skip)))
    assert not torch.allclose(confidence(prob), before)


def test_asking_the_confidence_net_alters_nothing(confidence):
    before = copy.deepcopy(confidence.state_dict())
    prob = two_classes(noise(2, 1, 32, 32, 32).sigmoid())
    answer = confidence.train()(prob)
    assert torch.equal(confidence.eval()(prob), answer)
    after = confidence.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_logits_are_float32_under_autocast(critic, confidence):
    x = noise(1, 1, 32, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        assert critic(x, x).dtype == torch.float32
        assert confidence(two_classes(x.sigmoid())).dtype == torch.float32


def test_the_optimizer_is_the_public_implementations(critic):
    optimizer = critic_optimizer(critic, 1e-4)
    (group,) = optimizer.param_groups
    assert isinstance(optimizer, torch.optim.Adam)
    assert (group["lr"], group["betas"], group["weight_decay"]) == (1e-4, (0.9, 0.99), 0)
    assert len(group["params"]) == len(list(critic.parameters()))


def test_several_classes_widen_the_first_convolution_alone():
    few, many = SDMCritic(n_filters=4), SDMCritic(n_filters=4, num_classes=3)
    assert count(many) - count(few) == 2 * 4 * 4**3
    assert many(torch.rand(2, 3, 16, 16, 16), torch.rand(2, 1, 16, 16, 16)).shape == (2, 2)
    few, many = ConfidenceNet(n_filters=4), ConfidenceNet(n_filters=4, num_classes=3)
    assert count(many) - count(few) == 2 * 4 * 3**3
    assert many(torch.rand(2, 4, 16, 16, 16)).shape == (2, 1, 16, 16, 16)
