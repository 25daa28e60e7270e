import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import network
from benchmarks.reference import ReferenceVNet
from networks.vnet import VNet
from utils.errors import InputError

TINY = ("--patch_size", "32", "32", "32", "--n_filters", "8")


def test_the_strides_of_the_paper_are_scaled_like_the_patch():
    assert network.paper_stride((112, 112, 80)) == (18, 18, 4)
    assert network.paper_stride((64, 64, 48)) == (10, 10, 2)
    assert network.paper_stride((3, 3, 3)) == (1, 1, 1)


def test_reference_step_gives_the_same_loss():
    row = network.time_step(TINY, "off", 1)  # raises where the losses differ
    assert row["ratio"] > 0 and row["ours"] > 0 and row["reference"] > 0


@pytest.mark.parametrize(("method", "labeled"), [("dtc", 2), ("dtml_plus", 4)])  # dtc: needs a distance map
def test_a_method_steps_with_its_own_batch_beside_the_v_net(monkeypatch, method, labeled):
    batches = []
    step = network.Engine.step
    monkeypatch.setattr(network.Engine, "step", lambda engine, batch: batches.append(batch) or step(engine, batch))
    row = network.time_method(method, ("--preset", "cpu", *TINY), 2)
    assert row["ratio"] > 0
    sizes = [(len(batch.image), batch.num_labeled) for batch in batches]
    own, plain = (labeled + 2, labeled), (4, 4)
    assert sizes == [own, plain, own, plain, own, plain]  # once each before the clock, then in turns


def test_another_loss_is_noticed(monkeypatch):
    monkeypatch.setattr(network, "dtml_step", lambda *arguments: lambda batch: 1.0)
    with pytest.raises(InputError, match="losses of both sides differ"):
        network.time_step(TINY, "off", 1)


def test_reference_inference_gives_the_same_map():
    row = network.time_inference(TINY, (34, 33, 32), "off", "paper", 1)  # raises where the maps differ
    assert row["ratio"] > 0


def test_another_map_is_noticed(monkeypatch):
    monkeypatch.setattr(network, "window_by_window", lambda m_s, m_d, image, *others: np.ones_like(image))
    with pytest.raises(InputError, match="probabilities of both sides differ"):
        network.time_inference(TINY, (34, 33, 32), "off", "paper", 1)


@pytest.mark.slow
def test_the_share_is_the_rate_of_the_step_over_that_of_the_product(monkeypatch):
    monkeypatch.setitem(network.MATRIX, "cpu", 256)
    row = network.share_of_matrix_rate(TINY, "off", 3)
    low, high = row["spread"]
    assert 0 < low <= row["ratio"] <= high and row["unit"] == "GFLOP/s"
    assert row["ratio"] == pytest.approx(row["ours"] / row["reference"], rel=0.5)  # medians of ratios, ratio of medians


def test_multiplications_of_the_fused_network_are_those_of_the_plain_one():
    """The plain one has a second head, which is less than a thousandth."""
    image = torch.zeros(1, 1, 32, 32, 32)
    net = VNet(("seg",), n_filters=8, dropout=0.0)
    counts = []
    for form, x in ((net, image.to(memory_format=torch.channels_last_3d)), (ReferenceVNet(net), image)):
        with FlopCounterMode(display=False) as counter:
            form(x)["seg"].sum().backward()
        counts.append(counter.get_total_flops())
    first = 2 * 27 * 8 * 32**3  # of the first convolution: two per voxel and weight
    assert counts[0] == pytest.approx(counts[1], rel=1e-3) and counts[0] > 100 * first


@pytest.mark.slow
def test_memory_of_a_step_is_that_of_the_step():
    row = network.memory_of_step(("--preset", "cpu"), "off", 1)
    assert 0 < row["ours"] < 2 and row["unit"] == "GiB"


@pytest.mark.slow
def test_openvino_gives_the_same_map():
    pytest.importorskip("openvino")
    assert network.time_openvino(TINY, (34, 33, 32), "off", 1)["ratio"] > 0  # raises where the maps differ
