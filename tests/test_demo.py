"""The claim of docs/results/phantom.md, by the commands of `make demo`."""

import json

import pytest

import make_phantom
import test_LA
import train
import train_dtml
from runtime import runs

SEEDS = range(1337, 1342)
WANTED = 4  # of them


@pytest.mark.slow
def test_dtml_is_ahead_of_the_v_net_in_four_of_five_seeds(tmp_path):
    def mean_dice(exp: str) -> float:
        return json.loads((tmp_path / exp / runs.METRICS_JSON).read_text())["summary"]["seg/none"]["dice"]["mean"]

    ahead = []
    for seed in map(str, SEEDS):
        scans, model = ["--root_path", str(tmp_path / f"scans{seed}")], ["--model_path", str(tmp_path)]
        make_phantom.main(["--dest", scans[1], "--seed", seed, "--test", "12"])
        flags = [*scans, *model, "--preset", "demo", "--device", "cpu", "--seed", seed]
        names = f"v_net{seed}", f"dtml{seed}"
        assert train.main(["--method", "supervised", *flags, "--exp", names[0]]) == 0
        assert train_dtml.main([*flags, "--exp", names[1]]) == 0
        assert test_LA.main([*scans, *model, "--exp", *names, "--skip", "predictions", "figures"]) == 0
        ahead.append(mean_dice(names[1]) > mean_dice(names[0]))
    assert sum(ahead) >= WANTED
