"""What Dr GRPO's settings do: learning curves over seeds, a picture and a table of each comparison.

    uv run benchmarks/curves.py                        # 13 settings x 3 seeds, about 40 minutes on two cores
    uv run benchmarks/curves.py --only loss --seeds 1  # one comparison, one seed
    uv run benchmarks/curves.py --only gsm8k           # needs a GPU: Qwen2-0.5B-Instruct on GSM8K, Dr GRPO and GRPO

Every run is `grpo.py` with the flags that the table names: the tiny preset with 300 steps of 32 x 16 in a process of
one thread, or, for gsm8k, the qwen preset and an evaluation on the test split at the end. The same command goes on
where it was stopped: a finished run is not made again, and one that was stopped is resumed. Curves are means over
seeds, bands reach from lowest to highest.
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
from typing import Any

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
T_QUANTILE = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57}  # of 95 % intervals of the mean of so many seeds


@dataclass(frozen=True)
class Options:
    """What to run and where."""

    only: tuple[str, ...] = tuple(name for name in COMPARISONS if name != "gsm8k")
    """Comparisons: loss, generations, temperature, learning_rate, gsm8k."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """One run of each setting for each."""
    jobs: int = 0
    """Runs at a time, of one thread each; 0: one on a GPU, else two."""
    flags: str = ""
    """Further flags of grpo.py for every run: --flags="--num-steps 20". Other flags need another run_dir."""
    run_dir: str = "runs/curves"
    """Where the runs are kept."""
    pictures: str = ""
    """Folder for the pictures; empty: run_dir."""


def read(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def train(script: str, flags: str, parent: Path) -> Path:
    """The finished run below parent: a run that was stopped is resumed; if there is none, one is started."""
    started = sorted(path.parent for path in parent.glob("*/config.json"))
    place = ["--resume", str(started[-1])] if started else ["--run-dir", str(parent)]
    command = [sys.executable, str(ROOT / script), *shlex.split(flags), *place]
    parent.mkdir(parents=True, exist_ok=True)
    log = parent / "log.txt"
    print(f"{'resumed' if started else 'started'}, see {log}", file=sys.stderr, flush=True)
    with log.open("a") as file:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
    if done.returncode != 0:
        lines = log.read_text().splitlines()[-20:]
        raise SystemExit("\n".join([f"{shlex.join(command)} ended with {done.returncode}:", *lines]))
    return max(path.parent for path in parent.glob("*/config.json"))


def train_all(script: str, settings: dict[str, str], options: Any) -> dict[tuple[str, int], Path]:
    """The runs of all settings {name: flags} and seeds, by (name, seed); missing ones are made, some at a time."""

    def one(pair: tuple[str, int]) -> Path:
        name, seed = pair
        return train(script, f"{settings[name]} --seed {seed}", Path(options.run_dir) / f"{name}__{seed}")

    pairs = [(name, seed) for seed in options.seeds for name in settings]
    try:
        with ThreadPoolExecutor(options.jobs or (1 if torch.cuda.is_available() else 2)) as pool:
            return dict(zip(pairs, pool.map(one, pairs), strict=True))
    except KeyboardInterrupt:
        print("stopped: the same command goes on", file=sys.stderr)
        raise SystemExit(130) from None


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
    last, training = metrics[-1], metrics[1:]
    rows = [row for row in read(run / "completions.jsonl") if row["split"] == "eval" and row["step"] == last["step"]]
    sampled = [row for row in rows if row["mode"] == "sampled"]
    lengths = {right: [row["length"] for row in sampled if row["right"] is right] for right in (True, False)}
    names = {"greedy": "eval/accuracy", "sampled": "eval/accuracy_sampled"}
    if "test/accuracy" in last:
        names |= {"test split, greedy": "test/accuracy", "test split, sampled": "test/accuracy_sampled"}
    return {label: last[key] for label, key in names.items()} | {
        "tokens, right": fmean(lengths[True] or [math.nan]),
        "tokens, wrong": fmean(lengths[False] or [math.nan]),
        "entropy": fmean(row["train/entropy"] for row in training[-50:]),
        "groups without signal": fmean(row["train/frac_reward_zero_std"] for row in training[-50:]),
    }


def draw(name: str, runs: dict[str, list[Path]], path: Path) -> None:
    """Greedy and sampled accuracy against steps: a mean and a band for each setting."""
    figure = Figure(figsize=(8, 3), layout="constrained")
    keys = {"eval/accuracy": "greedy", "eval/accuracy_sampled": "sampled"}
    for axes, (key, title) in zip(figure.subplots(1, 2, sharey=True), keys.items(), strict=True):
        for label, folders in runs.items():
            curves = [{row["step"]: row[key] for row in read(run / "metrics.jsonl") if key in row} for run in folders]
            steps = list(curves[0])
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
    bases = {name: f"{QWEN if name == 'gsm8k' else BASE} {options.flags}".strip() for name in options.only}
    folders = {}
    for name in options.only:
        for flags in COMPARISONS[name].values():
            folders[name, flags] = slug(flags) if bases[name].startswith(BASE) else f"{name}_{slug(flags)}"
    made = train_all("grpo.py", {path: f"{bases[name]} {flags}" for (name, flags), path in folders.items()}, options)
    print(f"`{shlex.join(['uv', 'run', 'benchmarks/curves.py', *sys.argv[1:]])}`\n")
    for name in options.only:
        settings = COMPARISONS[name]
        runs = {}
        for label, flags in settings.items():
            runs[label] = [made[folders[name, flags], seed] for seed in options.seeds]
        draw(name, runs, Path(options.pictures or options.run_dir) / f"{name}.png")
        measured = {label: [final(run) for run in folders] for label, folders in runs.items()}
        columns = list(next(iter(measured.values()))[0])
        print(f"### {name.replace('_', ' ')}\n\nbase: `grpo.py {bases[name]}`\n")
        print(f"| | flags | {' | '.join(columns)} |\n|---|---|{'---|' * len(columns)}")
        for label, rows in measured.items():
            cells = [interval([row[column] for row in rows]) for column in columns]
            print(f"| {label} | `{settings[label]}` | {' | '.join(cells)} |".replace("``", ""))
        print()


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
