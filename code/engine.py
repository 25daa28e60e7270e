"""The only training loop: batch, turns (terms, sum, backward, step), after_step; log, save, resume."""

import contextlib
import dataclasses
import math
import signal
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dataloaders.batch import Batch, BatchStream, delivered, make_loader
from dataloaders.split import Split
from dataloaders.store import CaseStore
from evaluation.metrics import overlap
from inference.trained import load_networks
from inference.windows import dice_of_cases
from methods.base import Method, Terms, Turn
from runtime import runs
from runtime.device import machine, memory_format, peak_memory_gib, place, precision
from runtime.distributed import ALONE, Ranks
from runtime.journal import Journal
from runtime.workers import STOP_SIGNALS, affordable_workers, watched_loaders
from utils.errors import InputError
from utils.labels import ONE_CLASS, LabelClass, classes_as_record, label_map, one_hot
from utils.schedules import learning_rate

# Iterations that do not count for the printed step time, and those after which it is printed. A CPU has little to
# warm up, and with large settings its user should not wait an hour to learn that the run will take days.
PACE = {"cuda": (5, 20), "cpu": (0, 1)}
DAY = 24 * 3600  # seconds
LOSS = "loss/"  # before the name of a term in the curves


class Stopped(Exception):
    """A signal arrived and the run was saved; `number` is the signal's."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


class Engine:
    """Trains one method in one run folder; as one of several `ranks`, on batches of its own.

    `preprocessing` is the record of the data folder, which the run hands on; None, the published LA files' rule.
    `classes` are those of the labels.
    """

    def __init__(
        self,
        options: Namespace,
        method: Method,
        split: Split,
        folder: Path,
        device: torch.device,
        ranks: Ranks = ALONE,
        preprocessing: dict[str, Any] | None = None,
        classes: Sequence[LabelClass] = ONE_CLASS,
    ):
        self.options, self.split, self.folder, self.device, self.ranks = options, split, folder, device, ranks
        self.method = place(method, device, options, ranks)
        self.turns = method.turns()
        scaler = partial(torch.amp.GradScaler, device.type, enabled=options.amp == "fp16")
        self.scalers = {turn.name: scaler() for turn in self.turns}
        self.skipped = 0  # steps of players that fp16 left out because a gradient overflowed
        self.preprocessing, self.classes = preprocessing, classes
        self.typical_scan: dict[str, Any] | None = None  # of the training; what predict.py measures a scan by
        self.iteration = 0  # finished ones
        self.seconds = 0.0  # of training steps, over all resumptions
        self.peak_memory = 0.0  # GiB, the largest of the finished parts of a resumed run
        self.best_val = -1.0
        self._signal, self._waiting = 0, False
        self._unread: list[tuple[int, tuple[str, ...], dict[str, Tensor]]] = []  # iteration, cases, losses
        self._started = self._logged = self._warm = self._now()  # of this process, of the last row, after the warm-up

    # --- training

    def train(self, store: CaseStore, journal: Journal) -> None:
        """Train up to --max_iterations. A signal, to whichever rank, saves the run and raises `Stopped` on all."""
        self.typical_scan = store.typical_scan()
        self.ranks.share_weights(self.method)
        cases = self.split.labeled, self.split.unlabeled
        stream = BatchStream(self.options, store, *cases, self.ranks, self.method.sdm_empty)
        workers, notices = affordable_workers(self.options.num_workers, stream.batch_bytes, self.ranks.local_size)
        for line in notices:
            journal.say(line)
        batches = delivered(make_loader(stream, self.iteration, workers, self.device.type == "cuda"))
        handlers = {number: signal.signal(number, self._on_signal) for number in STOP_SIGNALS}
        try:
            with watched_loaders(), contextlib.closing(batches):
                self._stoppable_loop(batches, journal)
        finally:
            if self.ranks.size == 1:  # else torchrun's signal might cut short what rank 0 still has to say
                for number, handler in handlers.items():
                    signal.signal(number, handler)

    def _stoppable_loop(self, batches: Iterator[Batch], journal: Journal) -> None:
        try:
            self._loop(batches, journal)
            if self.options.max_iterations == 0:  # no iteration saves the weights that it starts from
                self.save(runs.LAST)
        except Stopped:
            journal.write_curves()
            self.save(runs.LAST)
            raise

    def _on_signal(self, number: int, frame: Any) -> None:
        self._signal = number
        if self.ranks.size == 1:  # torchrun passes on what a scheduler has sent to all already
            signal.signal(number, signal.SIG_DFL)  # a second one kills at once
            if self._waiting:
                raise Stopped(number)

    def _awaited(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches; a signal does not wait for the next one, which may never come."""
        while True:
            self._waiting = True
            try:
                if self._signal and self.ranks.size == 1:  # it came after the last step
                    raise Stopped(self._signal)
                batch = next(batches, None)
            finally:
                self._waiting = False
            if batch is None:
                return
            yield batch

    def _loop(self, batches: Iterator[Batch], journal: Journal) -> None:
        options, total = self.options, self.options.max_iterations
        hidden = None if self.ranks.leads else True  # None: unless there is a terminal
        with tqdm(initial=self.iteration, total=total, unit="it", disable=hidden, dynamic_ncols=True) as bar:
            self._started = self._logged = self._warm = self._now()
            tick = time.perf_counter()
            for batch in self._awaited(batches):
                wait = time.perf_counter() - tick
                batch = batch.to(self.device, memory_format(self.device, options.amp))
                values = self.step(batch)
                log = self._due(options.log_every)
                if log or self.iteration - self._started[0] in PACE[self.device.type]:
                    self.check_losses()
                self.seconds += time.perf_counter() - tick
                bar.update()
                self._announce_pace(journal)
                if log:
                    values |= {"step_seconds": self._pace_since(self._logged), "data_wait": wait}
                    self._logged = self._now()
                    values = {name: float(value) for name, value in self.ranks.mean(values).items()}
                    journal.scalars(self.iteration, values)
                    bar.set_postfix_str(_losses(values))
                    if self.ranks.leads and self._due(options.report_every):
                        journal.report(self._report(values, batch), bar.disable)
                if self.ranks.leads and self._due(options.image_every):
                    journal.image(self.iteration, "training", self._picture(batch))
                if self.ranks.leads and self.split.validation and self._due(options.val_every):
                    self._validate(journal)
                if options.keep_checkpoints and self._due(options.save_every):
                    self.save(f"iteration_{self.iteration}.pth")
                if stop := self.ranks.largest(self._signal):
                    raise Stopped(stop)
                if self._due(options.save_every):
                    journal.write_curves()
                    self.save(runs.LAST)
                tick = time.perf_counter()

    def _due(self, every: int, iteration: int | None = None) -> bool:
        done = self.iteration if iteration is None else iteration
        return bool(every) and (done % every == 0 or done == self.options.max_iterations)

    def step(self, batch: Batch) -> dict[str, float | Tensor]:
        """One iteration: every turn in order, then `after_step`. Returns the numbers for the curves."""
        self.method.train()
        self.method.monitor.clear()
        self.ranks.draw_anew(self.options.seed, self.iteration)
        rate = learning_rate(self.iteration, self.options)
        values: dict[str, float | Tensor] = {"learning_rate": rate}
        moved = False
        for turn in self.turns:
            terms, stepped = self._take_turn(turn, batch, rate)
            values |= terms
            self.skipped += not stepped
            moved |= stepped and turn.scheduled
        if moved:  # else a teacher has nothing to follow
            self.method.after_step(self.iteration)
        if self.options.amp == "fp16":
            values["skipped_steps"] = self.skipped
        self.ranks.share_buffers(self.method)
        self.iteration += 1
        self.method.trained_iterations = self.iteration
        losses = {name: value for name, value in values.items() if name.startswith(LOSS)}
        self._unread.append((self.iteration, batch.cases, losses))
        return values | self.method.monitor

    def check_losses(self) -> None:
        """Raise an `InputError` for the first loss since the last call that is not finite.

        Reading them waits for a GPU; a step only gives it work, but for that of fp16, which looks for overflows.
        """
        unread, self._unread = self._unread, []
        losses = [loss for *_, losses in unread for loss in losses.values()]
        numbers = iter(torch.stack(losses).tolist() if losses else [])
        for iteration, cases, names in unread:
            values = {name.removeprefix(LOSS): next(numbers) for name in names}
            if not math.isfinite(sum(values.values())):
                raise self._not_finite(iteration, values, cases)

    def _take_turn(self, turn: Turn, batch: Batch, rate: float) -> tuple[dict[str, float | Tensor], bool]:
        """One player's step. Returns: its numbers for the curves; whether it moved: fp16 skips where it overflows."""
        self._open_gradients(turn)
        if turn.scheduled:
            for group in turn.optimizer.param_groups:
                group["lr"] = rate
        with precision(self.device, self.options.amp):
            terms = turn.step(batch, self.iteration)
        scaler = self.scalers[turn.name]
        scale = scaler.get_scale()  # 1 unless in fp16
        losses = torch.stack([term.float() for term in terms.values()])
        logged = dict(zip((f"{LOSS}{name}" for name in terms), losses.detach(), strict=True))
        if self.options.log_gradients and self._due(self.options.log_every, self.iteration + 1):
            logged |= _gradient_norms(terms, turn, scale)
        turn.optimizer.zero_grad(set_to_none=True)
        scaler.scale(losses.sum()).backward()
        self.ranks.average_gradients(turn.optimizer)
        scaler.step(turn.optimizer)
        scaler.update()
        return logged, scaler.get_scale() >= scale

    def _open_gradients(self, turn: Turn) -> None:
        if len(self.turns) == 1:
            return
        own = set(map(id, turn.parameters()))
        for other in self.turns:
            for parameter in other.parameters():
                parameter.requires_grad_(id(parameter) in own)

    def _not_finite(self, iteration: int, losses: dict[str, float], cases: tuple[str, ...]) -> InputError:
        bad = ", ".join(f"{name} = {value:g}" for name, value in losses.items())
        return InputError(
            f"the loss is not finite in iteration {iteration} ({bad}; cases {', '.join(cases)}); {self._way_back()}"
        )

    def _way_back(self) -> str:
        last = self.folder / runs.LAST
        saved = f"the last good checkpoint is {last}" if last.exists() else "nothing was saved yet"
        return f"{saved}; lower --base_lr or try --amp off"

    # --- what people look at

    def _now(self) -> tuple[int, float]:
        return self.iteration, self.seconds

    def _pace_since(self, moment: tuple[int, float]) -> float:
        """Seconds per iteration since then."""
        iteration, seconds = moment
        return (self.seconds - seconds) / (self.iteration - iteration)

    def _announce_pace(self, journal: Journal) -> None:
        warm_up, timed = PACE[self.device.type]
        done = self.iteration - self._started[0]
        if done == warm_up:
            self._warm = self._now()
        if done != timed:
            return
        pace = self._pace_since(self._warm)
        seconds = pace * (self.options.max_iterations - self.iteration)
        left = timedelta(seconds=round(seconds))
        end = (datetime.now() + left).strftime("%Y-%m-%d %H:%M")
        journal.say(
            f"{pace:.2f} s per iteration; {left} left, until about {end}; "
            f"peak memory {peak_memory_gib(self.device):.1f} GiB"
        )
        if self.device.type == "cpu" and seconds > DAY and self.options.preset != "cpu":
            journal.say(f"that is {seconds / DAY:.1f} days: these settings are made for a GPU, --preset cpu for a CPU")

    def _report(self, values: dict[str, float], batch: Batch) -> str:
        """Where the training stands: losses, rate, pace, time left, Dice of this batch's labeled crops."""
        left = timedelta(seconds=round(values["step_seconds"] * (self.options.max_iterations - self.iteration)))
        probs = self._predict(batch.image[: batch.num_labeled])
        scores = {name: _dice(prob, batch.label, self.method.exclusive) for name, prob in probs.items()}
        dice = ", ".join(f"{name} {self._in_percent(values, 1)}" for name, values in scores.items())
        return (
            f"iteration {self.iteration} of {self.options.max_iterations}: {_losses(values)}; "
            f"rate {values['learning_rate']:.3g}; {values['step_seconds']:.2f} s per iteration, {left} left; "
            f"Dice of the labeled crops: {dice}"
        )

    def _in_percent(self, dice: Sequence[float], digits: int) -> str:
        """The mean over classes and, of several, the value of each."""
        each = [f"{one.name} {100 * value:.{digits}f}" for one, value in zip(self.classes, dice, strict=True)]
        return f"{100 * np.mean(dice):.{digits}f}" + (f" ({', '.join(each)})" if len(each) > 1 else "")

    @torch.no_grad()
    def _predict(self, image: Tensor) -> dict[str, Tensor]:
        self.method.eval()
        with precision(self.device, self.options.amp):
            return self.method.predict(image)

    @torch.no_grad()
    def _picture(self, batch: Batch) -> np.ndarray:
        """A labeled crop and, below it, an unlabeled one, if there is one."""
        from evaluation.figures import training_panel  # matplotlib takes a second to import

        rows = []
        for index in [0, batch.num_labeled][: 1 + (len(batch.image) > batch.num_labeled)]:
            image = batch.image[index : index + 1]
            probs = {name: _array(prob) for name, prob in self._predict(image).items()}
            with precision(self.device, self.options.amp):
                maps = [_array(sdm) for sdm in self.method.signed_maps(image).values()]
            label = None if index else _array(batch.label)
            rows.append(training_panel(_array(image)[0], label, probs, maps[0] if maps else None))
        return np.concatenate(rows)

    def _validate(self, journal: Journal) -> None:
        of_classes = dice_of_cases(self.method, self.split.validation, self.options, self.device)
        dice = float(np.mean(of_classes))
        scalars = {"validation/dice": dice}
        if len(self.classes) > 1:
            scalars |= {f"validation/dice_{one.name}": of for one, of in zip(self.classes, of_classes, strict=True)}
        journal.scalars(self.iteration, scalars)
        journal.say(f"iteration {self.iteration}: validation Dice {self._in_percent(of_classes, 2)}")
        if dice > self.best_val:
            self.best_val = dice
            self.save(runs.BEST_VAL)

    # --- checkpoints

    def save(self, name: str) -> None:
        """Write everything that a resumed run needs, whole or not at all; never weights that are not finite.

        Rank 0 alone writes, for all.
        """
        if not self.ranks.leads:
            return
        self.check_losses()
        networks = self.method.state_dict()
        bad = [key for key, value in networks.items() if value.is_floating_point() and not value.isfinite().all()]
        if bad:
            raise InputError(f"{bad[0]} is not finite after iteration {self.iteration}; {self._way_back()}")
        runs.save_checkpoint(
            self.folder / name,
            {
                "networks": networks,
                "optimizers": [turn.optimizer.state_dict() for turn in self.turns],
                "scalers": {name: scaler.state_dict() for name, scaler in self.scalers.items()},
                "skipped": self.skipped,
                "iteration": self.iteration,
                "seconds": self.seconds,
                "peak_memory_gib": max(self.peak_memory, peak_memory_gib(self.device)),
                "machine": machine(self.device),
                "commit": runs.commit(),
                "world_size": self.ranks.size,
                "best_val": self.best_val,
                "options": vars(self.options),
                "cases": dataclasses.asdict(self.split),
                "preprocessing": self.preprocessing,
                "classes": classes_as_record(self.classes),
                "typical_scan": self.typical_scan,
                "rng": runs.rng_state(self.device),
            },
        )

    def load(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint of this method."""
        load_networks(self.method, state, self.folder / runs.LAST)
        for turn, saved in zip(self.turns, state["optimizers"], strict=True):
            turn.optimizer.load_state_dict(saved)
        for name, saved in state.get("scalers", {}).items():
            if saved:  # empty unless the run was in fp16
                self.scalers[name].load_state_dict(saved)
        self.skipped = state.get("skipped", 0)
        self.iteration, self.seconds, self.best_val = state["iteration"], state["seconds"], state["best_val"]
        self.peak_memory = state.get("peak_memory_gib", 0.0)
        runs.restore_rng(state["rng"], self.device)


def _gradient_norms(terms: Terms, turn: Turn, scale: float) -> dict[str, float]:
    """Norm of the gradient of each term by itself, over all that the turn trains; one backward pass per term.

    A term that reaches nothing, such as one that has not set in yet, has 0. Terms are multiplied by `scale` meanwhile,
    for fp16 rounds small gradients to 0.
    """
    own, norms = turn.parameters(), {}
    for name, term in terms.items():
        reached = term.requires_grad
        grads = torch.autograd.grad(scale * term.float(), own, retain_graph=True, allow_unused=True) if reached else ()
        squares = sum(float((g.float() / scale).square().sum()) for g in grads if g is not None)
        norms[f"gradient/{name}"] = math.sqrt(squares)
    return norms


def _losses(values: dict[str, float]) -> str:
    """The total loss and its terms, as they are minimised."""
    terms = {name.removeprefix(LOSS): value for name, value in values.items() if name.startswith(LOSS)}
    return f"loss {sum(terms.values()):.3f} ({', '.join(f'{name} {value:.3g}' for name, value in terms.items())})"


def _dice(prob: Tensor, label: Tensor, exclusive: bool) -> list[float]:
    """Dice of each class, over all crops, of their label maps and soft labels at 0.5; 1 where both are empty.

    Args: prob and label, (L, C, W, H, D); exclusive, as of `label_map`.
    """
    classes = label.shape[1]
    ours = np.stack([one_hot(label_map(crop, exclusive), classes) for crop in prob.float().cpu().numpy()], axis=1)
    theirs = (label > 0.5).transpose(0, 1).cpu().numpy()  # (C, L, W, H, D)
    return [overlap(*masks)["dice"] for masks in zip(ours, theirs, strict=True)]


def _array(tensor: Tensor) -> np.ndarray:
    """The channels of the first crop, (C, W, H, D)."""
    return tensor[0].float().cpu().numpy()
