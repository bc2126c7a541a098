"""When does thinking emerge, and what decides it? Six seeds of grpo_reasoning.py for each setting, tables and pictures.

    uv run benchmarks/reasoning.py                      # 20 settings x 6 seeds, two hours on two cores
    uv run benchmarks/reasoning.py --only loss --seeds 1
    uv run benchmarks/reasoning.py --runs runs/A runs/B runs/C --pictures docs   # only draws these: docs/reasoning.png

Every run is `grpo_reasoning.py --preset tiny` with the flags that the table names, in a process of one thread. Ctrl-C
stops; the same command then continues, and a finished run is not made again. Means over seeds have 95 % t-intervals.
Policies that think more or less often at the start are made by models/make_reasoning.py.
"""

import math
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Literal

import tyro
from curves import interval, read, slug, train_all
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
BASE = "--preset tiny --num-steps 60 --eval-every 0 --save-every 0"
GRPO = "--loss-type grpo --scale-rewards"
LIMIT, MASK = "--max-completion-length", "--mask-truncated-completions"
LONG = "--num-steps 120"  # where thought is rare
SHARES = ("0.25", "0.01", "0.002", "0.0005")  # of thought at the start, besides the embedded policy's 0.04
# Comparison: what is compared, and the flags that make it; {0.25} is the policy of that share.
COMPARISONS: dict[str, dict[str, str]] = {
    "loss": {
        "Dr GRPO": "", "division by the std alone": "--scale-rewards", "GRPO": GRPO,
        "division by the length alone": "--loss-type grpo",
    },
    "share": {
        "25 %, Dr GRPO": "--model {0.25}", "25 %, GRPO": f"--model {{0.25}} {GRPO}",
        "4 %, Dr GRPO": "", "4 %, GRPO": GRPO,
        "1 %, Dr GRPO": f"--model {{0.01}} {LONG}", "1 %, GRPO": f"--model {{0.01}} {LONG} {GRPO}",
        "0.2 %, Dr GRPO": f"--model {{0.002}} {LONG}", "0.2 %, GRPO": f"--model {{0.002}} {LONG} {GRPO}",
        "0.05 %, Dr GRPO": f"--model {{0.0005}} {LONG}",
    },
    "rewards": {
        "accuracy": "", "accuracy, format, reasoning": "--rewards accuracy=2.0 format=0.5 reasoning=0.5",
        "reasoning alone": "--rewards reasoning=1.0",
    },
    "limit": {
        "40 tokens": "", "34 tokens": f"{LIMIT} 34", "34 tokens, cut ones masked": f"{LIMIT} 34 {MASK}",
        "30 tokens": f"{LIMIT} 30", "30 tokens, cut ones masked": f"{LIMIT} 30 {MASK}",
        "26 tokens": f"{LIMIT} 26", "26 tokens, cut ones masked": f"{LIMIT} 26 {MASK}", "22 tokens": f"{LIMIT} 22",
    },
}  # fmt: skip


# What a comparison's table shows besides the first columns.
COLUMNS = {
    "loss": ("gradient norm",), "share": (),
    "rewards": ("chain right, answer wrong", "chain wrong, answer right"),
    "limit": ("tokens at the end", "cut at the end"),
}  # fmt: skip


@dataclass(frozen=True)
class Options:
    """What to run and where."""

    only: tuple[Literal["loss", "share", "rewards", "limit"], ...] = ("loss", "share", "rewards", "limit")
    """Comparisons."""
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5, 6)
    """One run of each setting for each."""
    jobs: int = 0
    """Runs at a time, of one thread each; 0: one on a GPU, else two."""
    run_dir: str = "runs/reasoning"
    """Where runs and policies are kept."""
    pictures: str = ""
    """Folder for the pictures; empty: run_dir."""
    runs: tuple[str, ...] = ()
    """Run folders of one setting to draw as reasoning.png; then nothing is run."""


def make_policy(options: Options, share: str) -> None:
    """The policy of this share, made if it is not there."""
    folder = Path(options.run_dir) / f"policy_{share}"
    if not (folder / "chat_template.jinja").exists():
        make = [sys.executable, str(ROOT / "models" / "make_reasoning.py"), "--share", share, "--out", str(folder)]
        subprocess.run([*make, "--overwrite"], check=True)  # what is there is not whole


def chains(run: Path) -> tuple[float, float]:
    """Shares of the sampled completions after training: chain right and answer wrong, chain wrong and answer right."""
    rows = [row for row in read(run / "completions.jsonl") if row["split"] == "eval" and row["mode"] == "sampled"]
    rows = [row for row in rows if row["step"] == rows[-1]["step"]]
    right, wrong = 0, 0
    for row in rows:
        a, b, c = (int(number) for number in re.findall(r"\d+", row["question"]))
        chain = f"{a} + {b} = {a + b}. {a + b} + {c} = {a + b + c}</think>"
        right += chain in row["completion"] and not row["right"]
        wrong += "</think>" in row["completion"] and chain not in row["completion"] and row["right"]
    return right / len(rows), wrong / len(rows)


def final(run: Path) -> dict[str, float]:
    """What the tables show of a run; NaN where half of the completions never think."""
    rows = read(run / "metrics.jsonl")
    training = [row for row in rows if "train/frac_thinking" in row]
    thinking = [row["train/frac_thinking"] for row in training]
    found = [row["step"] for row in training if row["train/frac_thinking"] >= 0.5]
    values = {
        "thinks in step 1": thinking[0],
        "in steps 1 to 20": fmean(thinking[:20]),
        "after training": rows[-1]["eval/frac_thinking"],
        "step at which half think": found[0] if found else math.nan,
        "greedy": rows[-1]["eval/accuracy"],
        "sampled": rows[-1]["eval/accuracy_sampled"],
        # The rest is for some comparisons: in steps 1 to 20, then in the last ten.
        "gradient norm": fmean(row["train/grad_norm"] for row in training[:20]),
        "tokens at the end": fmean(row["completions/mean_length"] for row in training[-10:]),
        "cut at the end": fmean(row["completions/clipped_ratio"] for row in training[-10:]),
    }
    values["chain right, answer wrong"], values["chain wrong, answer right"] = chains(run)
    return values


def draw(name: str, runs: dict[str, list[Path]], path: Path) -> None:
    """Share of thought and length against steps: a mean over seeds for each setting, each seed as a thin line.

    The picture is as wide as a page of documentation shows it, so its letters are as large as those of the text.
    """
    figure = Figure(figsize=(8, 3.4 + 0.2 * len(runs)), layout="constrained")
    keys = {"train/frac_thinking": "Share of completions that think", "completions/mean_length": "Tokens a completion"}
    for axes, (key, title) in zip(figure.subplots(1, 2), keys.items(), strict=True):
        for number, (label, folders) in enumerate(runs.items()):
            curves = [[row[key] for row in read(run / "metrics.jsonl") if key in row] for run in folders]
            means = [fmean(values) for values in zip(*curves, strict=True)]
            steps = range(1, len(means) + 1)
            (line,) = axes.plot(steps, means, "-" if number % 2 == 0 else "--", label=label, linewidth=2.5)
            for curve in curves:
                axes.plot(steps, curve, color=line.get_color(), linewidth=0.7, alpha=0.6)
        axes.set_title(title, fontsize=13, loc="left")
        axes.set_xlabel("step", fontsize=12)
        axes.tick_params(labelsize=12)
        axes.set(xlim=(0, None), ylim=(0, 1.02) if key == "train/frac_thinking" else (0, None))
        if name == "share" and key == "train/frac_thinking":
            axes.set(yscale="log", ylim=(1e-4, 1.3))
        axes.grid(alpha=0.3)
    if len(runs) > 1:
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=11)
    figure.savefig(path, dpi=150)


def main(options: Options) -> None:
    """Runs what is missing, then draws and prints."""
    if options.runs:
        draw(
            "reasoning",
            {"": list(map(Path, options.runs))},
            Path(options.pictures or options.run_dir) / "reasoning.png",
        )
        return
    if "share" in options.only:
        for share in SHARES:
            make_policy(options, share)
    settings = {}
    for name in options.only:
        for flags in COMPARISONS[name].values():
            settings[slug(flags)] = f"{BASE} {flags}"
            for share in SHARES:
                policy = shlex.quote(str(Path(options.run_dir).resolve() / f"policy_{share}"))
                settings[slug(flags)] = settings[slug(flags)].replace(f"{{{share}}}", policy)
    made = train_all("grpo_reasoning.py", settings, options)
    print(f"`{shlex.join(['uv', 'run', 'benchmarks/reasoning.py', *sys.argv[1:]])}`\n")
    print(f"base: `grpo_reasoning.py {BASE}`\n")
    for name in options.only:
        runs = {}
        for label, flags in COMPARISONS[name].items():
            runs[label] = [made[slug(flags), seed] for seed in options.seeds]
        draw(name, runs, Path(options.pictures or options.run_dir) / f"{name}.png")
        print(f"### {name}\n")
        for number, (label, folders) in enumerate(runs.items()):
            rows = [final(run) for run in folders]
            columns = [*list(rows[0])[:6], *COLUMNS[name]]
            if number == 0:
                print(f"| | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
            cells = []
            for column in columns:
                digits = 1 if column in ("step at which half think", "tokens at the end") else 3
                cells.append(interval([row[column] for row in rows], digits))
            print(f"| {label} | {' | '.join(cells)} |")
        print()


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
