"""Seconds a step of grpo.py against TRL's GRPOTrainer: the same work, one process, in alternation.

    uv run benchmarks/vs_trl.py                        # natural answers of a few tokens
    uv run benchmarks/vs_trl.py --force-length 64      # every completion has 64 tokens, every group carries signal
    uv run benchmarks/vs_trl.py --growth length --steps 3 --warmup 2

Both sides train the same policy on the same prompts in the same order. After each step of TRL's trainer a callback
makes one step of ours; either clock stands still while the other side runs. TRL is set up as fast as it goes without
changing the work; `trl_settings` says how. Prints Markdown for RESULTS.md.
"""

import ctypes
import dataclasses
import datetime
import importlib.metadata
import json
import platform
import random
import re
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any, Literal

import psutil
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import grpo
import rewards

GROWTH = {
    "prompts": ("prompts_per_step", (8, 16, 32, 64, 128, 256)),
    "generations": ("num_generations", (2, 4, 8, 16, 32, 64)),
    "length": ("max_completion_length", (8, 16, 32, 64, 128, 256)),
}


@dataclass(frozen=True)
class Options:
    """What to measure."""

    force_length: int = 0
    """Tokens of every completion, on both sides; 0: until the stop token, at most max_completion_length."""
    growth: Literal["", "prompts", "generations", "length"] = ""
    """A table of seconds a step against this; length is always forced."""
    prompts: int = 32
    """Prompts a step."""
    generations: int = 8
    """Completions a prompt."""
    max_completion_length: int = 12
    """Tokens, at natural length."""
    steps: int = 10
    """Measured steps of each side."""
    warmup: int = 3
    """Steps before these, at least 2, not timed: all but the first measure the memory."""
    micro_batch_size: int = 0
    """Completions a forward pass of the update, on both sides; 0: all at once."""
    learning_rate: float = 1e-6
    """So small that both policies stay as they are."""
    model: str = "tiny_policy"
    """Hugging Face id or folder."""
    device: Literal["cpu", "cuda"] = "cpu"
    """float32 on the CPU, bfloat16 on a GPU."""
    threads: int = 0
    """Of torch, for both sides; 0: its default."""
    seed: int = 1
    """Of prompt order and sampling."""


def forced_reward(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """Unequal within every group, and never at its mean, so that no completion is without signal."""
    return [row % 2 + sum(ids) % 97 / 1000 for row, ids in enumerate(completion_ids)]


class Side:
    """One side's reward function, which keeps count, and its clock."""

    def __init__(self, function: Callable[..., list[float]], device: torch.device, warmup: int) -> None:
        self.function, self.device, self.warmup = function, device, warmup
        self.seconds: list[float] = []  # of each step
        self.rewards: list[list[float]] = []  # of each completion of each step
        self.lengths: list[list[int]] = []
        self.memory = 0  # most bytes of a step above the level before it

    def reward(self, completion_ids: list[list[int]], **columns: Any) -> list[float]:
        self.lengths.append([len(ids) for ids in completion_ids])
        self.rewards.append(self.function(completion_ids=completion_ids, **columns))
        return self.rewards[-1]

    def start(self) -> None:
        if len(self.seconds) < self.warmup:
            self.measure_memory()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.started = time.perf_counter()

    def stop(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds.append(time.perf_counter() - self.started)
        if len(self.seconds) <= self.warmup:
            used = self.read_memory()
            if len(self.seconds) > 1:  # the first step allocates what stays, such as the optimizer's state
                self.memory = max(self.memory, used)

    def measure_memory(self) -> None:
        """Sets read_memory to a function that gives the most bytes in use from now on, less those in use now."""
        if self.device.type == "cuda":
            before = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self.read_memory = lambda: torch.cuda.max_memory_allocated(self.device) - before
            return
        getattr(ctypes.CDLL(None), "malloc_trim", int)(0)  # what the other side freed goes back to the system
        process, stopped = psutil.Process(), threading.Event()
        levels = [process.memory_info().rss]

        def sample() -> None:
            while not stopped.wait(0.001):
                levels.append(process.memory_info().rss)

        def read() -> int:
            stopped.set()
            thread.join()
            return max(levels) - levels[0]

        thread = threading.Thread(target=sample, daemon=True)
        thread.start()
        self.read_memory = read


def trl_settings(config: grpo.Config, device: torch.device, num_steps: int, forced: bool) -> dict[str, Any]:
    """What GRPOConfig gets: our work, and everything off that costs time without being part of it."""
    rows = config.prompts_per_step * config.num_generations
    size = min(config.micro_batch_size, rows)
    same_work: dict[str, Any] = {
        "num_generations": config.num_generations, "max_completion_length": config.max_completion_length,
        "per_device_train_batch_size": size, "gradient_accumulation_steps": rows // size,
        "steps_per_generation": rows // size, "max_steps": num_steps, "shuffle_dataset": False, "seed": config.seed,
        "temperature": config.temperature, "top_p": 1.0, "top_k": 0,
        "learning_rate": config.learning_rate, "lr_scheduler_type": "constant", "warmup_steps": 0,
        "weight_decay": config.weight_decay, "max_grad_norm": config.max_grad_norm,
        "loss_type": "dr_grpo", "scale_rewards": "none", "beta": 0.0, "epsilon": config.epsilon, "num_iterations": 1,
        "reward_weights": [2.0], "disable_dropout": True, "use_cpu": device.type == "cpu",
    }  # fmt: skip
    if forced:
        # An id that no token has: generation works as ever, but nothing ends it.
        same_work["generation_kwargs"] = {"eos_token_id": 10**9}
    return same_work | {
        "bf16": False,  # no autocast: the policy is float32 on the CPU and bfloat16 on a GPU, like ours
        "gradient_checkpointing": False, "optim": "adamw_torch_fused", "dataloader_num_workers": 0,
        "dataloader_pin_memory": False, "logging_strategy": "no", "logging_nan_inf_filter": False,
        "log_completions": False, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
    }  # fmt: skip


def make_trainer(
    config: grpo.Config, reward: Callable[..., list[float]], tokenizer: Any, device: torch.device,
    steps: list[grpo.Problems], forced: bool = False, after_step: Callable[[], None] = lambda: None,
) -> Any:  # fmt: skip
    """GRPOTrainer over the problems of each step; after_step is called when a step is done.

    The prompts are texts with the chat template already applied: TRL would render it for every completion.
    """
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    class AfterStep(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            after_step()

    problems = [problem for step in steps for problem in step]
    ids = grpo.tokenize_prompts(tokenizer, problems, config)
    texts = tokenizer.batch_decode(ids)
    assert tokenizer(texts).input_ids == ids, "TRL would see other prompts"
    dataset = Dataset.from_list([{"prompt": t, **p} for t, p in zip(texts, problems, strict=True)])
    trainer = GRPOTrainer(
        model=grpo.load_policy(config, device), reward_funcs=[reward], train_dataset=dataset,
        processing_class=tokenizer, callbacks=[AfterStep()],
        args=GRPOConfig(tempfile.mkdtemp(), **trl_settings(config, device, len(steps), forced)),
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    if forced:
        trainer.eos_token_ids = [10**9]  # what it takes for the end when it makes the completion mask
    return trainer


def compare(config: grpo.Config, options: Options, force_length: int) -> tuple[Side, Side, dict[str, Any]]:
    """(ours, TRL's, what else to report) after warmup + steps steps of each, in alternation."""
    device, forced = torch.device(options.device), force_length > 0
    function = forced_reward if forced else rewards.accuracy_reward
    ours, trl = (Side(function, device, options.warmup) for _ in range(2))
    tokenizer = grpo.load_tokenizer(config)
    train, _, _ = grpo.load_problems(config)
    learner = grpo.make_learner(config, {"reward": (ours.reward, 2.0)}, tokenizer, device)
    if forced:
        learner.eos_ids = []
    num_steps, metrics = options.warmup + options.steps, []

    def our_step() -> None:
        trl.stop()
        ours.start()
        metrics.append(grpo.train_step(learner, train, len(metrics) + 1, num_steps)[0])
        ours.stop()
        trl.start()

    steps = [grpo.problems_of_step(train, step, config) for step in range(1, num_steps + 1)]
    trainer = make_trainer(config, trl.reward, tokenizer, device, steps, forced, our_step)
    trl.start()
    trainer.train()
    trl.read_memory()
    for side in (ours, trl):
        assert len(side.seconds) == num_steps
        if forced:
            assert {length for step in side.lengths for length in step} == {force_length}, "a completion was cut short"
            assert all(signal(step, config.num_generations) == 1 for step in side.rewards), "a group without signal"
    split = {name: median(m[f"time/{name}_s"] for m in metrics[options.warmup :]) for name in SPLIT}
    settings = {
        "grpo.py": dataclasses.asdict(config) | {"optimizer": learner.optimizer.defaults},
        "GRPOConfig": trl_settings(config, device, num_steps, forced),
        "GRPOConfig, resolved": {k: v for k, v in trainer.args.to_dict().items() if not k.endswith("_dir")},
        "TRL's generation": trainer.generation_config.to_dict(),
        "TRL's optimizer": trainer.optimizer.optimizer.defaults,
    }
    return ours, trl, {"split": split, "settings": settings}


SPLIT = ("rollout", "reward", "update")


def signal(step: list[float], num_generations: int) -> float:
    """Share of completions with an advantage other than zero."""
    return grpo.group_advantages(torch.tensor(step), num_generations).ne(0).float().mean().item()


def ratio_interval(ours: list[float], trl: list[float]) -> tuple[float, float]:
    """95 % bootstrap interval of the ratio of medians, over pairs of neighbouring steps."""
    pairs, draw = list(zip(ours, trl, strict=True)), random.Random(0)
    samples = [zip(*draw.choices(pairs, k=len(pairs)), strict=True) for _ in range(2000)]
    ratios = sorted(median(b) / median(a) for a, b in samples)
    return ratios[50], ratios[-51]


def header(device: torch.device) -> str:
    """Command, machine, versions: what a reader needs to repeat it."""
    root = Path(__file__).resolve().parent.parent
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    cpuinfo = Path("/proc/cpuinfo")
    cpu = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    names = ("torch", "transformers", "trl", "accelerate", "tokenizers")
    lines = {
        "Command": f"`uv run benchmarks/{Path(sys.argv[0]).name} {shlex.join(sys.argv[1:])}`".replace(" `", "`"),
        "Commit": subprocess.run(git, capture_output=True, text=True).stdout.strip(),
        "Date": str(datetime.date.today()),
        "Versions": f"Python {platform.python_version()}, "
        + ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names),
        "CPU": f"{cpu[0] if cpu else platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
    }
    if device.type == "cuda":
        lines["GPU"] = torch.cuda.get_device_name(device)
    return "\n".join(f"- {name}: {value}" for name, value in lines.items()) + "\n"


def print_comparison(config: grpo.Config, options: Options) -> None:
    """The table of one comparison, our split, and every setting."""
    ours, trl, report = compare(config, options, options.force_length)
    length = f"forced to {options.force_length} tokens" if options.force_length else "natural"
    print(f"{config.prompts_per_step} prompts x {config.num_generations} generations, length {length}.", end=" ")
    print(f"{options.steps} steps of each side after {options.warmup} of warmup.\n")
    rows: dict[str, list[str]] = {}
    for side in (ours, trl):
        seconds, lengths, rewarded = (x[options.warmup :] for x in (side.seconds, side.lengths, side.rewards))
        tokens, means = [sum(step) for step in lengths], [fmean(step) for step in rewarded]
        half = len(means) // 2
        cells = {
            "seconds a step, median": f"{median(seconds):.4f}",
            "seconds a step, min to max": f"{min(seconds):.4f} to {max(seconds):.4f}",
            "completion tokens/s": f"{sum(tokens) / sum(seconds):,.0f}",
            "completion tokens, all steps": f"{sum(tokens):,}",
            "completion length, mean": f"{fmean(map(fmean, lengths)):.2f}",
            "completions with signal": f"{fmean(signal(s, config.num_generations) for s in rewarded):.1%}",
            "reward, first and second half": f"{fmean(means[:half] or means):.3f}, {fmean(means[half:]):.3f}",
            "peak memory of a step": f"{side.memory / 2**20:,.0f} MiB",
        }
        for name, cell in cells.items():
            rows.setdefault(name, []).append(cell)
    print("| | grpo.py | TRL |\n|---|---:|---:|")
    print("\n".join(f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()))
    pairs = ours.seconds[options.warmup :], trl.seconds[options.warmup :]
    low, high = ratio_interval(*pairs)
    print(f"\n**Ratio of medians: {median(pairs[1]) / median(pairs[0]):.2f}** (95 % interval {low:.2f} to {high:.2f}).")
    parts = ", ".join(f"{name} {value:.4f} s" for name, value in report["split"].items())
    print(f"Our step: {parts} (medians). Peak memory is above the level before the step, in warmup.\n")
    for name, values in report["settings"].items():
        text = json.dumps(values, default=str)
        print(f"<details><summary>Settings: {name}</summary>\n\n```json\n{text}\n```\n\n</details>\n")


def print_growth(config: grpo.Config, options: Options) -> None:
    """Seconds a step of both sides for each value of one setting."""
    name, values = GROWTH[options.growth]
    print(f"Median of {options.steps} steps after {options.warmup} of warmup.\n")
    print(
        f"| {name} | completions | tokens a step, ours / TRL | grpo.py, s | TRL, s | ratio |\n|--:|--:|--:|--:|--:|--:|"
    )
    for value in values:
        changed = dataclasses.replace(config, **{name: value})
        changed = dataclasses.replace(changed, micro_batch_size=micro_batch_size(changed, options))
        ours, trl, _ = compare(changed, options, value if options.growth == "length" else options.force_length)
        rows = changed.prompts_per_step * changed.num_generations
        tokens = " / ".join(f"{fmean(map(sum, side.lengths[options.warmup :])):,.0f}" for side in (ours, trl))
        a, b = (median(side.seconds[options.warmup :]) for side in (ours, trl))
        print(f"| {value} | {rows} | {tokens} | {a:.3f} | {b:.3f} | {b / a:.2f} |", flush=True)


def micro_batch_size(config: grpo.Config, options: Options) -> int:
    return options.micro_batch_size or config.prompts_per_step * config.num_generations


def main(options: Options) -> None:
    """Prints header and result."""
    from transformers import logging

    assert options.warmup >= 2, "the memory is measured in the second step of warmup and those behind it"
    logging.set_verbosity_error()
    if options.threads:
        torch.set_num_threads(options.threads)
    config = grpo.Config(
        model=options.model, prompts_per_step=options.prompts, num_generations=options.generations,
        max_completion_length=options.force_length or options.max_completion_length, seed=options.seed,
        learning_rate=options.learning_rate,
    )  # fmt: skip
    config = dataclasses.replace(config, micro_batch_size=micro_batch_size(config, options))
    print(header(torch.device(options.device)))
    (print_growth if options.growth else print_comparison)(config, options)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
