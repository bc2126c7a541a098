"""What Dr GRPO's settings do on the tiny preset: learning curves over seeds, a picture and a table of each comparison.

    uv run benchmarks/curves.py                        # 13 settings x 3 seeds, about 40 minutes on two cores
    uv run benchmarks/curves.py --only loss --seeds 1  # one comparison, one seed

Every run is `grpo.py --preset tiny` with 300 steps of 32 x 16 and the flags that the table names, in a process of one
thread. A run that is there already is not made again. Curves are means over seeds, bands reach from lowest to highest.
"""

import json
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import tyro
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
Rows = list[dict[str, Any]]
BASE = "--preset tiny --num-steps 300 --prompts-per-step 32 --warmup-steps 30 --eval-every 25"
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
}  # fmt: skip
T_QUANTILE = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57}  # of 95 % intervals of the mean of so many seeds


@dataclass(frozen=True)
class Options:
    """What to run and where."""

    only: tuple[str, ...] = tuple(COMPARISONS)
    """Comparisons."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """One run of each setting for each."""
    jobs: int = 2
    """Runs at a time, of one thread each."""
    run_dir: str = "runs/curves"
    """Where the runs are kept."""
    pictures: str = ""
    """Folder for the pictures; empty: run_dir."""


def read(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def folder(options: Options, flags: str, seed: int) -> Path:
    return Path(options.run_dir) / f"{flags.replace('--', '').replace(' ', '_') or 'base'}__{seed}"


def run(options: Options, flags: str, seed: int) -> Path:
    """The run folder of one setting and seed, made if it is not there or not complete."""
    parent = folder(options, flags, seed)
    for found in parent.glob("*/metrics.jsonl"):
        if read(found)[-1]["step"] == 300:
            return found.parent
    command = [sys.executable, str(ROOT / "grpo.py"), *BASE.split(), *flags.split(), "--seed", str(seed)]
    command += ["--run-dir", str(parent), "--save-every", "0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{shlex.join(command)} ended with {done.returncode}: {done.stderr}")
    print(f"done: {parent}", file=sys.stderr, flush=True)
    return run(options, flags, seed)


def interval(values: list[float], digits: int = 3) -> str:
    """Mean and 95 % t-interval over seeds."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    half = T_QUANTILE[len(values)] * stdev(values) / len(values) ** 0.5
    return f"{fmean(values):.{digits}f} ± {half:.{digits}f}"


def final(run: Path) -> dict[str, float]:
    """What the table shows of a run: the evaluation after training, and the last 50 steps."""
    metrics = read(run / "metrics.jsonl")
    rows = [row for row in read(run / "completions.jsonl") if row["split"] == "eval" and row["step"] == 300]
    sampled = [row for row in rows if row["mode"] == "sampled"]
    lengths = {right: [row["length"] for row in sampled if row["right"] is right] for right in (True, False)}
    return {
        "greedy": metrics[-1]["eval/accuracy"],
        "sampled": metrics[-1]["eval/accuracy_sampled"],
        "tokens, right": fmean(lengths[True] or [0]),
        "tokens, wrong": fmean(lengths[False] or [0]),
        "entropy": fmean(row["train/entropy"] for row in metrics[-50:]),
        "groups without signal": fmean(row["train/frac_reward_zero_std"] for row in metrics[-50:]),
    }


def draw(name: str, runs: dict[str, list[Path]], path: Path) -> None:
    """Greedy and sampled accuracy against steps: a mean and a band for each setting."""
    figure = Figure(figsize=(8, 3), layout="constrained")
    for axes, key in zip(figure.subplots(1, 2, sharey=True), ("eval/accuracy", "eval/accuracy_sampled"), strict=True):
        for label, folders in runs.items():
            curves = [[row for row in read(run / "metrics.jsonl") if key in row] for run in folders]
            steps, values = (
                [row["step"] for row in curves[0]],
                list(zip(*[[r[key] for r in c] for c in curves], strict=True)),
            )
            (line,) = axes.plot(steps, list(map(fmean, values)), label=label)
            axes.fill_between(steps, list(map(min, values)), list(map(max, values)), alpha=0.2, color=line.get_color())
        axes.set(title={"eval/accuracy": "greedy", "eval/accuracy_sampled": "sampled"}[key], xlabel="step")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("held-out accuracy")
    figure.axes[0].legend(title=name.replace("_", " "), fontsize=8)
    figure.savefig(path, dpi=110)


def main(options: Options) -> None:
    """Runs what is missing, then draws and prints."""
    chosen = {name: COMPARISONS[name] for name in options.only}
    pairs = {(flags, seed) for settings in chosen.values() for flags in settings.values() for seed in options.seeds}
    wanted = sorted(pairs, key=lambda pair: (pair[1], pair[0]))
    with ThreadPoolExecutor(options.jobs) as pool:
        made = dict(zip(wanted, pool.map(lambda pair: run(options, *pair), wanted), strict=True))
    print(f"`{shlex.join(['uv', 'run', 'benchmarks/curves.py', *sys.argv[1:]])}`; base: `grpo.py {BASE}`\n")
    for name, settings in chosen.items():
        runs = {label: [made[flags, seed] for seed in options.seeds] for label, flags in settings.items()}
        draw(name, runs, Path(options.pictures or options.run_dir) / f"{name}.png")
        measured = {label: [final(run) for run in folders] for label, folders in runs.items()}
        columns = list(next(iter(measured.values()))[0])
        print(f"### {name.replace('_', ' ')}\n\n| | flags | {' | '.join(columns)} |\n|---|---|{'---|' * len(columns)}")
        for label, rows in measured.items():
            cells = [interval([row[column] for row in rows]) for column in columns]
            print(f"| {label} | `{settings[label]}` | {' | '.join(cells)} |".replace("``", ""))
        print()


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
