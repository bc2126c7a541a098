"""The closing table and the learning curve of a run; one HTML page on several.

    uv run report.py runs/grpo__arithmetic__tiny_policy__1__20260131-120000-000

prints the table, writes curve.png into the run folder and names both. The scripts call it as a program when a run ends;
it works as well on a run that still goes on or was killed. The picture is drawn from metrics.jsonl, the table also from
the evaluations in completions.jsonl, if they are there.

    uv run report.py runs/A runs/B             # several runs
    uv run report.py runs/overfit              # a sweep of run_overfit_experiments.py: the runs in it
    uv run report.py runs -o page.html         # with -o also one run, or every run in a folder

writes report.html, self-contained, below 5 MB: curves of all runs, with the seeds of one configuration as mean and
band, what differs between settings, before and after, completions to browse, environment. report.html.jinja beside this
file is its template.

Exit codes: 0 done, 1 the picture could not be written, 2 bad input.
"""

import argparse
import ast
import base64
import contextlib
import hashlib
import io
import json
import math
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rewards import wilson_interval

# ----------------------------------------------------------------------------------------------------------------------
# Reading a run folder

Row = dict[str, Any]
# Accuracy's keys and of which problems they are. A run has one of the two or both, and then the first is its target.
ACCURACY = {"eval/train_subset_accuracy": "training", "eval/accuracy": "held-out"}


@dataclass(frozen=True)
class Run:
    """What a run folder holds."""

    folder: Path
    name: str  # what was trained, for titles
    metrics: list[Row]  # one a step
    completions: list[Row]  # empty without completions.jsonl
    accuracies: list[str]  # those keys of ACCURACY that the metrics hold, in its order: with both, the target first
    target: float | None  # accuracy at which the run stops, if it has one
    config: Row = field(default_factory=dict)  # empty without config.json
    environment: Row = field(default_factory=dict)  # empty without environment.json
    experiment: str = ""  # its name in a sweep

    def series(self, *keys: str) -> list[list[Any]]:
        """[steps, values, ...] of metrics, from the steps that have all of them, as finite numbers."""
        rows = [row for row in self.metrics if all(is_number(row.get(key)) for key in keys)]
        return [[row[key] for row in rows] for key in ("step", *keys)]

    def evaluated(self, accuracy: str, metrics: Row) -> list[Row]:
        """The completions from which an accuracy in a step's metrics was computed, two a problem."""
        split, step = accuracy.removesuffix("accuracy").rstrip("/_"), metrics["step"]
        rows = [row for row in self.completions if row["step"] == step and row.get("split") == split]
        return [row for row in rows if all(is_number(row.get(key)) for key in ("right", "parsed", "reward"))]


def is_number(value: Any) -> bool:
    """Whether it is a finite number, and one that can be drawn; True and False are 1 and 0."""
    return isinstance(value, int | float) and abs(value) < 1e30


def fail(exit_code: int, message: str) -> NoReturn:
    """Ends the program with one line on stderr that names the cause and the cure."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(exit_code)


def read_jsonl(path: Path) -> list[Row]:
    """The rows of a file with one JSON object a line; a broken last line, as a killed run leaves it, is ignored."""
    rows: list[Row] = []
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if line.strip()]
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                fail(2, f"{path}: line {number} is not JSON: remove the line, or give another run folder")
    return rows


def read_json(path: Path) -> Row:
    """The object in a JSON file, empty if there is no such file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else {}
    except ValueError:
        content = None
    return content if isinstance(content, dict) else fail(2, f"{path} is no JSON object: remove or mend it")


def load(folder: Path, experiment: str = "") -> Run:
    """Reads a run folder; exits with code 2 if it is not one."""
    metrics, completions = folder / "metrics.jsonl", folder / "completions.jsonl"
    if not folder.is_dir():
        fail(2, f"there is no folder {folder}: give the folder that a run printed, such as one of those in runs/")
    if not metrics.is_file():
        fail(2, f"{folder} has no metrics.jsonl: give the folder of one run, not the folder above it")
    files = [read_jsonl(path) if path.is_file() else [] for path in (metrics, completions)]
    rows, samples = ([r for r in file if isinstance(r, dict) and isinstance(r.get("step"), int)] for file in files)
    if not rows:
        fail(2, f"{metrics} holds no line: the run has not got past its first evaluation; wait, or give another run")
    config = read_json(folder / "config.json")
    task, model, seed = (config.get(key, "?") for key in ("task", "model", "seed"))
    name = f"{task}, {Path(str(model)).name}, seed {seed}" if config else folder.resolve().name
    accuracies = [key for key in ACCURACY if any(key in row for row in rows)] or ["eval/accuracy"]
    target = config.get("target_accuracy")
    target = target if is_number(target) else None
    environment = read_json(folder / "environment.json")
    return Run(folder, name, rows, samples, accuracies, target, config, environment, experiment)


def find_runs(folder: Path) -> list[tuple[Path, str]]:
    """A run folder itself, or those one or two levels below it that hold metrics, each with its experiment's name.

    In an experiment's folder the run that its result.json names stands for those that went before.
    """
    if (folder / "metrics.jsonl").is_file() or not folder.is_dir():
        return [(folder, "")]
    found = [path.parent for path in (*folder.glob("*/metrics.jsonl"), *folder.glob("*/*/metrics.jsonl"))]
    runs = []
    for run in (
        run
        for run in sorted(found, key=lambda run: run.name.rsplit("__", 1)[-1])  # the oldest first
        if b"\n" in (run / "metrics.jsonl").read_bytes()
    ):
        counts = read_json(run.parent / "result.json").get("run_folder")
        if counts in (None, run.name):
            runs.append((run, run.parent.name if run.parent != folder or counts else ""))
    return runs or [(folder, "")]


# ----------------------------------------------------------------------------------------------------------------------
# The table


def normal_interval(values: list[float]) -> tuple[float, float]:
    """95 % interval of a mean: mean +- 1.96 standard errors."""
    half = 1.96 * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values) - half, statistics.fmean(values) + half


def cell(value: Any, low: Any = None, high: Any = None) -> str:
    """A value with its interval, if it has one: 0.641 [0.598, 0.681]."""
    if not is_number(value):
        return "-"
    return f"{value:.3f} [{low:.3f}, {high:.3f}]" if is_number(low) and is_number(high) else f"{value:.3f}"


def quote(text: Any) -> str:
    """A text on one line: control characters escaped, the middle of a long one left out."""
    text = str(text)
    return repr(text if len(text) <= 200 else f"{text[:80]} ... {text[-115:]}")


def evaluation(run: Run, accuracy: str, metrics: Row) -> list[str]:
    """The cells of one accuracy at one step: from the rows of its problems or, without these, from the metrics."""
    rows = run.evaluated(accuracy, metrics)
    greedy, sampled = ([row for row in rows if row.get("mode") == mode] for mode in ("greedy", "sampled"))
    cells = []
    for key, part, column in (
        (accuracy, greedy, "right"),
        (f"{accuracy}_sampled", sampled, "right"),
        ("eval/parsed_ratio", sampled, "parsed"),
        ("eval/reward", sampled, "reward"),
    ):
        values = [float(row[column]) for row in part]
        if not values and column != "right" and accuracy != run.accuracies[0]:
            cells.append("-")  # of these two the metrics hold the first accuracy's alone
        elif not values:
            cells.append(cell(metrics.get(key), metrics.get(f"{key}_low"), metrics.get(f"{key}_high")))
        elif column == "reward":
            cells.append(cell(statistics.fmean(values), *normal_interval(values)))
        else:
            cells.append(cell(statistics.fmean(values), *wilson_interval(sum(values), len(values))))
    return cells


def block(run: Run, accuracy: str, ends: list[Row]) -> list[tuple[str, ...]]:
    """The table's rows for one accuracy, the header first; `ends` are the metrics before and, if there, after."""
    kind = ACCURACY[accuracy]
    header = f"{len(run.evaluated(accuracy, ends[0])) // 2 or ''} {kind} problems".strip()
    header += " (none held out)" if run.accuracies == ["eval/train_subset_accuracy"] else ""
    prefix = "" if run.accuracies == ["eval/accuracy"] else f"{kind} "
    columns = [[header, f"{prefix}accuracy, greedy", f"{prefix}accuracy, sampled", "answers parsed", "reward"]]
    for when, metrics in zip(("before", "after"), ends, strict=False):
        columns.append([f"{when} (step {metrics['step']})", *evaluation(run, accuracy, metrics)])
    return list(zip(*columns, strict=True))


def pairs(run: Run, accuracy: str, ends: list[Row]) -> list[tuple[Row, Row]]:
    """The greedy rows of each problem, (before, after); none without an evaluation after training."""
    greedy = [[row for row in run.evaluated(accuracy, end) if row.get("mode") == "greedy"] for end in ends]
    both = list(zip(greedy[0], greedy[1], strict=False)) if len(ends) == 2 else []
    return [(before, after) for before, after in both if before.get("question") == after.get("question")]


def ends_of(run: Run) -> list[Row]:
    """The metrics of the first and of the last evaluation, one if these are the same, none without any."""
    evaluated = [row for row in run.metrics if is_number(row.get(run.accuracies[0]))]
    return evaluated[:1] + evaluated[1:][-1:]


def table(run: Run) -> str:
    """The closing table: before and after, problems gained and lost, test accuracy, samples, seconds."""
    lines = [f"{run.name}: {run.metrics[-1]['step']} steps"]
    if ends := ends_of(run):
        rows = [row for accuracy in run.accuracies for row in block(run, accuracy, ends)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines += ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        lines += ["[low, high]: 95 % interval"]
    for accuracy in run.accuracies:
        if changes := [after["right"] - before["right"] for before, after in pairs(run, accuracy, ends)]:
            kind = f"{ACCURACY[accuracy]} " if len(run.accuracies) > 1 else ""
            lines += [f"greedy: {changes.count(1)} {kind}problems gained, {changes.count(-1)} lost"]
    for row in run.metrics:
        if "test/accuracy" in row:
            interval = (row.get("test/accuracy_low"), row.get("test/accuracy_high"))
            lines += [f"test accuracy, greedy (step {row['step']}): {cell(row['test/accuracy'], *interval)}"]
    # One problem gained, one lost, one neither, as far as there are.
    first = pairs(run, run.accuracies[0], ends)
    kinds = [[pair for pair in first if pair[1]["right"] - pair[0]["right"] == change] for change in (1, -1, 0)]
    for before, after in ([kind[0] for kind in kinds if kind] + [pair for kind in kinds for pair in kind[1:]])[:3]:
        lines += ["", f"{quote(before.get('question'))}, answer {quote(before.get('answer'))}"]
        for when, row in (("before", before), ("after", after)):
            lines += [f"  {when:6}  {'right' if row['right'] else 'wrong'}  {quote(row.get('completion'))}"]
    seconds = {label: sum(run.series(f"time/{label}_s")[1]) for label in ("rollout", "reward", "update")}
    lines += ["", "seconds: " + ", ".join(f"{label} {value:.1f}" for label, value in seconds.items())]
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------------------
# The picture, from the metrics alone. Colours: Okabe and Ito's, told apart with any colour vision.

BLUE, ORANGE, VERMILLION, GREY = "#0072B2", "#E69F00", "#D55E00", "#666666"
STYLE: Any = {"font.size": 12, "axes.titlesize": 13, "axes.titlelocation": "left", "text.parse_math": False}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "legend.fontsize": 11}
STYLE |= {"axes.grid": True, "axes.axisbelow": True, "grid.color": "#E5E5E5"}


def smooth(values: list[float]) -> list[float]:
    """Centred running mean over a twentieth of the values."""
    reach = len(values) // 40
    return [statistics.fmean(values[max(0, i - reach) : i + reach + 1]) for i in range(len(values))]


def draw_line(axes: Axes, run: Run, key: str, color: str, label: str = "", noisy: bool = False, **style: Any) -> None:
    """A metric against the step, if the run has it; one that is noisy lightly, with its running mean over it."""
    steps, values = run.series(key)
    if noisy and steps:
        axes.plot(steps, values, color=color, alpha=0.3, linewidth=1)
    if steps:
        style = {"linewidth": 2, "clip_on": False, "marker": "o" if len(steps) == 1 else None, **style}
        axes.plot(steps, smooth(values) if noisy else values, color=color, label=label, **style)


def draw_accuracy(axes: Axes, run: Run) -> None:
    """Greedy with its interval, sampled, the share of answers that parse, and the target if there is one.

    With two accuracies a colour for each: greedy of both, sampled of the first.
    """
    first, both = run.accuracies[0], len(run.accuracies) > 1
    alone = "Held-out accuracy" if first == "eval/accuracy" else "Training accuracy (no problems held out)"
    axes.set_title("Accuracy on the training subset and on held-out problems" if both else alone)
    kinds = {key: f"{ACCURACY[key]}, " if both else "" for key in run.accuracies}
    for (key, kind), color in zip(kinds.items(), (BLUE, VERMILLION), strict=False):
        steps, low, high = run.series(f"{key}_low", f"{key}_high")
        axes.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)
        draw_line(axes, run, key, color, f"{kind}greedy, 95 % interval", marker="o", markersize=4, zorder=3)
    if both:
        draw_line(axes, run, f"{first}_sampled", BLUE, f"{kinds[first]}sampled", linewidth=1.5, linestyle=":")
    else:
        draw_line(axes, run, f"{first}_sampled", ORANGE, "sampled", marker="s", markersize=4)
        draw_line(axes, run, "eval/parsed_ratio", GREY, "answers parsed", linewidth=1, linestyle="--")
    if run.target is not None:
        axes.axhline(run.target, color="black", linewidth=1, linestyle=(0, (6, 3)), label=f"target {run.target:g}")
    axes.set_ylim(0, 1.02)
    if both:  # there may be a line wherever it stands: small, and on a ground that lets both be read
        axes.legend(loc="best", frameon=True, framealpha=0.6, edgecolor="none", labelspacing=0.2, handlelength=1.5)
    else:
        axes.legend(loc="lower right")


def draw_length(axes: Axes, run: Run) -> None:
    """Mean completion length (left axis) and the share that was cut off (right axis)."""
    axes.set_title("Completion tokens", color=BLUE)
    draw_line(axes, run, "completions/mean_length", BLUE, noisy=True)
    axes.set_ylim(bottom=0)
    right = axes.twinx()
    right.set_title("share cut off", loc="right", color=VERMILLION)
    draw_line(right, run, "completions/clipped_ratio", VERMILLION, linewidth=1)
    right.set_ylim(0, 1.02)
    right.grid(visible=False)
    right.tick_params(axis="y", colors=VERMILLION, length=0)


def draw_groups(axes: Axes, run: Run) -> None:
    """Share of groups whose rewards are all equal, right or wrong, and of those in between, which teach."""
    steps, all_right, all_wrong = run.series("train/frac_all_right", "train/frac_all_wrong")
    signal = [1 - right - wrong for right, wrong in zip(all_right, all_wrong, strict=True)]
    axes.stackplot(steps, *map(smooth, (all_right, signal, all_wrong)), colors=(BLUE, "#DDDDDD", VERMILLION))
    axes.set_title("All right", loc="left", color=BLUE)
    axes.set_title("with signal", loc="center", color=GREY)
    axes.set_title("all wrong", loc="right", color=VERMILLION)
    axes.set_ylabel("share of groups")
    axes.set_ylim(0, 1)


def draw_reward(axes: Axes, run: Run) -> None:
    """Mean reward of the training completions."""
    axes.set_title("Training reward and its running mean")
    draw_line(axes, run, "train/reward", BLUE, noisy=True)


def draw_entropy(axes: Axes, run: Run) -> None:
    """Entropy of the sampling distribution."""
    axes.set_title("Entropy, nats a token")
    draw_line(axes, run, "train/entropy", BLUE, noisy=True)
    axes.set_ylim(bottom=0)


def draw(run: Run) -> Figure:
    """The learning curve: accuracy and reward above, what explains them below."""
    panels: dict[str, tuple[str, Callable[[Axes, Run], None]]] = {  # each drawn if the metrics hold its key
        "A": (run.accuracies[0], draw_accuracy),
        "R": ("train/reward", draw_reward),
        "L": ("completions/mean_length", draw_length),
        "G": ("train/frac_all_right", draw_groups),
        "E": ("train/entropy", draw_entropy),
    }
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12, 7), dpi=100, layout="constrained")
        figure.suptitle(run.name, fontsize=15)
        for letter, axes in figure.subplot_mosaic("AAARRR;LLGGEE", height_ratios=(5, 4)).items():
            key, draw_panel = panels[letter]
            if not run.series(key)[0]:
                axes.remove()
                continue
            draw_panel(axes, run)
            axes.set_xlabel("step")
            axes.set_xlim(0, max(run.metrics[-1]["step"], 1))
            axes.xaxis.set_major_locator(MaxNLocator(nbins="auto", steps=[1, 2, 5, 10], integer=True))
    return figure


# ----------------------------------------------------------------------------------------------------------------------
# The page. Charts are SVG whose colours are names, which the page's style fills in for light and for dark.

MAX_BYTES = 4_900_000  # of the page
MAX_TEXT = 10_000  # characters of a completion
FREE = {"seed", "run_dir", "resume", "track", "log_completions", "save_every"}  # change no curve
CHARTS = {
    "train/reward": "Training reward", "completions/mean_length": "Completion length, tokens",
    "train/entropy": "Entropy, nats a token",
    "train/frac_reward_zero_std": "Share of groups with equal rewards (zero std)",
    "train/logprob_gap_mean": "Log-prob gap of sampler and trainer, mean",
    "train/logprob_gap_max": "Log-prob gap of sampler and trainer, largest",
    "time/rollout_s": "Rollout, seconds a step", "time/update_s": "Update, seconds a step",
    "time/reward_s": "Reward, seconds a step", "completions/clipped_ratio": "Share of completions cut off",
    "completions/parsed_ratio": "Share of answers parsed", "train/grad_norm": "Gradient norm",
    "train/kl": "KL to the starting policy", "train/clip_ratio": "Share of ratios clipped",
    "perf/completion_tokens_per_s": "Completion tokens a second", "perf/peak_memory_gb": "Peak memory, GB",
    "perf/mfu": "MFU of the update",
}  # fmt: skip
INK, GRID, SERIES = "#0000c0", "#0000c1", [f"#0000b{i}" for i in range(7)]  # stand for the page's colours


@dataclass(frozen=True)
class Group:
    """Runs of one configuration, which differ in their seed: one line in every chart."""

    index: int
    label: str
    runs: list[Run]

    @property
    def look(self) -> dict[str, Any]:
        return {"color": SERIES[self.index % 7], "linestyle": ("-", "--", ":", "-.")[self.index // 7 % 4]}

    def means(self) -> list[tuple[str, list[str]]]:
        """(kind, [before, after]) of each greedy accuracy: the mean over several runs, with the least and the most."""
        ends = [(run, ends_of(run)) for run in self.runs]
        rows = []
        for key in (key for key in ACCURACY if all(key in run.accuracies and len(two) == 2 for run, two in ends)):
            both = [[two[i][key] for _, two in ends if is_number(two[i].get(key))] for i in (0, 1)]
            rows += [(ACCURACY[key], [cell(statistics.fmean(v), min(v), max(v)) for v in both])] if all(both) else []
        return rows


def compare(columns: list[Row]) -> tuple[dict[str, list[str]], dict[str, str]]:
    """(what differs: a value for each column, what is the same in all), "-" where a column lacks the key."""
    keys = list(dict.fromkeys(key for column in columns for key in column))
    texts = {key: [str(column[key]) if key in column else "-" for column in columns] for key in keys}
    differing = {key: values for key, values in texts.items() if len(set(values)) > 1}
    return differing, {key: values[0] for key, values in texts.items() if key not in differing}


def settings(run: Run) -> Row:
    """What makes a run's configuration: its script's code, as a digest, and the settings that are not FREE."""
    script = run.folder / (run.folder.resolve().name.split("__")[0] + ".py")
    code = script.read_text(encoding="utf-8", errors="replace") if script.is_file() else ""
    with contextlib.suppress(SyntaxError, ValueError):
        code = ast.dump(ast.parse(code)) if code else ""  # without comments and line breaks
    digest = f" {hashlib.sha256(code.encode()).hexdigest()[:8]}" if code else ""
    config = {key: value for key, value in run.config.items() if key not in FREE}
    return {"script": script.name + digest, **(config or {"run": str(run.folder)})}


def group_runs(runs: list[Run]) -> list[Group]:
    """Runs of one configuration together, labelled by their experiment or by what sets them apart."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(json.dumps([run.experiment, settings(run)], sort_keys=True), []).append(run)
    plain = [settings(members[0]) for members in groups.values() if not members[0].experiment]
    apart = compare(plain)[0]
    labels: list[str] = []
    for run, *others in groups.values():
        own = {key: value for key, value in settings(run).items() if key in apart}
        parts = [f"{value}" if key in ("script", "task", "model") else f"{key} {value}" for key, value in own.items()]
        alone = re.sub(", seed [^,]*$", "", run.name) if others else run.name
        name = run.experiment or ", ".join(parts[:4] + ["..."] * (len(parts) > 4)) or alone
        labels.append(name if name not in labels else f"{name} ({run.folder.name})")
    return [Group(i, label, members) for i, (label, members) in enumerate(zip(labels, groups.values(), strict=True))]


def draw_group(axes: Axes, group: Group, key: str, count: int) -> None:
    """A metric of one run with its interval if it has one, or the mean of several with their least and most.

    The mean is over the steps that all of them have; what one has after these is drawn thin. A training metric is a
    running mean; behind it, where there are few groups, a single run's own values. `count`, of the groups, sets how
    fine lines are; those drawn first are thicker, so that equal ones can all be seen.
    """
    training, look, id, points = "eval/" not in key, group.look, f"s{group.index}", max(40, min(200, 3000 // count))
    series = [run.series(key) for run in group.runs]
    curves = [dict(zip(steps, smooth(y) if training else y, strict=True)) for steps, y in series if steps]
    if not curves:
        return
    shared = sorted(set.intersection(*map(set, curves)))
    shared = sorted({*shared[:: -(-len(shared) // points) or 1], *shared[-1:]})
    marker = "o" if (len(shared) <= 30 and not training) or len(shared) == 1 else None
    mean = [statistics.fmean(curve[step] for curve in curves) for step in shared]
    width = 1.4 + 0.5 * max(0, min(count, 5) - 1 - group.index)
    axes.plot(
        shared, mean, **look, linewidth=width, marker=marker, markersize=width + 2, gid=id, clip_on=False, zorder=3
    )
    band = [shared, *([pick(curve[step] for curve in curves) for step in shared] for pick in (min, max))]
    if len(group.runs) == 1:
        band = group.runs[0].series(f"{key}_low", f"{key}_high")
    steps, low, high = band
    if low != high:
        axes.fill_between(steps, low, high, color=look["color"], alpha=0.18 if count <= 2 else 0.1, linewidth=0, gid=id)
    for curve in curves:
        rest = [step for step in curve if not shared or step >= shared[-1]]
        if len(rest) > 1 or not shared:
            axes.plot(rest, [curve[step] for step in rest], **look, linewidth=0.7, gid=id)
    if training and len(group.runs) == 1 and count <= 3:
        steps, values = (column[:: -(-len(series[0][0]) // (3 * points))] for column in series[0])
        axes.plot(steps, values, color=look["color"], alpha=0.35, linewidth=0.6, gid=id)
    if key in ACCURACY and len(group.runs) == 1 and count <= 4:
        axes.plot(*group.runs[0].series(f"{key}_sampled"), color=look["color"], linewidth=1, linestyle=":", gid=id)


def draw_svg(groups: list[Group], key: str, large: bool) -> str:
    """One chart of a metric, all groups overlaid, as SVG to stand in HTML."""
    runs = [run for group in groups for run in group.runs]
    style: Any = {"svg.fonttype": "none", "svg.hashsalt": key, "font.size": 9, "axes.formatter.useoffset": False}
    style |= {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True}
    style |= {"text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "grid.color": GRID}
    style |= {"axes.edgecolor": GRID, "xtick.major.size": 0, "ytick.major.size": 0, "grid.linewidth": 0.6}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(6.6, 3.1) if large else (4.2, 2.2), layout="constrained")
        axes = figure.subplots()
        for group in groups:
            draw_group(axes, group, key, len(groups))
        values = [value for run in runs for value in run.series(key)[1]]
        if key in ACCURACY:
            axes.set_ylim(0, 1.02)
            for target in {run.target for run in runs if run.target is not None}:
                axes.axhline(target, color=INK, linewidth=0.8, linestyle=(0, (6, 3)), alpha=0.6)
        elif min(values) > 0 and max(values) > 100 * min(values):
            axes.set_yscale("log")
        elif min(values) >= 0:
            axes.set_ylim(bottom=0)
        axes.set_xlim(0, max(run.metrics[-1]["step"] for run in runs) or 1)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10], integer=True))
        file, nothing = io.StringIO(), dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    svg = file.getvalue()
    # Inside HTML it needs no names of XML; ids of lines become classes, to be hidden by, other groups' ids go.
    svg = re.sub(r'<svg [^>]*(viewBox="[^"]*")[^>]*>', r'<svg \1 role="img">', svg[svg.index("<svg") :], count=1)
    svg = re.sub(r'<g id="(?:(s\d+)|[^"]*)">', lambda found: f'<g class="{found[1]}">' if found[1] else "<g>", svg)
    svg = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\.\d\d)\d+", r"\1", tag[0]).replace(" \nL ", "L"), svg)
    svg = re.sub(r"#0000b(\d)", r"var(--s\1)", svg)
    return svg.replace(INK, "currentColor").replace(GRID, "var(--grid)")


def summary(group: Group, run: Run) -> Row:
    """What the page's tables say of a run."""
    rows, ends = [], ends_of(run)
    for accuracy in run.accuracies if ends else []:
        after: list[str] = [*evaluation(run, accuracy, ends[-1])] if len(ends) > 1 else ["-"] * 4
        changed = [(a["right"] - b["right"], b, a) for b, a in pairs(run, accuracy, ends)]
        gained, lost = ([(b, a) for change, b, a in changed if change == sign] for sign in (1, -1))
        ran = " to ".join(str(end["step"]) for end in ends)
        cells = [cell for both in zip(evaluation(run, accuracy, ends[0]), after, strict=True) for cell in both]
        rows += [{"kind": ACCURACY[accuracy], "steps": ran, "cells": cells, "paired": len(changed), "gained": gained,
                  "lost": lost}]  # fmt: skip
    tests = [row for row in run.metrics if is_number(row.get("test/accuracy"))]
    test = [cell(*(row.get(f"test/accuracy{end}") for end in ("", "_low", "_high"))) for row in tests[-1:]]
    seconds = sum(sum(run.series(f"time/{phase}_s")[1]) for phase in ("rollout", "reward", "update"))
    planned = run.config.get("num_steps") if not run.config.get("num_epochs") else None
    return {"group": group, "folder": run.folder, "seed": run.config.get("seed", "-"), "step": run.metrics[-1]["step"],
            "planned": planned, "seconds": seconds, "test": test, "accuracy": rows}  # fmt: skip


def compact(value: Any) -> Any:
    """A value for the browser: numbers short, what JSON has no number for as text, text not without end."""
    if value is None or isinstance(value, bool) or is_number(value):
        return round(value, 4) if isinstance(value, float) else value
    text = str(value)
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]} ... ({len(text) - MAX_TEXT} more characters)"


def to_json(value: Any) -> str:
    """As JSON that may stand inside <script>; a lone surrogate, not in UTF-8, is \\udXXX again once it is encoded."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return re.sub("[<>&]", lambda found: f"\\u{ord(found[0]):04x}", text)


def embed(runs: list[Run], names: list[str], budget: int) -> tuple[str, int]:
    """Completions as JSON for the page's script, and how many there were in all.

    If they are more than `budget` bytes those are taken that come first in their evaluation or step, evenly over the
    steps: the last, the middle, the quarters, and so on.
    """
    rewards = sorted({key for run in runs for row in run.completions for key in row if key.startswith("rewards/")})
    columns = ("question", "completion", "answer", "reward", "advantage", "length", *rewards)
    ranked: list[tuple[tuple[int, int], int, str]] = []  # (importance, order, JSON)
    for index, run in enumerate(runs):
        steps = sorted({row["step"] for row in run.completions}, reverse=True)
        place = {step: int(f"{i:032b}"[::-1], 2) for i, step in enumerate(steps)}  # van der Corput's order
        ranks: dict[Any, int] = {}
        for row in run.completions:
            kind = f"{row.get('split', '')} {row.get('mode', '')}".strip()
            rank = ranks[row["step"], kind] = ranks.get((row["step"], kind), -1) + 1
            right = bool(row["right"]) if is_number(row.get("right")) else None
            text = to_json([index, row["step"], kind, right, *(compact(row.get(column)) for column in columns)])
            ranked.append(((rank, place[row["step"]]), len(ranked), text))
    head = to_json({"runs": names, "rewards": [name.removeprefix("rewards/") for name in rewards]})
    budget -= len(head.encode("utf-8", "backslashreplace")) + 100
    taken: list[tuple[int, str]] = []
    for _, order, text in sorted(ranked):
        budget -= len(text.encode("utf-8", "backslashreplace")) + 1
        if budget < 0:
            break
        taken.append((order, text))
    return f'{head[:-1]},"rows":[{",".join(text for _, text in sorted(taken))}]}}', len(ranked)


def page(runs: list[Run]) -> str:
    """The HTML page on these runs."""
    groups = group_runs(runs)
    runs = [run for group in groups for run in group.runs]
    keys = {key for run in runs for row in run.metrics for key in row}
    rewards = sorted(key for key in keys if key.startswith("rewards/"))
    titles = {key: f"Accuracy on {kind} problems" for key, kind in ACCURACY.items()} | CHARTS
    titles |= {key: f"Reward: {key.split('/')[1]}, mean" for key in rewards if len(rewards) > 1}
    drawn = [key for key in titles if any(run.series(key)[0] for run in runs)]
    large = [key for key in drawn if key in ACCURACY]  # one alone has the reward beside it
    large += ["train/reward"] if len(large) < 2 and "train/reward" in drawn else []
    names = []  # as short as tells runs apart
    for group in groups:
        seeds = [f"seed {run.config.get('seed', '-')}" for run in group.runs]
        names += [group.label] if len(seeds) == 1 else [f"{group.label}, {seed}" for seed in seeds]
        names = seeds if len(groups) == 1 else names
    names = [
        f"{name} ({run.folder.name})" if names.count(name) > 1 else name for name, run in zip(names, runs, strict=True)
    ]
    environments, packages = [dict(run.environment) for run in runs], []
    for environment in environments:
        command, installed = environment.get("command"), environment.pop("packages", {})
        environment |= {"command": shlex.join(map(str, command))} if isinstance(command, list) else {}
        packages.append(installed if isinstance(installed, dict) else {"packages": installed})
    source = Path(__file__).resolve().with_name("report.html.jinja").read_text(encoding="utf-8")
    script = source[source.index("<script>") + 8 : source.rindex("</script>")]
    jinja = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    jinja.filters["cut"] = lambda value: re.sub(r"(?s)^(.{300}).*(.{290})$", r"\1 ... \2", str(value))
    template = jinja.from_string(source)
    context: Row = {
        "title": "; ".join(sorted({re.sub(", seed [^,]*$", "", run.name) for run in runs})),
        "groups": groups, "runs": runs, "names": names, "large": large,
        "charts": [(key, titles[key], draw_svg(groups, key, key in large)) for key in drawn],
        "rows": [summary(group, run) for group in groups for run in group.runs],
        "settings": compare([settings(group.runs[0]) for group in groups]),
        "environment": compare(environments), "packages": compare(packages),
        "now": time.strftime("%Y-%m-%d %H:%M"), "listed": max(2, 120 // len(runs)),  # problems gained or lost
        "digest": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    }  # fmt: skip
    empty = template.render(context, total=0, data="")
    data, total = embed(runs, names, MAX_BYTES - len(empty.encode("utf-8", "backslashreplace")))
    return template.render(context, total=total, data=data)


def main(arguments: list[str] | None = None) -> None:
    """Prints the table of a run and writes curve.png into its folder; or writes the page on several."""
    parser = argparse.ArgumentParser(
        description="One run folder: prints its closing table and writes curve.png into it. Several, a sweep's folder, "
        "or -o: writes one self-contained HTML page that compares them."
    )
    parser.add_argument("run_folder", type=Path, nargs="+", help="a run's own folder; for a page, also one of several")
    parser.add_argument("-o", "--output", type=Path, metavar="report.html", help="where the page is written")
    options = parser.parse_args(arguments)
    folders: list[Path] = options.run_folder
    a_run = (folders[0] / "metrics.jsonl").is_file()
    sweep = len(folders) == 1 and not a_run and any(folders[0].glob("*/*/metrics.jsonl"))
    if options.output or len(folders) > 1 or sweep:
        found = dict(run for folder in folders for run in find_runs(folder))  # a folder given twice counts once
        runs = [load(folder, experiment) for folder, experiment in found.items()]
        output = options.output or Path("report.html")
        try:
            output.write_bytes(page(runs).encode("utf-8", "backslashreplace"))
        except OSError as error:
            fail(2, f"cannot write {output} ({error.strerror}): free space, mend the permissions, or give another -o")
        print(f"{output}: {len(runs)} runs, {output.stat().st_size / 1e6:.2f} MB")
        return
    run = load(folders[0])
    picture = run.folder / "curve.png"
    print(table(run), flush=True)  # first: the numbers are worth more than the picture
    try:
        draw(run).savefig(picture)
    except OSError as error:
        fail(1, f"cannot write {picture} ({error.strerror}): free space, or mend the permissions")
    print(f"\ncurve: {picture}\nrun folder: {run.folder}")
    print(f"page: uv run report.py {shlex.quote(str(run.folder))} -o report.html")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # a terminal without UTF-8
    main()
