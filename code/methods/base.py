"""What a method is: a module that owns its networks, and nothing around them (no loader, loop, device, file).

To add one, copy `supervised.py`, write the step, and add a line to `METHODS`. Its flags are declared in its
`add_arguments`, or in options/methods.py, where --help finds them without PyTorch.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from dataloaders.batch import Batch
from networks import NETWORKS, Network, VNet
from networks.published import load_published
from options.methods import ConsistencyFlags, MethodFlags
from utils.errors import InputError
from utils.schedules import STAIRS, rampup
from utils.words import counted

Terms = dict[str, Tensor]


@dataclass
class Turn:
    """One player's move: the terms that it minimises and the optimizer that does it.

    Gradients are open only for the parameters of `optimizer`, so players cannot train each other.
    With `scheduled` the engine sets the rate of --lr_schedule; a critic's own rate stays as built.
    """

    name: str
    step: Callable[[Batch, int], Terms]
    optimizer: torch.optim.Optimizer
    scheduled: bool = True

    def parameters(self) -> list[nn.Parameter]:
        """What the optimizer drives."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]


class Method(MethodFlags, nn.Module):
    """Interface of all methods. Subclasses build their networks in `__init__` and read flags from `self.options`."""

    outputs: ClassVar[tuple[str, ...]] = ("seg",)  # what `predict` can give, the reported one first
    exclusive: ClassVar[bool] = False  # whether the probabilities of a voxel's classes are those of one softmax
    sdm_empty: str | None = None  # rule (--sdm_empty) of the distance maps that a batch shall hold; None: no maps

    def __init__(self, options: Namespace):
        super().__init__()
        self.options = options
        self.num_classes = options.num_classes or 1  # C; None where no data folder was asked
        self.trained_iterations = options.max_iterations  # of the weights at hand; the engine and loading keep it true
        self.monitor: dict[str, float | Tensor] = {}  # numbers for a curve, never minimised

    @classmethod
    def of_run(cls, options: Mapping[str, Any]) -> Self:
        """The method of a stored run; flags that did not exist when it was trained have their defaults."""
        parser = ArgumentParser(add_help=False)
        cls.add_arguments(parser)
        return cls(Namespace(**{"num_classes": 1, **vars(parser.parse_args([])), **options}))

    def make_network(self, *heads: str, **settings: Any) -> Network:
        """The network that the flags ask for, with heads for all classes; `settings` are further ones."""
        flags = {key: getattr(self.options, key) for key in ("n_filters", "dropout", "norm")}
        return NETWORKS[self.options.network](heads, num_classes=self.num_classes, **flags, **settings)

    def load_pretrained(self, paths: Sequence[Path]) -> list[str]:
        """Published weights as a start: one file for every V-Net, or one for each in the order of definition.

        Returns: a sentence on each network: its file, and the heads that start from initial values.
        """
        networks = {name: module for name, module in self.named_modules() if isinstance(module, VNet)}
        if not networks:
            raise InputError(f"--pretrained starts V-Nets, not --network {self.options.network}; give --network vnet")
        if len(paths) not in (1, len(networks)):
            raise InputError(
                f"--pretrained names {counted(len(paths), 'file')} for {counted(len(networks), 'network')} "
                f"({', '.join(networks)}): give one file for all or one for each, separated by commas"
            )
        sentences = []
        for (name, network), path in zip(networks.items(), paths * (len(networks) // len(paths)), strict=True):
            lacking = load_published(network, path)
            classes = f" for {self.num_classes} classes" if self.num_classes > 1 else ""
            without = f"; its head {' and '.join(lacking)} is not in there{classes} and starts from scratch"
            initial = without if lacking else ""
            sentences.append(f"{name} starts from {path}{initial}")
        return sentences

    def make_optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The shared optimizer (--optimizer) over some parameters; the engine sets its rate every iteration."""
        rate, decay = self.options.base_lr, self.options.weight_decay
        if self.options.optimizer == "adamw":
            return torch.optim.AdamW(parameters, lr=rate, weight_decay=decay)
        return torch.optim.SGD(parameters, lr=rate, momentum=self.options.momentum, weight_decay=decay)

    def turns(self) -> list[Turn]:
        """The moves of one iteration, in order; called once, when training starts."""
        trainable = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return [Turn("step", self.training_step, self.make_optimizer(trainable))]

    def training_step(self, batch: Batch, iteration: int) -> Terms:
        """Terms of the objective by name, weights applied; the engine minimises their sum and logs each."""
        raise NotImplementedError

    def after_step(self, iteration: int) -> None:
        """Called after the last turn of an iteration, unless fp16 skipped its steps: the place of a moving average."""

    def predict(self, image: Tensor, outputs: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Probability of each foreground class, {name: (B, C, W, H, D) float32}, by the given `outputs` or by all."""
        raise NotImplementedError

    def courses(self) -> list[str]:
        """What changes in the course of training besides the learning rate, in words, for the log."""
        return []

    def signed_maps(self, image: Tensor) -> dict[str, Tensor]:
        """Signed distance maps of a patch, {name: (B, C, W, H, D)}, for pictures; empty for most methods."""
        return {}


class ConsistencyMethod(ConsistencyFlags, Method):
    """A method with one consistency weight: lambda(t) = --consistency x Gaussian ramp over its first iterations."""

    def __init__(self, options: Namespace):
        super().__init__(options)
        self.ramp_start, self.ramp_length = 0, options.ramp_iterations  # other ones where a term sets in later

    def consistency_weight(self, iteration: int) -> float:
        """lambda(t), t counted from 0."""
        stairs = self.options.consistency_rampup or STAIRS  # a length given by its flag has a stair per unit
        ramp = rampup(iteration - self.ramp_start, self.ramp_length, self.options.ramp, stairs)
        self.monitor["consistency_weight"] = weight = self.options.consistency * ramp
        return weight

    def courses(self) -> list[str]:
        start = f" from iteration {self.ramp_start} on" if self.ramp_start else ""
        return [f"consistency rising to {self.options.consistency:g} over {self.ramp_length:g}{start}"]


def require_unlabeled(options: Namespace, who: str, instead: str) -> None:
    """Refuse a run without an unlabeled case in every batch, for a method or flag (`who`) that needs one."""
    if options.unlabelnum == 0 or options.labeled_bs == options.batch_size:
        raise InputError(
            f"{who} needs unlabeled cases in every batch, but there are none (--batch_size {options.batch_size}, "
            f"--labeled_bs {options.labeled_bs}, --unlabelnum {options.unlabelnum}); change these flags, or {instead}"
        )
