"""What a long prediction says while it computes."""

import math
import time
from datetime import timedelta

import torch
from tqdm import tqdm

WARM_UP = {"cpu": 0, "cuda": 1}  # groups of windows that say nothing about the pace


class Progress:
    """A bar over the windows of a scan; says after the first ones how long all of them take."""

    def __init__(self, windows: int, device: torch.device):
        self.bar = tqdm(total=windows, unit="window", disable=None, dynamic_ncols=True, leave=False)
        self.device, self.warm_up, self.start = device, WARM_UP[device.type], time.perf_counter()
        self.done = 0

    def __call__(self, count: int) -> None:
        """Note that `count` more windows are done."""
        self.bar.update(count)
        self.done += count
        if self.warm_up < 0 or self.done >= self.bar.total:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # else it would be the time of asking, not of computing
        now = time.perf_counter()
        if self.warm_up == 0:
            left = (self.bar.total - self.done) * (now - self.start) / count
            tqdm.write(f"  about {timedelta(seconds=math.ceil(left))} left")
        self.warm_up, self.start = self.warm_up - 1, now

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()


def in_units(size: int) -> str:
    """Bytes as people read them."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{math.ceil(size / 2**20)} MiB"
