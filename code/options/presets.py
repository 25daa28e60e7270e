"""Named groups of defaults: --preset for a machine or a purpose, --compat for the public implementations."""

from functools import cache
from pathlib import Path
from typing import Any

CPUINFO = Path("/proc/cpuinfo")  # Linux; elsewhere a processor counts as one without bfloat16


@cache
def cpu_has_bf16() -> bool:
    """Whether this processor multiplies bfloat16 natively; elsewhere bf16 would be slower than float32."""
    lines = CPUINFO.read_text().splitlines() if CPUINFO.exists() else []
    features = next((line.split() for line in lines if line.startswith("flags")), [])
    return not {"avx512_bf16", "amx_tile"}.isdisjoint(features)


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "cpu": {  # chosen on lines 49-64 of dev_train.list, trained on lines 1-48: docs/results/cpu_preset.md
        "scale": 0.5,
        "patch_size": [64, 64, 48],
        "n_filters": 8,
        "dropout": 0.0,
        "max_iterations": 6000,
        "base_lr": 0.03,
        "lr_schedule": "cosine",
        "aug_zoom": 0.2,
        "aug_rotate": 15.0,
        "aug_intensity": 0.2,
        "num_workers": 1,
        "amp": "bf16",  # where the processor has it: options.parsing
        "stride_xy": 16,
        "stride_z": 16,
    },
    "hippocampus": {  # chosen on --split dev; minutes on a CPU: docs/results/hippocampus/preset.md
        "root_path": "data/hippocampus",
        "labelnum": 8,
        "labeled_bs": 3,
        "patch_size": [32, 48, 32],
        "n_filters": 8,
        "dropout": 0.0,
        "max_iterations": 1000,
        "base_lr": 0.1,
        "lr_schedule": "cosine",
        "rampup_share": 0.375,
        "aug_zoom": 0.2,
        "aug_rotate": 15.0,
        "aug_intensity": 0.2,
        "num_workers": 0,
        "stride_xy": 16,
        "stride_z": 16,
    },
    "demo": {  # minutes on two cores: the phantom of make_phantom.py; docs/results/phantom.md
        "root_path": "data/phantom",
        "labelnum": 4,
        "patch_size": [48, 48, 32],
        "n_filters": 8,
        "dropout": 0.0,
        "max_iterations": 400,
        "base_lr": 0.03,
        "lr_schedule": "cosine",
        "num_workers": 0,
        "stride_xy": 16,
        "stride_z": 16,
    },
}
COMPAT: dict[str, dict[str, Any]] = {
    "public": {
        "flip": "always",
        "crop_bound": "exclusive",
        "ramp": "stairs",
        "sdm_empty": "zeros",
        "con_scale": 2.0,
        "eval_empty": "zeros",
        "post": "lcc",
        "head": None,  # the method's first, the segmentation where it has one
    }
}
