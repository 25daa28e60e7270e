"""A training run from its options: everything that can be wrong is found before its folder is touched."""

import contextlib
import dataclasses
import shlex
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from dataloaders import case_files
from dataloaders.classes import in_words, refuse_absent, settle_classes
from dataloaders.patch import require_fit, uneven_notice
from dataloaders.split import Split, cases_of_training, cases_to_test, settle
from dataloaders.store import CaseStore
from engine import Engine, Stopped
from inference.trained import load_networks, reported_output
from methods import METHODS
from methods.base import Method
from options.flags import list_paths
from runtime import runs
from runtime.device import enough_memory, pick_device, refuse_synced_recompute, set_determinism, syncs_batch_norm
from runtime.distributed import ALONE, PeerLost, Ranks
from runtime.journal import Journal, Silence
from scans.preprocess import read_record
from utils import files
from utils.errors import InputError
from utils.files import REPOSITORY, repository_path, shown
from utils.labels import LabelClass, classes_of_record
from utils.words import counted

SIGNAL_EXIT = 128  # exit status of a run that a signal stopped: 128 + its number, as shells count
STEEP = 500  # k from which bf16 leaves little of the gradient of the distance map: docs/methods.md
LESS_MEMORY = "lower --batch_size, --patch_size or --n_filters, or give --amp bf16 or --recompute"


def train(options: Namespace, ranks: Ranks = ALONE) -> int:
    """Train a run from its options, as one of `ranks`, of which rank 0 alone reads and writes the run's folder.

    Returns: the exit status. Whatever can be wrong with flags, lists and scans shows before that folder is touched.
    """
    options, folder, split, classes, preprocessing, state = ranks.from_leader(lambda: _claim(options))
    with ranks.leader_first():
        device = pick_device(options, ranks=ranks)
        refuse_synced_recompute(options, device, ranks)
        runs.seed_everything(options.seed)
        set_determinism(options.deterministic)
        with enough_memory(device, LESS_MEMORY):
            method = METHODS[options.method](options).to(device)  # no room there must show before a run is overwritten
        reported_output(method, options)
        notices = _start_weights(method, options) if state is None else []
        store = CaseStore(options, split.labeled, split.unlabeled, ranks.local_size)
        refuse_absent(store.absent, classes)
        if state is None:
            require_fit(options.patch_size, store.shapes.values())
        if ranks.leads:
            _check_unread(store, split)
            runs.prepare_run(folder, options.overwrite)
    engine = Engine(options, method, split, folder, device, ranks, preprocessing, classes)
    if state is not None:
        engine.load(state)
        notices += _other_size(state, ranks)
    notices += uneven_notice(options.patch_size)
    with _journal(engine, ranks) as journal:
        return _run(engine, store, journal, [*_describe(engine, split), *notices, *store.notices])


def _run(engine: Engine, store: CaseStore, journal: Journal | Silence, notices: Sequence[str]) -> int:
    """Train, and say how it ended; returns the exit status."""
    try:
        for line in notices:
            journal.say(line)
        with enough_memory(engine.device, LESS_MEMORY):
            engine.train(store, journal)
        journal.say(
            f"done: {engine.iteration} iterations in {engine.seconds:.0f} s; next: {_test_command(engine.options)}"
        )
    except Stopped as stop:
        journal.say(f"stopped and saved at iteration {engine.iteration}; continue with --resume")
        return SIGNAL_EXIT + stop.number
    except PeerLost as lost:
        lost.args = (f"{lost}; {_last_saved(engine.folder)}",)
        journal.say(f"stopped: {lost}")
        raise
    except InputError as error:
        with contextlib.suppress(InputError):  # what stopped the run may keep the log from being written, too
            journal.say(f"stopped: {error}")
        raise
    return 0


def _claim(
    options: Namespace,
) -> tuple[Namespace, Path, Split, tuple[LabelClass, ...], dict[str, Any] | None, dict[str, Any] | None]:
    """What the run's folder, the lists and the scans decide.

    Returns: settled options, folder, cases, classes, record of the preprocessing, checkpoint to continue from.
    """
    folder = runs.claim_run(options)
    split = settle(options)
    classes = settle_classes(options, [*split.labeled, *split.validation])
    preprocessing = read_record(repository_path(options.root_path))
    state = _load_state(folder, options, split, classes, preprocessing)
    return options, folder, split, classes, preprocessing, state


@contextlib.contextmanager
def _journal(engine: Engine, ranks: Ranks) -> Iterator[Journal | Silence]:
    """What the leading rank writes beside the options of the run, closed at the end."""
    if not ranks.leads:
        yield Silence()
        return
    files.write_json(engine.folder / runs.OPTIONS, vars(engine.options))
    journal = Journal(engine.folder, engine.iteration)
    try:
        yield journal
    except BaseException:
        with contextlib.suppress(InputError):  # on a full disk, say; the first error is the one to report
            journal.close()
        raise
    journal.close()


def _load_state(
    folder: Path,
    options: Namespace,
    split: Split,
    classes: Sequence[LabelClass],
    preprocessing: dict[str, Any] | None,
) -> dict[str, Any] | None:
    """The checkpoint to continue from; None for a fresh start."""
    if not (options.resume and (folder / runs.LAST).exists()):
        return None
    state = runs.load_checkpoint(folder / runs.LAST)
    cases = dataclasses.asdict(split)
    if state.get("cases", cases) != cases:
        raise InputError(
            f"the lists name other cases than when run {options.exp} was started; "
            "restore them (--root_path, --train_list, --labeled_list) or give another --exp"
        )
    if "classes" in state and (known := classes_of_record(state["classes"])) != classes:
        raise InputError(
            f"the labeled cases in {options.root_path} record {in_words(classes)}, but run {options.exp} was started "
            f"with {in_words(known)}; restore them (--root_path) or give another --exp"
        )
    if state.get("preprocessing") != preprocessing:
        raise InputError(
            f"the scans in {options.root_path} were prepared in another way than when run {options.exp} was started; "
            "restore them (--root_path) or give another --exp"
        )
    return state


def _start_weights(method: Method, options: Namespace) -> list[str]:
    """Weights to start from, where --init_from or --pretrained asks for them; a sentence on each source."""
    if options.init_from and options.pretrained:
        raise InputError("--init_from and --pretrained contradict each other; give one of them")
    if options.init_from:
        path = runs.existing_run(options.model_path, options.init_from) / runs.LAST
        state = runs.load_checkpoint(path)
        _refuse_seen(cases_of_training(state), options)
        load_networks(method, state, path)
        return [f"starts from the weights of run {options.init_from}, iteration {state['iteration']}"]
    if not options.pretrained:
        return []
    whole = repository_path(options.pretrained)  # a name may hold a comma
    names = [options.pretrained] if whole.exists() else options.pretrained.split(",")
    return method.load_pretrained([repository_path(name.strip()) for name in names])


def _refuse_seen(seen: Sequence[str], options: Namespace) -> None:
    """A run that saw test cases is no start for one that is tested on them."""
    path = list_paths(options)[1]
    if path.exists() and (both := sorted(set(seen).intersection(cases_to_test(options)))):
        raise InputError(
            f"--init_from {options.init_from} was trained on {counted(len(both), 'case')} of {path}, {both[0]} "
            "the first; start from another run, or test on other cases with --test_list"
        )


def _check_unread(store: CaseStore, split: Split) -> None:
    """Look for faults in what the store has not decoded: validation cases and, with --cache none, all images."""
    for case in [*split.validation, *([] if store.in_memory else [*split.labeled, *split.unlabeled])]:
        case_files.read_image(store.root, case)
    for case in split.validation:
        case_files.read_label(store.root, case, store.num_classes)


def _other_size(state: dict[str, Any], ranks: Ranks) -> list[str]:
    """A notice if the checkpoint is of another number of processes."""
    saved = state.get("world_size", 1)
    if saved == ranks.size:
        return []
    return [
        f"number of processes: {saved} before, {ranks.size} now; batches differ from here on, so the run "
        "continues, but not exactly as it would have"
    ]


def _last_saved(folder: Path) -> str:
    last = folder / runs.LAST
    return (
        f"continue from {last} with --resume, in any number of processes" if last.exists() else "nothing was saved yet"
    )


def _describe(engine: Engine, split: Split) -> list[str]:
    """The resolved settings of a run, for its log."""
    options, device = engine.options, engine.device
    size = sum(parameter.numel() for parameter in engine.method.parameters() if parameter.requires_grad)
    patch = " x ".join(map(str, options.patch_size))
    threads = f" with {counted(torch.get_num_threads(), 'thread')}" if device.type == "cpu" else ""
    return [
        f"{options.exp}: {options.method}, {len(split.labeled)} labeled and {len(split.unlabeled)} unlabeled cases"
        + (f", {len(split.validation)} for validation" if split.validation else "")
        + (f", {in_words(engine.classes)}" if len(engine.classes) > 1 else "")
        + (f"; resumed at iteration {engine.iteration}" if engine.iteration else ""),
        f"batches of {options.labeled_bs} labeled and {options.batch_size - options.labeled_bs} unlabeled crops of "
        f"{patch}; {size:,} trainable parameters; {device}{threads}, amp {options.amp}",
        *_describe_ranks(engine),
        f"{options.max_iterations} iterations: {'; '.join([_rate_course(options), *engine.method.courses()])}; "
        f"a checkpoint every {_iterations(options.save_every)}",
        *_steep_in_bf16(options),
        f"log: {engine.folder / runs.LOG}; curves: tensorboard --logdir {engine.folder.parent}",
    ]


def _steep_in_bf16(options: Namespace) -> list[str]:
    """A warning where the transform of the distance map magnifies the roundings of bf16 beyond its gradient."""
    k = getattr(options, "sdm_k", 0)
    if options.amp != "bf16" or k < STEEP:
        return []
    return [f"warning: --sdm_k {k:g} drowns the gradient of the distance map in bf16's rounding; --amp off is safe"]


def _describe_ranks(engine: Engine) -> list[str]:
    """What several processes change."""
    options, ranks = engine.options, engine.ranks
    if ranks.size == 1:
        return []
    norm = ""
    if options.norm == "batch":
        synced = syncs_batch_norm(options, engine.device, ranks)
        norm = "; batch norm over all of them" if synced else "; batch norm per process, running statistics of rank 0"
    return [
        f"{ranks.size} processes, each with such a batch: {ranks.size * options.batch_size} crops per iteration, "
        f"rates as given{norm}"
    ]


def _iterations(count: int) -> str:
    return "iteration" if count == 1 else f"{count} iterations"


def _rate_course(options: Namespace) -> str:
    course = {
        "steps": f"times {options.lr_gamma:g} every {_iterations(options.lr_step)}",
        "cosine": "falling to 0 as a cosine",
        "constant": "constant",
    }[options.lr_schedule]
    warm_up = f" after {_iterations(options.warmup)} of warm-up" if options.warmup else ""
    return f"{options.optimizer}, rate {options.base_lr:g} {course}{warm_up}"


def _test_command(options: Namespace) -> str:
    where = "" if options.model_path == "model" else f" --model_path {shown(repository_path(options.model_path))}"
    return f"python {shown(REPOSITORY / 'code' / 'test_LA.py')} --exp {shlex.quote(options.exp)}{where}"
