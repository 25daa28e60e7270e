"""The contract on a GPU: `pytest -m gpu` tells the owner of one in minutes whether everything runs on it."""

import pytest
import torch

import predict
import test_LA
import train
from methods import METHODS
from networks import Network
from runtime import runs
from runtime.device import BF16_CAPABILITY, memory_format, set_determinism


DEVICE = "cpu"
AMPS = {"off": 1e-3, "bf16": 0.1, "fp16": 0.02}  # and how far a loss may be from the CPU's in float32, relative
SOFT = {name: ("--sdm_k", "5") for name in ("dtml", "dtc")}  # k = 1500 turns rounding into another mask
SOFT["dtml_plus"] = (*SOFT["dtml"], "--sdm_k_start", "0", "--view_strength", "0")  # views are drawn by each device
COMPILED = ("supervised", "dtml")  # each costs the compiler a minute


@pytest.fixture(autouse=True)
def gpu(request):
    if False:
        pytest.skip("there is no GPU")
    amp = getattr(request.node, "callspec", None) and request.node.callspec.params.get("amp")
    if False:
        pytest.skip("this GPU has no bfloat16")


def first_loss(values) -> float:
    """The supervised term of the segmentation: no noise, no teacher."""
    return next(float(value) for name, value in values.items() if name.startswith("loss/"))


@pytest.mark.parametrize("classes", [1, 2])
@pytest.mark.parametrize("amp", AMPS)
@pytest.mark.parametrize("name", METHODS)
def test_a_step_is_that_of_the_cpu(build_engine, make_batch, name, amp, classes):
    flags = ["--batch_size", "2", "--dropout", "0", "--num_classes", str(classes), *SOFT.get(name, ())]
    counts, losses = (1, 1) if METHODS[name].uses_unlabeled else (2, 0), []
    batch = make_batch(*counts, size=48, classes=classes)
    for where, precision in (("cpu", "off"), (DEVICE, amp)):
        engine = build_engine(name, *flags, "--amp", precision, device=where)
        layout = memory_format(engine.device, precision)
        values = engine.step(batch.to(engine.device, layout))
        losses.append(first_loss(values))
        assert all(torch.isfinite(torch.as_tensor(value)) for value in values.values())
        for network in (module for module in engine.method.modules() if isinstance(module, Network)):
            assert network.encoder[1][0].weight.is_contiguous(memory_format=layout)
        assert all(p.device.type == where and p.isfinite().all() for p in engine.method.parameters())
    assert losses[1] == pytest.approx(losses[0], rel=AMPS[amp])


@pytest.mark.parametrize("name", COMPILED)
def test_a_compiled_step_is_the_plain_one(build_engine, make_batch, name):
    batch, losses = make_batch(1, 1) if METHODS[name].uses_unlabeled else make_batch(2, 0), []
    for flags in ((), ("--compile",)):
        engine = build_engine(name, "--batch_size", "2", "--dropout", "0", *SOFT.get(name, ()), *flags, device=DEVICE)
        losses.append([first_loss(engine.step(batch.to(engine.device))) for _ in range(2)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


@pytest.mark.parametrize("flags", [("--recompute",), ("--tf32",), ("--network", "residual_unet")], ids=" ".join)
def test_a_step_with_other_layers_is_that_of_the_cpu(build_engine, make_batch, flags):
    batch, losses = make_batch(1, 1), []
    for where in ("cpu", DEVICE):
        engine = build_engine("dtml", "--batch_size", "2", "--dropout", "0", *SOFT["dtml"], *flags, device=where)
        losses.append([first_loss(engine.step(batch.to(engine.device))) for _ in range(2)])
    assert losses[1] == pytest.approx(losses[0], rel=0.02 if "--tf32" in flags else 1e-3)


@pytest.fixture
def deterministic():
    set_determinism(True)
    yield
    set_determinism(False)


@pytest.mark.parametrize("network", ["vnet", "residual_unet"])
def test_a_deterministic_run_that_was_resumed_is_the_one_that_was_not(
    build_engine, make_batch, tmp_path, deterministic, network
):
    first, second = (make_batch(1, 1, seed=seed).to(torch.device(DEVICE)) for seed in (0, 1))
    flags = ["--batch_size", "2", "--dropout", "0.5", "--network", network]
    straight = build_engine("dtml", *flags, device=DEVICE)
    straight.step(first)
    straight.save(runs.LAST)
    straight.step(second)
    resumed = build_engine("dtml", *flags, seed=7, device=DEVICE)
    resumed.load(runs.load_checkpoint(tmp_path / runs.LAST))
    resumed.step(second)
    ours, theirs = resumed.method.state_dict(), straight.method.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("amp", AMPS)
@pytest.mark.parametrize("name", METHODS)
def test_a_run_trains_resumes_is_tested_and_predicts(name, amp, phantom, raw_scans, tmp_path):
    where = ["--exp", "run", "--model_path", str(tmp_path / "model"), "--device", DEVICE]
    small = "--preset demo --patch_size 32 32 32 --n_filters 8 --batch_size 2 --labelnum 2 --image_every 2".split()
    training = ["--method", name, *small, *where, "--root_path", str(phantom), "--amp", amp]
    assert train.main([*training, "--max_iterations", "2"]) == 0
    assert train.main([*training, "--max_iterations", "3", "--resume"]) == 0
    state = runs.load_checkpoint(tmp_path / "model" / "run" / runs.LAST)
    assert state["iteration"] == 3 and state["machine"]["gpu"]
    assert test_LA.main([*where, "--skip", "figures"]) == 0
    assert (tmp_path / "model" / "run" / runs.METRICS_CSV).exists()
    scan, masks = raw_scans / "images" / "scan0.nii.gz", tmp_path / "masks"
    assert predict.main([*where, "--input", str(scan), "--output", str(masks), "--save", "prob"]) == 0
    assert list(masks.glob("scan0*prob*"))
