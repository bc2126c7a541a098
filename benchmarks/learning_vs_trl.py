"""Does grpo.py learn as well as TRL's GRPOTrainer? Same policy, problems, learning rates and steps, paired by seed.

    uv run benchmarks/learning_vs_trl.py                            # six seeds, about 25 minutes on two cores
    uv run benchmarks/learning_vs_trl.py --seeds 1 --steps 5        # smoke run
    uv run benchmarks/learning_vs_trl.py --preset smollm --seeds 2 --steps 10    # a real model, 40 minutes

A seed decides which problems each step has, the same on both sides, and what is sampled, which differs. TRL takes the
learning rate of each step from grpo.learning_rate; its own linear schedule is the same but for the warmup, which starts
from 0 where ours starts from 1 / warmup_steps. Ours is a run of grpo.py; both final policies are measured by its
evaluation of the held-out problems. Prints Markdown for RESULTS.md.
"""

import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

import torch
import tyro
from accelerate import PartialState
from transformers import AutoTokenizer
from vs_trl import Reward, grpo, make_trainer, model_path, print_header, print_settings, rewards, trl_settings

REWARD: Reward = rewards.accuracy_reward
# 97.5 %, of 1, 2, ... degrees of freedom
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
SAME = ("model", "learning_rate", "lr_schedule", "warmup_steps", "eval_samples", "prompts_per_step", "num_generations")


@dataclass(frozen=True)
class Options:
    """What to train."""

    preset: Literal["tiny", "smollm"] = "tiny"
    """smollm: that preset's settings; of the flags below only --seeds, --first-seed, --steps and --device count."""
    seeds: int = 6
    """Pairs of runs, at most 10, with seeds first_seed, first_seed + 1, ..."""
    first_seed: int = 1
    """So that two processes can share the work."""
    steps: int = 300
    """Of each run."""
    prompts: int = 32
    """Prompts a step."""
    generations: int = 8
    """Completions a prompt."""
    learning_rate: float = 1.5e-4
    """The highest, of AdamW."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"
    """After warmup."""
    warmup_steps: int = 20
    """Without them, the first steps of AdamW throw the policy back and both sides end lower and further apart."""
    eval_samples: int = 0
    """Held-out problems; 0: all."""
    model: str = "models/tiny"
    """Hugging Face id or folder."""
    device: Literal["cpu", "cuda"] = "cpu"
    """float32 on a CPU, bfloat16 on a GPU, there with float32 master weights on our side only."""


def run_ours(config: grpo.Config, device: torch.device) -> list[dict[str, Any]]:
    """The metrics of each step of a run of grpo.py."""
    with tempfile.TemporaryDirectory() as folder:
        flags: dict[str, Any] = {name: getattr(config, name) for name in (*SAME, "num_steps", "seed")}
        flags |= {"eval_every": 0, "save_every": 0, "run_dir": folder}
        words = [str(word) for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", value)]
        environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if device.type == "cpu" else {})
        command = [sys.executable, grpo.__file__, "--preset", config.preset, *words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        (path,) = Path(folder).glob("*/metrics.jsonl")
        return [json.loads(line) for line in path.read_text().splitlines()]


def run_pair(config: grpo.Config, device: torch.device) -> dict[str, float]:
    """Held-out greedy accuracy before training, after ours and after TRL's, and the seconds that either trained."""
    tokenizer, (train, _, _) = AutoTokenizer.from_pretrained(model_path(config)), grpo.load_problems(config)
    steps, rates = range(1, config.num_steps + 1), []

    def rate(step: int) -> float:
        return grpo.learning_rate(step, config.num_steps, config)

    metrics = run_ours(config, device)
    result = {"before": metrics[0]["eval/accuracy"], "ours": metrics[-1]["eval/accuracy"]}
    result["ours_s"] = sum(m[f"time/{phase}_s"] for m in metrics[1:] for phase in ("rollout", "reward", "update"))

    problems = [grpo.problems_of_step(train, step, config) for step in steps]
    settings = trl_settings(config, device, config.num_steps)
    trainer = make_trainer(config, settings, REWARD, tokenizer, device, problems)
    optimizer = trainer.create_optimizer()
    optimizer.register_step_pre_hook(lambda *_: rates.append(optimizer.param_groups[0]["lr"]))
    factor = lambda done: rate(done + 1) / config.learning_rate  # noqa: E731
    trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    start = time.perf_counter()
    trainer.train()
    result["trl_s"] = time.perf_counter() - start
    same = all(math.isclose(a, rate(step)) for a, step in zip(rates, steps, strict=True))
    assert same, "TRL had other learning rates"
    with tempfile.TemporaryDirectory() as folder:  # TRL's final weights, measured by the evaluation before a first step
        trainer.model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        metrics = run_ours(dataclasses.replace(config, model=folder, num_steps=1), device)
    return result | {"trl": metrics[0]["eval/accuracy"]}


def main(options: Options) -> None:
    """Prints a line for each seed, then the mean difference and its 95 % t-interval."""
    device = torch.device(options.device)
    print_header(device)
    PartialState(cpu=device.type == "cpu")
    changes: dict[str, Any] = {name: getattr(options, name) for name in SAME if hasattr(options, name)}
    changes |= {"num_steps": options.steps, "prompts_per_step": options.prompts, "num_generations": options.generations}
    if options.preset == "smollm":
        changes = {"num_steps": options.steps}
    config = dataclasses.replace(grpo.PRESETS[options.preset], **changes)
    print("Held-out greedy accuracy.\n")
    print("| seed | before | grpo.py | TRL | difference | grpo.py, s | TRL, s |\n|---|" + "--:|" * 6)
    differences = []
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        pair = run_pair(dataclasses.replace(config, seed=seed), device)
        differences.append(pair["ours"] - pair["trl"])
        cells = "{before:.4f} | {ours:.4f} | {trl:.4f} | {difference:+.4f} | {ours_s:.0f} | {trl_s:.0f}"
        print(f"| {seed} | {cells.format(difference=differences[-1], **pair)} |", flush=True)
    print(f"\n**Mean difference (grpo.py less TRL): {fmean(differences):+.4f}", end="")
    if len(differences) > 1:
        half = T_QUANTILES[len(differences) - 2] * stdev(differences) / math.sqrt(len(differences))
        low, high = fmean(differences) - half, fmean(differences) + half
        print(f", 95 % t-interval {low:+.4f} to {high:+.4f}**. Contains 0: {low <= 0 <= high}; ", end="")
        print(f"reaches at most 0.03 either way: {max(-low, high) <= 0.03}.\n")
    else:
        print("** (an interval needs two seeds).\n")
    print_settings({"grpo.py": dataclasses.asdict(config), "GRPOConfig": trl_settings(config, device, options.steps)})


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
