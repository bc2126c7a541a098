"""The closing table and the learning curve of a run.

    uv run report.py runs/grpo__arithmetic__tiny_policy__1__260131-120000

prints the table and writes curve.png into the run folder. The scripts call it as a program when a run ends; it works
as well on a run that still goes on or was killed. The picture is drawn from metrics.jsonl, the table also from the
evaluations in completions.jsonl, if they are there.

Exit codes: 0 done, 2 bad input, 5 the picture could not be written.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

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

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """(steps, values) of a metric, from the steps that have it."""
        rows = [row for row in self.metrics if key in row]
        return [row["step"] for row in rows], [row[key] for row in rows]

    def evaluated(self, accuracy: str, metrics: Row) -> list[Row]:
        """The completions from which an accuracy in a step's metrics was computed, two a problem."""
        split, step = accuracy.removesuffix("accuracy").rstrip("/_"), metrics["step"]
        return [row for row in self.completions if row["split"] == split and row["step"] == step]


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


def load(folder: Path) -> Run:
    """Reads a run folder; exits with code 2 if it is not one."""
    config, metrics, completions = (folder / name for name in ("config.json", "metrics.jsonl", "completions.jsonl"))
    if not folder.is_dir():
        fail(2, f"there is no folder {folder}: give the folder that a run printed, such as one of those in runs/")
    if not metrics.is_file():
        fail(2, f"{folder} has no metrics.jsonl: give the folder of one run, not the folder above it")
    rows = read_jsonl(metrics)
    if not rows:
        fail(2, f"{metrics} holds no line: the run has not got past its first evaluation; wait, or give another run")
    name, settings = folder.resolve().name, Row()
    if config.is_file():
        settings = json.loads(config.read_text(encoding="utf-8"))
        name = f"{settings['task']}, {Path(settings['model']).name}, seed {settings['seed']}"
    accuracies = [key for key in ACCURACY if any(key in row for row in rows)] or ["eval/accuracy"]
    samples = read_jsonl(completions) if completions.is_file() else []
    return Run(folder, name, rows, samples, accuracies, settings.get("target_accuracy"))


# ----------------------------------------------------------------------------------------------------------------------
# The table


def normal_interval(values: list[float]) -> tuple[float, float]:
    """95 % interval of a mean: mean +- 1.96 standard errors."""
    half = 1.96 * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values) - half, statistics.fmean(values) + half


def cell(value: float, low: float | None = None, high: float | None = None) -> str:
    """A value with its interval, if it has one: 0.641 [0.598, 0.681]."""
    return f"{value:.3f}" if low is None else f"{value:.3f} [{low:.3f}, {high:.3f}]"


def quote(text: str) -> str:
    """A text on one line: control characters escaped, the middle of a long one left out."""
    return repr(text if len(text) <= 200 else f"{text[:80]} ... {text[-115:]}")


def evaluation(run: Run, accuracy: str, metrics: Row) -> list[str]:
    """The cells of one accuracy at one step: from the rows of its problems or, without these, from the metrics."""
    rows = run.evaluated(accuracy, metrics)
    greedy, sampled = ([row for row in rows if row["mode"] == mode] for mode in ("greedy", "sampled"))
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
            cells.append(cell(metrics[key], metrics.get(f"{key}_low"), metrics.get(f"{key}_high")))
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
    greedy = [[row for row in run.evaluated(accuracy, end) if row["mode"] == "greedy"] for end in ends]
    return list(zip(greedy[0], greedy[1], strict=False)) if len(ends) == 2 else []


def table(run: Run) -> str:
    """The closing table: before and after, problems gained and lost, test accuracy, samples, seconds."""
    lines = [f"{run.name}: {run.metrics[-1]['step']} steps"]
    evaluated = [row for row in run.metrics if run.accuracies[0] in row]
    ends = evaluated[:1] + evaluated[1:][-1:]  # the first and the last, which may be the same
    if ends:
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
            interval = (row["test/accuracy_low"], row["test/accuracy_high"])
            lines += [f"test accuracy, greedy (step {row['step']}): {cell(row['test/accuracy'], *interval)}"]
    # One problem gained, one lost, one neither, as far as there are.
    first = pairs(run, run.accuracies[0], ends)
    kinds = [[pair for pair in first if pair[1]["right"] - pair[0]["right"] == change] for change in (1, -1, 0)]
    for before, after in ([kind[0] for kind in kinds if kind] + [pair for kind in kinds for pair in kind[1:]])[:3]:
        lines += ["", f"{quote(before['question'])}, answer {quote(before['answer'])}"]
        for when, row in (("before", before), ("after", after)):
            lines += [f"  {when:6}  {'right' if row['right'] else 'wrong'}  {quote(row['completion'])}"]
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
        axes.fill_between(*run.series(f"{key}_low"), run.series(f"{key}_high")[1], color=color, alpha=0.2, linewidth=0)
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
    (steps, all_right), (_, all_wrong) = run.series("train/frac_all_right"), run.series("train/frac_all_wrong")
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


def main(arguments: list[str] | None = None) -> None:
    """Prints the table of a run and writes curve.png into its folder."""
    parser = argparse.ArgumentParser(description="Prints a run's closing table and writes curve.png into its folder.")
    parser.add_argument("run_folder", type=Path, help="a run's own folder, such as one of those in runs/")
    run = load(parser.parse_args(arguments).run_folder)
    try:
        draw(run).savefig(run.folder / "curve.png")
    except OSError as error:
        fail(5, f"cannot write {run.folder / 'curve.png'} ({error.strerror}): free space, or mend the permissions")
    finally:  # the numbers are worth more than the picture
        print(table(run))


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # a terminal without UTF-8
    main()
