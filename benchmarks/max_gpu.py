"""What grpo_overfit_max_gpu.py makes of a GPU: memory, utilization, tokens and seconds, by micro-batch size.

    uv run benchmarks/max_gpu.py --model FOLDER --dataset-path train.jsonl

The policy may have random weights of the right shape: it never stops by itself, so every completion has
--max-completion-length tokens. Rewards are coin tosses, so that every group has signal and the whole update is done.
Prints a Markdown table: medians over the steps, the first of which is left out.
"""

import hashlib
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import tyro

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = {
    "time/rollout_s": "rollout s", "time/update_s": "update s", "perf/completion_tokens_per_s": "tokens/s",
    "perf/peak_memory_gb": "peak GB", "gpu/memory_gb": "NVML GB", "gpu/utilization": "utilization %", "perf/mfu": "MFU",
}  # fmt: skip


@dataclass(frozen=True)
class Config:
    """What to measure."""

    model: str
    """Folder or id of the policy."""
    dataset_path: str
    """GSM8K's format."""
    preset: str = "qwen"
    """Of grpo_overfit_max_gpu.py."""
    micro_batch_sizes: tuple[str, ...] = ("auto", "32", "16", "8")
    """One run each."""
    max_completion_length: int = 512
    """Tokens of every completion."""
    num_steps: int = 4
    """Of each run."""


def coin(completions: list[Any], **_: Any) -> list[float]:
    """A reward that a text decides as a coin would."""
    return [float(hashlib.sha256(str(completion).encode()).digest()[0] % 2) for completion in completions]


def measure(config: Config, further: list[str], size: str, folder: Path) -> list[str]:
    """The table's row of one run."""
    command = [sys.executable, str(ROOT / "grpo_overfit_max_gpu.py"), "--preset", config.preset]
    command += [
        "--model",
        config.model,
        "--dataset-path",
        config.dataset_path,
        "--rewards",
        "benchmarks.max_gpu:coin=1",
    ]
    command += ["--max-completion-length", str(config.max_completion_length), "--micro-batch-size", size]
    command += ["--num-steps", str(config.num_steps), "--num-samples", "64", "--eval-samples", "8"]
    command += ["--eval-every", "0", "--target-accuracy", "1.0", "--run-dir", str(folder / size), *further]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 6:  # a coin's target is always missed
        raise SystemExit(f"exit code {done.returncode}: {done.stderr}")
    (run,) = (folder / size).iterdir()
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][1:]
    in_force = dict.fromkeys(str(step["perf/micro_batch_size"]) for step in steps)
    row = [size, " then ".join(in_force)]
    steps = steps[1:]
    row += [f"{median(s['time/rollout_s'] + s['time/reward_s'] + s['time/update_s'] for s in steps):.2f}"]
    return row + [f"{median(s[key] for s in steps):.4g}" if key in steps[0] else "-" for key in COLUMNS]


def main(config: Config, further: list[str]) -> None:
    """Runs and prints the rows as they come."""
    header = ["--micro-batch-size", "in force", "step s", *COLUMNS.values()]
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for size in config.micro_batch_sizes:
            print(f"| {' | '.join(measure(config, further, size, Path(folder)))} |", flush=True)


if __name__ == "__main__":
    arguments = sys.argv[1:]
    split = arguments.index("--") if "--" in arguments else len(arguments)
    main(tyro.cli(Config, args=arguments[:split], description=__doc__), arguments[split + 1 :])
