"""Named groups of defaults: --preset for a machine or a purpose, --compat for the habits of the public codes."""

from typing import Any

import torch


def cpu_has_bf16() -> bool:
    """Whether this processor multiplies bfloat16 natively; elsewhere bf16 would be slower than float32."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # private: a release may lack them
    return any(getattr(torch.cpu, probe, bool)() for probe in probes)


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
        "amp": "bf16" if cpu_has_bf16() else "off",
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
    },
}
