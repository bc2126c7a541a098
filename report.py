"""The closing table and the learning curve of a run, the same of a sweep, or one HTML page about several runs.

    uv run report.py runs/grpo__arithmetic__tiny__1__20260131-120000-000000

This prints the table, writes curve.png into the run folder and says where it is. The scripts call it as a program when
a run ends; it also works on a run that is still running or was killed. The picture is drawn from metrics.jsonl, the
table also from the evaluations in completions.jsonl, if they are there.

    uv run report.py runs/overfit              # a sweep of run_overfit_experiments.py, which calls it in this way

This prints a table of the experiments and writes it as table.md into the sweep's folder. If any run can be read, their
curves as curves.png and the page report.html are written there too.

    uv run report.py runs/A runs/B             # several runs
    uv run report.py runs                      # the runs one or two levels below
    uv run report.py runs/A -o page.html       # with -o also one run, or a sweep

These write only the page: report.html in the current folder, or the file that -o names. It is one self-contained file
below 5 MB: how the runs were made, accuracy before and after, curves, in which the seeds of one configuration are thin
lines with their mean, completions to browse, settings and environment, differences first. Its template is
report.html.jinja, next to this file.

A run that cannot be read is left out; a line on stderr names it and says why.

Exit codes: 0 done, 1 a file could not be written, 2 bad input: no run that can be read, or an -o that cannot be
written.
"""

import argparse
import ast
import base64
import contextlib
import hashlib
import io
import json
import re
import shlex
import sys
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
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
# The accuracy keys and the problems they are measured on. A run has one or both; with both, the first is its target.
ACCURACY = {"eval/train_subset_accuracy": "training", "eval/accuracy": "held-out"}
# What completions.jsonl calls those problems.
SPLITS = {"eval/train_subset_accuracy": "train_subset", "eval/accuracy": "eval", "test/accuracy": "test"}


@dataclass(frozen=True)
class Run:
    """What a run folder holds."""

    folder: Path
    experiment: str
    """Its name in a sweep; else empty."""
    result: Row
    """How the experiment ended; empty without result.json."""
    title: str
    """Task, model and seed; the folder's name without config.json."""
    metrics: list[Row]
    """One a step."""
    completions: list[Row]
    """Empty without completions.jsonl."""
    config: Row
    """Empty without config.json."""
    environment: Row
    """Command, commit and device; empty without environment.json."""
    packages: Row
    """Their versions."""

    @property
    def accuracies(self) -> list[str]:
        """The keys of ACCURACY that the metrics have; with both, the target first."""
        return [key for key in ACCURACY if any(key in row for row in self.metrics)] or ["eval/accuracy"]

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of each phase; evaluations are not counted."""
        return {phase: sum(self.series(f"time/{phase}_s")[1]) for phase in ("rollout", "reward", "update")}

    def series(self, *keys: str) -> list[list[Any]]:
        """[steps, values, ...] of metrics, from the steps that have all of them, as finite numbers."""
        rows = [row for row in self.metrics if all(is_number(row.get(key)) for key in keys)]
        return [[row[key] for row in rows] for key in ("step", *keys)]

    def ends(self, key: str) -> list[Row]:
        """The metrics of the first and last step that have a key: one row if both are the same, none if no step has
        it."""
        rows = [row for row in self.metrics if is_number(row.get(key))]
        return rows[:1] + rows[1:][-1:]

    def evaluated(self, accuracy: str, step: int, mode: str) -> list[Row]:
        """The completions from which an accuracy was computed, one a problem; `mode` is greedy or sampled."""
        wanted = (step, SPLITS[accuracy], mode)
        rows = [row for row in self.completions if (row["step"], row.get("split"), row.get("mode")) == wanted]
        return [row for row in rows if is_number(row.get("right"))]

    def changes(self, accuracy: str) -> list[tuple[int, Row, Row]]:
        """(1 gained, -1 lost or 0, before, after) of each problem, greedy; none without a later evaluation."""
        greedy = [self.evaluated(accuracy, end["step"], "greedy") for end in self.ends(accuracy)]
        if len(greedy) < 2:
            return []
        both = [pair for pair in zip(*greedy, strict=False) if pair[0].get("question") == pair[1].get("question")]
        return [(after["right"] - before["right"], before, after) for before, after in both]


def is_number(value: Any) -> bool:
    """Whether this is a finite number that can be drawn; True and False count as 1 and 0."""
    return isinstance(value, int | float) and abs(value) < 1e30


def fail(exit_code: int, message: str) -> NoReturn:
    """Ends the program with one line on stderr that names the cause and the cure."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(exit_code)


def read_jsonl(path: Path) -> list[Row]:
    """The rows that have a step, from a file with one JSON object per line; none if there is no such file.

    Text after the last line break is ignored: a killed run may leave part of a line.
    """
    rows = []
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        try:
            rows.append(json.loads(line or "{}"))
        except ValueError:
            fail(2, f"{path}: line {number} is not JSON: remove the line, or give another run folder")
    return [row for row in rows if isinstance(row, dict) and isinstance(row.get("step"), int)]


def read_json(path: Path) -> Row:
    """The object in a JSON file, empty if there is no such file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else {}
    except ValueError:
        content = None
    if not isinstance(content, dict):
        fail(2, f"{path} is no JSON object: remove or fix it")
    return content


def plain(values: Row) -> Row:
    """The same with lists as text, such as a command's arguments."""
    return {key: shlex.join(map(str, value)) if isinstance(value, list) else value for key, value in values.items()}


def load(folder: Path, experiment: str = "") -> Run:
    """Reads a run folder; exits with code 2 if it is not one."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        fail(2, f"there is no {path}: give the folder of one run that has got past its start")
    metrics = read_jsonl(path)
    if not metrics:
        fail(2, f"{path} holds no line: the run has not got past its first evaluation; wait, or give another run")
    config = plain(read_json(folder / "config.json"))
    environment = plain(read_json(folder / "environment.json"))
    packages = environment.pop("packages", {})
    result = read_json(folder.parent / "result.json") if experiment else {}
    title = folder.resolve().name
    if config:
        task = Path(str(config.get("dataset_path") or config.get("task", "?"))).stem
        title = f"{task}, {Path(str(config.get('model', '?'))).name}, seed {config.get('seed', '?')}"
    completions = read_jsonl(folder / "completions.jsonl")
    return Run(folder, experiment, result, title, metrics, completions, config, environment, packages)


def load_all(found: dict[Path, str]) -> list[Run]:
    """The runs that can be read; of each that is left out, `load` says on stderr why."""
    runs = []
    for folder, experiment in found.items():
        with contextlib.suppress(SystemExit):
            runs.append(load(folder, experiment))
    return runs


def find_runs(folder: Path) -> list[tuple[Path, str]]:
    """The folder itself if it is a run, else the runs one or two levels below it, each with its experiment's name; none
    if there is no run.

    In an experiment's folder only the run that its result.json names counts, not those before it.
    """
    if (folder / "metrics.jsonl").is_file():
        return [(folder, "")]
    found = [path.parent for depth in ("*", "*/*") for path in folder.glob(f"{depth}/metrics.jsonl")]
    runs = []
    # The oldest first.
    for run in sorted(found, key=lambda run: run.name.rsplit("__", 1)[-1]):
        counts = read_json(run.parent / "result.json").get("run_folder")
        if counts in (None, run.name):
            runs.append((run, run.parent.name if run.parent != folder or counts else ""))
    return runs


# ----------------------------------------------------------------------------------------------------------------------
# The tables, of a run and of a sweep


def cell(value: Any, low: Any = None, high: Any = None) -> str:
    """A value with its interval, if it has one: 0.641 [0.598, 0.681]."""
    if not is_number(value):
        return "-"
    interval = f" [{low:.3f}, {high:.3f}]" if is_number(low) and is_number(high) else ""
    return f"{value:.3f}{interval}"


def metric_cell(metrics: Row, key: str) -> str:
    """A metric of a step with its interval, if the step has one."""
    return cell(metrics.get(key), metrics.get(f"{key}_low"), metrics.get(f"{key}_high"))


def quote(text: Any) -> str:
    """A text on one line: control characters escaped, the middle of a long one left out."""
    text = str(text)
    return repr(text if len(text) <= 200 else f"{text[:80]} ... {text[-115:]}")


def evaluation(run: Run, accuracy: str, metrics: Row) -> list[str]:
    """The cells of one accuracy at one step."""
    split = SPLITS[accuracy]
    cells = [metric_cell(metrics, accuracy)]
    count = len(run.evaluated(accuracy, metrics["step"], "sampled"))
    for key in (f"{accuracy}_sampled", f"{split}/completions/parsed_ratio"):
        share: Any = metrics.get(key)
        # Without completions the number of problems is not known, so there is no interval.
        interval = wilson_interval(round(share * count), count) if count and is_number(share) else ()
        cells.append(cell(share, *interval))
    return [*cells, metric_cell(metrics, f"{split}/reward")]


def block(run: Run, accuracy: str) -> list[tuple[str, ...]]:
    """The table's rows for one accuracy, the header first; no row without an evaluation."""
    ends = run.ends(accuracy)
    if not ends:
        return []
    count = len(run.evaluated(accuracy, ends[0]["step"], "greedy"))
    header = f"{count or ''} {ACCURACY[accuracy]} problems".strip()
    columns = [[header, "accuracy, greedy", "accuracy, sampled", "answers parsed", "reward"]]
    for when, metrics in zip(("before", "after"), ends, strict=False):
        columns.append([f"{when} (step {metrics['step']})", *evaluation(run, accuracy, metrics)])
    return list(zip(*columns, strict=True))


def table(run: Run) -> str:
    """The closing table: before and after, problems gained and lost, test accuracy, samples, seconds."""
    lines = [f"{run.title}: {run.metrics[-1]['step']} steps; [low, high] is a 95 % interval"]
    for accuracy in run.accuracies:
        rows = block(run, accuracy)
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines += ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    for accuracy in run.accuracies:
        signs = [sign for sign, _, _ in run.changes(accuracy)]
        if signs:
            lines.append(f"greedy: {signs.count(1)} {ACCURACY[accuracy]} problems gained, {signs.count(-1)} lost")
    for row in run.ends("test/accuracy")[-1:]:
        lines.append(f"test accuracy, greedy (step {row['step']}): {metric_cell(row, 'test/accuracy')}")
    changes = run.changes(run.accuracies[0])
    # One problem gained, one lost and one unchanged, if there are any.
    for sign in (1, -1, 0):
        for _, before, after in [change for change in changes if change[0] == sign][:1]:
            lines += ["", f"{quote(before.get('question'))}, answer {quote(before.get('answer'))}"]
            for when, row in (("before", before), ("after", after)):
                lines.append(f"  {when:6}  {'right' if row['right'] else 'wrong'}  {quote(row.get('completion'))}")
    seconds = [f"{phase} {value:.1f}" for phase, value in run.seconds.items()]
    return "\n".join([*lines, "", "seconds: " + ", ".join(seconds)])


def status(result: Row) -> str:
    """How an experiment of a sweep ended, by its exit code."""
    code = result.get("exit_code")
    return {None: "not ended", 0: "reached", 6: "missed"}.get(code, f"failed, exit {code}")


# Settings in the table of a sweep, by their headings.
SWEEP_SETTINGS = {"lr": "learning_rate", "problems": "num_samples", "generations": "num_generations"}
SWEEP_SETTINGS |= {"epochs": "num_epochs", "micro-batch": "micro_batch_size", "checkpointing": "gradient_checkpointing"}


def sweep_table(runs: list[Run]) -> list[tuple[str, ...]]:
    """The table of a sweep, the header first; "-" stands for what is not known, and a column of nothing else is left
    out."""
    accuracies = [f"{kind} accuracy" for kind in ACCURACY.values()]
    rows = [["experiment", *SWEEP_SETTINGS, "steps", "seconds", *accuracies, "peak GB", "status"]]
    for run in runs:
        values = [run.config.get(key) for key in SWEEP_SETTINGS.values()]
        cells = [f"{value:g}" if is_number(value) else "-" for value in values]
        cells += [str(max(run.series()[0], default="-")), str(run.result.get("seconds", "-"))]
        cells += [" -> ".join(cell(end[key]) for end in run.ends(key)) or "-" for key in ACCURACY]
        memory = cell(max(run.series("perf/peak_memory_gb")[1], default=None))
        rows.append([run.experiment, *cells, memory, status(run.result)])
    known = [column for column in zip(*rows, strict=True) if {*column[1:]} != {"-"}]
    return list(zip(*known, strict=True))


def markdown(rows: list[tuple[str, ...]]) -> str:
    """A Markdown table, padded so that it also reads well on a terminal."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return "".join(f"| {' | '.join(map(str.ljust, row, widths))} |\n" for row in padded)


# ----------------------------------------------------------------------------------------------------------------------
# Curves, as pictures of a run and of a sweep, and as charts of the page

STYLE: Any = {
    "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left", "text.parse_math": False,
    "axes.grid": True, "axes.axisbelow": True, "axes.formatter.useoffset": False, "svg.fonttype": "none",
}  # fmt: skip
# Okabe and Ito's colours, which differ for any colour vision.
COLORS = ["#0072B2", "#D55E00", "#009E73", "#B5559A", "#E69F00", "#56B4E9", "#666666"]
PICTURE = {"axes.prop_cycle": f"cycler(color={COLORS})", "grid.color": "#E5E5E5", "font.size": 12, "axes.titlesize": 13}
# The page has names for colours, which its style sets for light and for dark; these codes stand for the names.
INK, GRID, SERIES = "#0000c0", "#0000c1", [f"#0000b{i}" for i in range(7)]
PAGE: Any = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
PAGE |= {"axes.edgecolor": GRID, "grid.color": GRID, "font.size": 9, "axes.prop_cycle": f"cycler(color={SERIES})"}
# Titles of the curves that come first.
TITLES = {key: f"Accuracy on {kind} problems" for key, kind in ACCURACY.items()}
TITLES |= {"train/reward": "Training reward", "completions/mean_length": "Completion length, tokens"}
TITLES |= {"train/frac_reward_zero_std": "Share of groups without signal", "train/entropy": "Entropy per token, nats"}
# The number of a metric's look in curve.png, the same in every run; that of other shares comes from their names.
LOOKS = dict.fromkeys([*TITLES, "train/frac_all_right", "completions/clipped_ratio"], 0)
LOOKS |= dict.fromkeys(["eval/accuracy_sampled", "train/frac_all_wrong", "completions/parsed_ratio"], 1)
LOOKS |= {"eval/train_subset_accuracy": 2, "eval/train_subset_accuracy_sampled": 3, "train/frac_thinking": 2}


@dataclass(frozen=True)
class Group:
    """Runs of one configuration, which differ in their seed: one line in every chart."""

    index: int
    letter: str
    label: str
    runs: dict[str, Run]
    """By name: the letter, with a number if there are several."""


def curves(runs: list[Run], key: str) -> list[dict[int, float]]:
    """A metric by step, for each run that has it; in training, its running mean over a twentieth of the steps."""
    found = []
    for run in runs:
        steps, values = run.series(key)
        reach = 0 if key.split("/")[0] in SPLITS.values() else len(values) // 40
        means = [fmean(values[max(0, i - reach) : i + reach + 1]) for i in range(len(values))]
        found.append(dict(zip(steps, means, strict=True)))
    return [curve for curve in found if curve]


def draw_line(axes: Axes, runs: list[Run], key: str, index: int, label: str = "", points: int = 200) -> None:
    """Draws, for one run, a metric's running mean, its values as a thin line, and its 95 % interval if it has one; for
    several, their mean over the steps that all of them have, and each run as a thin line. `index` sets the look; about
    `points` points of a line are drawn.
    """
    lines = curves(runs, key)
    if not lines:
        return
    look: Any = {"color": matplotlib.colors.to_hex(f"C{index % 7}"), "gid": f"s{index}", "clip_on": False}
    look["linestyle"] = ":" if key.endswith("_sampled") else ("-", "--", ":")[index // 7 % 3]
    steps = sorted(set.intersection(*map(set, lines)))
    mean = [fmean(line[step] for line in lines) for step in steps]
    every = len(steps) // points + 1
    # Lines of a lower number are thicker, so that equal lines can all be seen.
    width = 1.2 + max(0, 4 - index) / 3
    marker = "o" if len(steps) <= 30 else None
    axes.plot(steps[::every], mean[::every], linewidth=width, marker=marker, markersize=3, label=label, **look)
    if len(runs) == 1:
        lines = [dict(zip(*runs[0].series(key), strict=True))]
        steps, low, high = runs[0].series(f"{key}_low", f"{key}_high")
        if steps:
            axes.fill_between(steps, low, high, color=look["color"], gid=f"s{index} band", alpha=0.15, linewidth=0)
    for line in lines:
        axes.plot([*line][::every], [*line.values()][::every], linewidth=0.7, alpha=0.6, **look)


def set_axes(axes: Axes, runs: list[Run], key: str) -> None:
    """Sets the scales of a chart: steps, and for the metric a range that holds all values; 0 to 1 for shares."""
    axes.set_xlim(0, max(run.metrics[-1]["step"] for run in runs) or 1)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10], integer=True))
    values = [value for run in runs for value in run.series(key)[1]] or [0]
    least, most = min(values), max(values)
    if re.search("accuracy|frac_|ratio", key):
        axes.set_ylim(0, 1.02)
    elif least > 0 and most > 100 * least:
        axes.set_yscale("log")
        axes.set_ylim(least / 1.2, most * 1.2)
        axes.yaxis.set_major_formatter("{x:g}")
    else:
        axes.set_ylim(min(0, 1.05 * least), max(0, 1.05 * most) or 1)
    for target in {run.config.get("target_accuracy") or 0 for run in runs if key == run.accuracies[0]} - {0}:
        axes.axhline(target, color=matplotlib.rcParams["text.color"], linewidth=0.8, linestyle=(0, (6, 3)))


def draw_groups(axes: Axes, groups: list[Group], key: str) -> None:
    """Draws a metric of all groups, overlaid."""
    runs = [run for group in groups for run in group.runs.values()]
    for group in groups:
        draw_line(axes, [*group.runs.values()], key, group.index, group.label, min(200, 3000 // len(runs)))
    set_axes(axes, runs, key)


def draw(run: Run) -> Figure:
    """The picture of a run: accuracy and reward above, what explains them below; from the metrics alone."""
    groups = ["train/frac_all_right", "train/frac_all_wrong"]
    found = {key for row in run.metrics for key in row if re.match("train/frac_|completions/.*_ratio", key)}
    found -= {*groups, "train/frac_reward_zero_std"}
    shares = [key for key in sorted(found) if any(run.series(key)[1])]
    panels = {"A": [f"{key}{end}" for key in run.accuracies for end in ("", "_sampled")], "G": groups, "S": shares}
    panels |= {"R": ["train/reward"], "L": ["completions/mean_length"], "E": ["train/entropy"]}
    titles = {"A": "Accuracy and its 95 % interval", "G": "Groups without signal", "S": "Shares of completions"}
    layout = "AAAARRRR;LLGGEESS" if shares else "AAARRR;LLGGEE"
    with matplotlib.rc_context(STYLE | PICTURE):
        figure = Figure(figsize=(12, 7), dpi=100, layout="constrained")
        figure.suptitle(run.title, fontsize=15)
        for letter, axes in figure.subplot_mosaic(layout, height_ratios=(5, 4)).items():
            drawn = [key for key in panels[letter] if run.series(key)[0]]
            if not drawn:
                axes.remove()
                continue
            for key in drawn:
                draw_line(axes, [run], key, LOOKS.get(key, 3 + zlib.crc32(key.encode()) % 18), key.split("/")[1])
            set_axes(axes, [run], drawn[0])
            axes.set_title(titles.get(letter) or TITLES[drawn[0]])
            if letter in titles:
                axes.legend(framealpha=0.6, edgecolor="none", labelspacing=0.2, fontsize=11)
    return figure


def draw_sweep(runs: list[Run]) -> Figure:
    """The picture of a sweep: each accuracy, all experiments overlaid."""
    keys = [key for key in ACCURACY if any(key in run.accuracies for run in runs)]
    with matplotlib.rc_context(STYLE | PICTURE):
        figure = Figure(figsize=(13, 6), layout="constrained")
        figure.suptitle("; ".join(sorted({run.title for run in runs})), fontsize=15)
        for axes, key in zip(figure.subplots(1, len(keys), squeeze=False)[0], keys, strict=True):
            draw_groups(axes, group_runs(runs), key)
            axes.set_title(TITLES[key])
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


# ----------------------------------------------------------------------------------------------------------------------
# The page

# Of the page.
MAX_BYTES = 4_900_000
# Of Student's t, for 95 % intervals of the mean of 3, 4, ... and of 10 or more seeds.
T_QUANTILES = [4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26]
# Settings outside a configuration.
FREE = {"seed", "run_dir", "resume", "track", "log_completions", "save_every"}


def compare(columns: list[Row]) -> dict[str, list[str]]:
    """The values of each key in all columns, cut if they are very long; "-" if a column lacks the key."""
    keys = dict.fromkeys(key for column in columns for key in column)
    return {key: [str(column.get(key, "-"))[:600] for column in columns] for key in keys}


def settings(run: Run) -> Row:
    """What defines a run's configuration: its script's code, as a digest, and the settings that are not FREE."""
    name = run.folder.resolve().name.split("__")[0] + ".py"
    if (run.folder / name).is_file():
        code = (run.folder / name).read_text(encoding="utf-8", errors="replace")
        with contextlib.suppress(SyntaxError, ValueError):
            # Without comments and line breaks.
            code = ast.dump(ast.parse(code))
        name += " " + hashlib.sha256(code.encode()).hexdigest()[:8]
    config = {key: value for key, value in run.config.items() if key not in FREE}
    return {"script": name, **(config or {"run": str(run.folder)})}


def group_runs(runs: list[Run]) -> list[Group]:
    """Runs of one configuration together, labelled by their experiment or by what sets them apart."""
    members: dict[str, list[Run]] = {}
    for run in runs:
        configuration = json.dumps([run.experiment, settings(run)], sort_keys=True)
        members.setdefault(configuration, []).append(run)
    compared = compare([settings(alike[0]) for alike in members.values() if not alike[0].experiment])
    groups = []
    for index, alike in enumerate(members.values()):
        own = settings(alike[0])
        apart = [f"{key} {own[key]}" for key in compared if len(set(compared[key])) > 1 and own.get(key, "") != ""]
        label = alike[0].experiment or ", ".join(apart) or alike[0].title.rsplit(", seed ", 1)[0]
        label += f" ({status(alike[0].result)})" if alike[0].result else ""
        letter = chr(ord("A") + index % 26) * (1 + index // 26)
        names = [f"{letter}{number}" for number in range(1, len(alike) + 1)] if len(alike) > 1 else [letter]
        groups.append(Group(index, letter, label, dict(zip(names, alike, strict=True))))
    return groups


def draw_svg(groups: list[Group], key: str) -> str:
    """One chart of a metric, all groups overlaid, as SVG for use in HTML."""
    with matplotlib.rc_context({**STYLE, **PAGE, "svg.hashsalt": key}):
        figure = Figure(figsize=(5.6, 2.8), layout="constrained")
        draw_groups(figure.subplots(), groups, key)
        file = io.StringIO()
        unnamed = dict.fromkeys(["Creator", "Date", "Format", "Type"])
        figure.savefig(file, format="svg", transparent=True, metadata=unnamed)
    svg = file.getvalue()
    # Inside HTML it needs no XML names; ids of lines become classes, by which they are hidden; other ids are removed.
    svg = re.sub(r'<svg [^>]*(viewBox="[^"]*")[^>]*>', r'<svg \1 role="img">', svg[svg.index("<svg") :], count=1)
    svg = re.sub(r'<g id="(s\d[\w ]*)">', r'<g class="\1">', svg)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)
    svg = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\.\d\d)\d+", r"\1", tag[0]), svg)
    svg = re.sub(r"#0000b(\d)", r"var(--s\1)", svg)
    return svg.replace(INK, "currentColor").replace(GRID, "var(--grid)")


def draw_charts(groups: list[Group]) -> dict[str, str]:
    """A chart of each metric."""
    runs = [run for group in groups for run in group.runs.values()]
    keys = sorted({key for run in runs for row in run.metrics for key in row})
    drawn = [key for key in keys if not re.search("^step$|^test/|_low$|_high$", key)]
    return {key: draw_svg(groups, key) for key in drawn if any(run.series(key)[0] for run in runs)}


def mean_cell(values: list[float]) -> str:
    """The mean of accuracies of several seeds; of at least three that differ, with a 95 % t-interval."""
    mean = cell(fmean(values) if values else None)
    if len(values) < 3 or len(set(values)) == 1:
        return mean
    return f"{mean} ± {T_QUANTILES[min(len(values), 10) - 3] * stdev(values) / len(values) ** 0.5:.3f}"


def accuracy_rows(groups: list[Group], key: str) -> list[tuple[Group, list[Any]]]:
    """The rows of the page's table of an accuracy: one for each run that has it, and one for the mean of several."""
    rows = []
    for group in groups:
        values: dict[str, list[float]] = {"before": [], "after": []}
        for name, run in group.runs.items():
            found = {"after" if metrics["step"] else "before": metrics for metrics in run.ends(key)}
            for when, metrics in found.items():
                values[when].append(metrics[key])
            cells = [metric_cell(found.get(when, {}), key) for when in values]
            signs = [sign for sign, _, _ in run.changes(key)]
            changed = f"+{signs.count(1)} -{signs.count(-1)}" if signs else "-"
            if run.ends(key):
                cells += [changed, run.metrics[-1]["step"], f"{sum(run.seconds.values()):.0f} s"]
                rows.append((group, [name, *cells]))
        if len(group.runs) > 1 and any(values.values()):
            rows.append((group, [f"{group.letter} mean", *map(mean_cell, values.values()), "", "", ""]))
    return rows


def embed(runs: dict[str, Run], budget: int) -> str:
    """Completions as JSON for the page's script, and how many there were in all.

    If they take more than `budget` bytes, only the first ones of each evaluation or step are taken.
    """
    rewards = sorted({key for run in runs.values() for row in run.completions for key in row if "rewards/" in key})
    facts = ("reward", "advantage", "length", *(rewards if len(rewards) > 1 else []))
    # (place in its evaluation or step, order, JSON)
    ranked: list[tuple[int, int, str]] = []
    for name, run in runs.items():
        places: Counter[tuple[int, str]] = Counter()
        for row in run.completions:
            kind = f"{row.get('split', '')} {row.get('mode', '')}".strip()
            right = bool(row["right"]) if is_number(row.get("right")) else None
            texts = [str(row.get(key, "-")) for key in ("question", "answer", "completion")]
            known = ", ".join(f"{key} {row[key]:.4g}" for key in facts if is_number(row.get(key)))
            # Older runs do not have the answer that was read; it is null where none was found.
            line = [name, row["step"], kind, right, *texts, known, row.get("extracted", False)]
            # No text can end the page's script element.
            text = json.dumps(line).replace("<", "\\u003c")
            ranked.append((places[row["step"], kind], len(ranked), text))
            places[row["step"], kind] += 1
    taken = []
    for _, order, text in sorted(ranked):
        budget -= len(text) + 1
        if budget < 0:
            break
        taken.append((order, text))
    rows = ",".join(text for _, text in sorted(taken))
    return f'{{"total":{len(ranked)},"rows":[{rows}]}}'


def write_page(path: Path, loaded: list[Run], sweep: list[tuple[str, ...]] | None = None) -> None:
    """Writes the HTML page about these runs; `sweep` is the table of their sweep, if they are one."""
    groups = group_runs(loaded)
    runs = {name: run for group in groups for name, run in group.runs.items()}
    columns = [{"folder": run.folder, **run.config, **settings(run), **run.environment} for run in runs.values()]
    source = Path(__file__).resolve().with_name("report.html.jinja").read_text(encoding="utf-8")
    script = source[source.index("<script>") + 8 : source.rindex("</script>")]
    jinja = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    html = jinja.from_string(source).render(
        title="; ".join(sorted({run.title.rsplit(", seed ", 1)[0] for run in loaded})),
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        sweep=sweep,
        groups=groups,
        runs=runs,
        titles=TITLES,
        charts=draw_charts(groups),
        accuracies={key: accuracy_rows(groups, key) for key in (*ACCURACY, "test/accuracy")},
        facts=compare(columns),
        packages=compare([run.packages for run in runs.values()]),
        block=block,
    )
    data = embed(runs, MAX_BYTES - len(html.encode("utf-8", "backslashreplace")) - 1000)
    path.write_bytes(html.replace("<!-- data -->", data).encode("utf-8", "backslashreplace"))
    print(f"{path}: {len(runs)} run(s), {path.stat().st_size / 1e6:.2f} MB")


# ----------------------------------------------------------------------------------------------------------------------
# Main


def report_run(folder: Path) -> None:
    """Prints the table of a run and writes curve.png into its folder."""
    run = load(folder)
    # The table comes first, because the numbers matter more than the picture.
    print(table(run), flush=True)
    draw(run).savefig(folder / "curve.png")
    print(f"\ncurve: {folder / 'curve.png'}\nrun folder: {folder}")
    print(f"page: uv run report.py {shlex.quote(str(folder))} -o report.html")


def report_sweep(folder: Path) -> None:
    """Prints the table of a sweep and writes it, the curves and the page into its folder."""
    runs = load_all(dict(find_runs(folder)))
    # Experiments without such a run have their row in the table.
    ended = {path.parent for path in folder.glob("*/result.json")} - {run.folder.parent for run in runs}
    rest = [Run(path, path.name, read_json(path / "result.json"), "", [], [], {}, {}, {}) for path in sorted(ended)]
    rows = sweep_table(runs + rest)
    text = markdown(rows)
    print(text, flush=True)
    (folder / "table.md").write_text(text, encoding="utf-8", errors="backslashreplace")
    if runs:
        draw_sweep(runs).savefig(folder / "curves.png")
        print(f"curves: {folder / 'curves.png'}")
        write_page(folder / "report.html", runs, rows)


def main(arguments: list[str] | None = None) -> None:
    """Reports one run, one sweep, or several runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_folder", type=Path, nargs="+", help="of a run or a sweep; several make a page")
    parser.add_argument("-o", "--output", type=Path, metavar="report.html", help="write only the page, to this")
    options = parser.parse_args(arguments)
    first = options.run_folder[0]
    # A run given twice counts once.
    found = dict(run for folder in options.run_folder for run in find_runs(folder) or [(folder, "")])
    alone = len(options.run_folder) == 1 and not options.output
    try:
        if alone and any(first.glob("*/result.json")):
            report_sweep(first)
        elif alone and first in found:
            report_run(first)
        else:
            runs = load_all(found)
            if not runs:
                raise SystemExit(2)
            write_page(options.output or Path("report.html"), runs)
            if len(runs) < len(found):
                print(f"left out: {len(found) - len(runs)} of {len(found)} folders, for the errors above")
    except OSError as error:
        cure = "free space, fix permissions, or give another -o"
        fail(2 if options.output else 1, f"cannot write {error.filename or ''} ({error.strerror}): {cure}")


if __name__ == "__main__":
    # For a terminal without UTF-8.
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    main()
