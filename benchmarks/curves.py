"""What Dr GRPO's settings do: learning curves over seeds, a picture and a table of each comparison.

    uv run benchmarks/curves.py                        # 13 settings x 3 seeds, about 40 minutes on two cores
    uv run benchmarks/curves.py --only loss --seeds 1  # one comparison, one seed
    uv run benchmarks/curves.py --only gsm8k           # needs a GPU: Qwen2-0.5B-Instruct on GSM8K, Dr GRPO and GRPO

Every run is `grpo_ablations.py` with the flags that the table names. It has the flags of other losses, and without them
it trains as grpo.py. It gets the tiny preset with 300 steps of 32 x 16 in a process of one thread, or, for gsm8k, the
qwen preset with an evaluation on the test split at the end. The six runs of gsm8k keep up to 21 GB of checkpoints each.
Ctrl-C saves and stops; the same command then continues. A finished run is not made again. Curves are means over seeds;
bands reach from the lowest to the highest.
"""

import json
import math
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

import torch
import tyro
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
Rows = list[dict[str, Any]]
BASE = "--preset tiny --num-steps 300 --prompts-per-step 32 --warmup-steps 30 --eval-every 25 --save-every 0"
# Comparison: what is compared, and the flags that make it; "" is the base, of which each comparison has one.
COMPARISONS: dict[str, dict[str, str]] = {
    "loss": {
        "Dr GRPO": "", "GRPO": "--loss-type grpo --scale-rewards", "std scaling alone": "--scale-rewards",
        "length normalization alone": "--loss-type grpo",
    },
    "generations": {
        "4 x 128 prompts": "--num-generations 4 --prompts-per-step 128",
        "8 x 64 prompts": "--num-generations 8 --prompts-per-step 64", "16 x 32 prompts": "",
        "32 x 16 prompts": "--num-generations 32 --prompts-per-step 16",
    },
    "temperature": {"0.5": "--temperature 0.5", "0.7": "--temperature 0.7", "1.0": "", "1.4": "--temperature 1.4"},
    "learning_rate": {
        "3e-5": "--learning-rate 3e-5", "1e-4": "--learning-rate 1e-4", "3e-4": "", "1e-3": "--learning-rate 1e-3",
    },
    "gsm8k": {"Dr GRPO": "", "GRPO": "--loss-type grpo --scale-rewards"},
}  # fmt: skip
QWEN = "--preset qwen"  # the base of gsm8k
# For 95 % intervals of the mean of so many seeds.
T_QUANTILE = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}


@dataclass(frozen=True)
class Options:
    """What to run and where."""

    only: tuple[Literal["loss", "generations", "temperature", "learning_rate", "gsm8k"], ...] = (
        "loss", "generations", "temperature", "learning_rate",
    )  # fmt: skip
    """Comparisons."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """One run of each setting for each; at most ten."""
    jobs: int = 0
    """Runs at a time, of one thread each; 0: one on a GPU, else two."""
    flags: str = ""
    """Further flags for every run: --flags="--num-steps 20". With other flags give another run_dir."""
    run_dir: str = "runs/curves"
    """Where the runs are kept."""
    pictures: str = ""
    """Folder for the pictures; empty: run_dir."""


def read(path: Path) -> Rows:
    """The rows of a log, without a last one that was cut short."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def is_finished(run: Path) -> bool:
    """Whether the log is complete. Its checkpoints may be gone, so --resume is not asked."""
    rows = read(run / "metrics.jsonl") if (run / "metrics.jsonl").exists() else []
    num_steps = json.loads((run / "config.json").read_text())["num_steps"]
    return bool(rows) and rows[-1]["step"] == num_steps and "eval/accuracy" in rows[-1]


def train(script: str, flags: str, parent: Path) -> int:
    """Makes a run below parent, or continues one that was stopped, unless it is finished; returns the exit code."""
    place = ["--run-dir", str(parent)]
    for run in (path.parent for path in parent.glob("*/config.json")):
        made_with = json.loads((run / "environment.json").read_text())["command"][1:-2]  # without --run-dir
        if made_with != shlex.split(flags):
            print(f"error: {run} was made with {shlex.join(made_with)}: give another --run-dir", file=sys.stderr)
            return 2
        if is_finished(run):
            return 0
        place = ["--resume", str(run)]
    command = [sys.executable, str(ROOT / script), *shlex.split(flags), *place]
    parent.mkdir(parents=True, exist_ok=True)
    log = parent / "log.txt"
    print(f"{'resumed' if '--resume' in place else 'started'}, see {log}", file=sys.stderr, flush=True)
    with log.open("a") as file:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        code = subprocess.run(command, env=environment, stdout=file, stderr=subprocess.STDOUT).returncode
    if code not in (0, 130):
        last = "\n".join(log.read_text().splitlines()[-5:])
        print(f"error: {shlex.join(command)} ended with exit code {code}: {last}", file=sys.stderr, flush=True)
    return code


def train_all(script: str, settings: dict[str, str], options: Any) -> dict[tuple[str, int], Path]:
    """The runs of all settings {name: flags} and seeds, by (name, seed). Missing ones are made, some at a time."""
    parents = {(name, seed): Path(options.run_dir) / f"{name}__{seed}" for seed in options.seeds for name in settings}
    codes: list[int] = []

    def one(key: tuple[str, int]) -> None:
        # After a failure, or Ctrl-C, no further run is started.
        if not any(codes):
            codes.append(train(script, f"{settings[key[0]]} --seed {key[1]}", parents[key]))

    Path(options.pictures or options.run_dir).mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(options.jobs or (1 if torch.cuda.is_available() else 2)) as pool:
        try:
            list(pool.map(one, parents))
        except KeyboardInterrupt:
            codes.append(130)
            print("stopping; the runs in progress save first, and the same command continues", file=sys.stderr)
    if any(codes):
        raise SystemExit(130 if 130 in codes else 1)
    return {key: next(parent.glob("*/config.json")).parent for key, parent in parents.items()}


def slug(flags: str) -> str:
    """A name for a folder."""
    return flags.replace("--", "").replace(" ", "_").replace("{", "").replace("}", "") or "base"


def interval(values: list[float], digits: int = 3) -> str:
    """Mean and 95 % t-interval over the seeds that have a value (not NaN), and how many if not all have."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return "none"
    text = f"{fmean(known):.{digits}f}"
    if len(known) > 1:
        text += f" ± {T_QUANTILE[len(known)] * stdev(known) / len(known) ** 0.5:.{digits}f}"
    return text if len(known) == len(values) else f"{text} ({len(known)} of {len(values)} seeds)"


def final(run: Path) -> dict[str, float]:
    """What the table shows of a run: the evaluation after training, and the last 50 steps."""
    metrics = read(run / "metrics.jsonl")
    last = metrics[-1]
    training = [row for row in metrics if "train/entropy" in row][-50:]
    rows = [row for row in read(run / "completions.jsonl") if row["split"] == "eval" and row["step"] == last["step"]]
    sampled = [row for row in rows if row["mode"] == "sampled"]
    lengths = {right: [row["length"] for row in sampled if row["right"] is right] for right in (True, False)}
    names = {"greedy": "eval/accuracy", "sampled": "eval/accuracy_sampled"}
    if "test/accuracy" in last:
        names |= {"test split, greedy": "test/accuracy", "test split, sampled": "test/accuracy_sampled"}
    return {label: last[key] for label, key in names.items()} | {
        "tokens, right": fmean(lengths[True] or [math.nan]),
        "tokens, wrong": fmean(lengths[False] or [math.nan]),
        "entropy": fmean(row["train/entropy"] for row in training),
        "groups without signal": fmean(row["train/frac_reward_zero_std"] for row in training),
    }


def draw(name: str, runs: dict[str, list[Path]], path: Path) -> None:
    """Greedy and sampled accuracy against steps: a mean and a band for each setting."""
    figure = Figure(figsize=(8, 3), layout="constrained")
    keys = {"eval/accuracy": "greedy", "eval/accuracy_sampled": "sampled"}
    for axes, (key, title) in zip(figure.subplots(1, 2, sharey=True), keys.items(), strict=True):
        for label, folders in runs.items():
            curves = [{row["step"]: row[key] for row in read(run / "metrics.jsonl") if key in row} for run in folders]
            steps = [step for step in curves[0] if all(step in curve for curve in curves)]
            values = [[curve[step] for curve in curves] for step in steps]
            (line,) = axes.plot(steps, list(map(fmean, values)), label=label)
            axes.fill_between(steps, list(map(min, values)), list(map(max, values)), alpha=0.2, color=line.get_color())
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("held-out accuracy")
    figure.axes[0].legend(title=name.replace("_", " "), fontsize=8)
    figure.savefig(path, dpi=110)


def main(options: Options) -> None:
    """Runs what is missing, then draws and prints."""
    bases, names = {}, {}
    for name in options.only:
        bases[name] = f"{QWEN if name == 'gsm8k' else BASE} {options.flags}".strip()
        for flags in COMPARISONS[name].values():
            names[name, flags] = f"gsm8k_{slug(flags)}" if name == "gsm8k" else slug(flags)
    settings = {path: f"{bases[name]} {flags}" for (name, flags), path in names.items()}
    made = train_all("grpo_ablations.py", settings, options)
    print(f"`{shlex.join(['uv', 'run', 'benchmarks/curves.py', *sys.argv[1:]])}`\n")
    for name in options.only:
        runs = {}
        for label, flags in COMPARISONS[name].items():
            runs[label] = [made[names[name, flags], seed] for seed in options.seeds]
        draw(name, runs, Path(options.pictures or options.run_dir) / f"{name}.png")
        print(f"### {name.replace('_', ' ')}\n\nbase: `grpo_ablations.py {bases[name]}`\n")
        for number, (label, folders) in enumerate(runs.items()):
            rows = [final(run) for run in folders]
            if number == 0:
                print(f"| | flags | {' | '.join(rows[0])} |\n|---|---|{'---|' * len(rows[0])}")
            cells = [interval([row[column] for row in rows]) for column in rows[0]]
            print(f"| {label} | `{COMPARISONS[name][label]}` | {' | '.join(cells)} |".replace("``", ""))
        print()


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
