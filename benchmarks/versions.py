"""Seconds a step of grpo.py here and in another checkout, by whole runs in turn.

    git worktree add ../before COMMIT
    uv run benchmarks/versions.py ../before                              # natural answers of a few tokens, 32 x 8

Each side runs as a user would start it, with this environment's packages; the medians of time/rollout_s, time/reward_s
and time/update_s are of the steps after the first five. --flags go to the other checkout alone. Other work on the
machine slows both runs of a round, so their ratio is the figure. --cpu-time with OMP_NUM_THREADS=1 counts the time that
a run has a core to itself, which suffers less. Prints Markdown.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import tyro

HERE = Path(__file__).resolve().parent.parent
PHASES = ("rollout", "reward", "update")
# Runs a script whose clock shows the CPU time of its process.
CPU_TIME = """
import runpy, sys, time
time.perf_counter = time.process_time
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@dataclass(frozen=True)
class Options:
    """What to measure."""

    other: tyro.conf.Positional[Path]
    """The other checkout."""
    rounds: int = 2
    """Runs of each side, in turn."""
    steps: int = 45
    """Steps a run."""
    cpu_time: bool = False
    """Seconds of CPU time instead of the clock's."""
    flags: tuple[str, ...] = ()
    """Flags for the other checkout alone."""


def measure(checkout: Path, options: Options, flags: tuple[str, ...]) -> list[float]:
    """Median seconds of the three phases and of a whole step."""
    with tempfile.TemporaryDirectory() as folder:
        sizes = {"num-steps": options.steps, "prompts-per-step": 32, "num-generations": 8, "eval-samples": 32}
        command = [sys.executable, *(["-c", CPU_TIME] if options.cpu_time else []), str(checkout / "grpo.py")]
        command += ["--preset", "tiny", "--run-dir", folder]
        command += ["--eval-every", "0", "--save-every", "0", *flags]
        for name, value in sizes.items():
            command += [f"--{name}", str(value)]
        subprocess.run(command, check=True, capture_output=True, cwd=checkout)
        (log,) = Path(folder).glob("*/metrics.jsonl")
        rows = [json.loads(line) for line in log.read_text().splitlines()][6:]
    phases = [median(row[f"time/{phase}_s"] for row in rows) for phase in PHASES]
    return [*phases, median(sum(row[f"time/{phase}_s"] for phase in PHASES) for row in rows)]


def main(options: Options) -> None:
    """Prints a table with a row a run, and the ratios of the rounds."""
    steps: dict[str, list[float]] = {"other": [], "here": []}
    print("| | rollout, s | reward, s | update, s | step, s |\n|-|-|-|-|-|")
    for _ in range(options.rounds):
        for side, checkout, flags in (("other", options.other.resolve(), options.flags), ("here", HERE, ())):
            seconds = measure(checkout, options, flags)
            steps[side].append(seconds[-1])
            print(f"| {side} | {' | '.join(f'{value:.4f}' for value in seconds)} |", flush=True)
    ratios = [here / other for here, other in zip(steps["here"], steps["other"], strict=True)]
    print(f"\nSeconds a step, here over the other's: median {median(ratios):.3f}, ", end="")
    print(f"{min(ratios):.3f} to {max(ratios):.3f} in {len(ratios)} rounds")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
