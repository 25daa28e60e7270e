"""What the scores of a run depend on, in words: data, lists, weights, machines, versions, options."""

from typing import Any

from evaluation.comparison import TestedRun
from evaluation.tables import FILTER_NAMES
from utils.words import counted

OUTPUT_TITLES = {  # of the methods, as a reader knows them
    "seg": "segmentation",
    "sdm": "signed distance map",
    "mean": "mean of both",
    "teacher": "moving average",
}
OF_THE_FACTS = ("root_path", "split", "train_list", "test_list", "weights", "exp", "model_path")  # said in other words


def output_name(head: str) -> str:
    """An output of a method, as a reader knows it."""
    return OUTPUT_TITLES.get(head, head)


def facts(run: TestedRun) -> dict[str, str]:
    """Where the scores of a run come from."""
    content = run.content
    data, commit = content.get("data", {}), content.get("commit", {})
    official = {True: "those of the left atrium challenge", False: "your own", None: ""}[data.get("official")]
    head, post = run.kind
    trained = content.get("trained_on") or {}
    return {
        "run": _text(run.options.get("exp")),
        "data folder": _text(data.get("folder")),
        "training list": _text(data.get("train_list")),
        "test list": _text(data.get("test_list")),
        "lists": official,
        "training cases": ", ".join(f"{len(names)} {group}" for group, names in trained.items() if names),
        "classes": ", ".join(
            f"{one['name']} ({'+'.join(map(str, one['values']))})" for one in content.get("classes", ())
        ),
        "reported output": f"{output_name(head)} (--head {head}), {FILTER_NAMES[post]}",
        "weights": f"{content['reported'].get('weights', 'last')}, iteration {content['iteration']}",
        "training time": _duration(content.get("training_seconds")),
        "training machine": _machine(content.get("training_machine")),
        "peak training memory": _text(content.get("peak_memory_gib"), "{:.1f} GiB"),
        "training code": _text(commit.get("training"), "commit {}"),
        "test time": _duration(content.get("test_seconds")),
        "test machine": _machine(content.get("test_machine")),
        "test code": _text(commit.get("test"), "commit {}"),
        "test date": _text(content.get("date")).replace("T", " "),
        "versions": ", ".join(f"{name} {number}" for name, number in content.get("versions", {}).items()),
    }


def options(run: TestedRun) -> dict[str, str]:
    """The flags of training and test; the lists stand among the facts."""
    shown = {key: value for key, value in run.options.items() if key not in OF_THE_FACTS}
    return {f"--{key}": _text(value) for key, value in sorted(shown.items())}


def _text(value: Any, form: str = "{}") -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "on" if value else "off"
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else form.format(value)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    unit, name = next(((s, name) for s, name in ((3600, "h"), (60, "min")) if seconds >= 2 * s), (1, "s"))
    return f"{seconds / unit:.1f} {name}"


def _machine(machine: dict[str, Any] | None) -> str:
    return "" if not machine else machine["gpu"] or f"{machine['processor']}, {counted(machine['threads'], 'thread')}"
