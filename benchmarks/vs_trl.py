"""Seconds a step of grpo.py against TRL's GRPOTrainer: the same work, one process, in alternation.

    uv run benchmarks/vs_trl.py                        # natural answers of a few tokens
    uv run benchmarks/vs_trl.py --force-length 64      # every completion has 64 tokens, every group carries signal
    uv run benchmarks/vs_trl.py --growth length --steps 3 --warmup 2

On a GPU, with a folder of Qwen2-0.5B's shape and GSM8K's train.jsonl:

    uv run benchmarks/vs_trl.py --device cuda --model FOLDER --dataset-path train.jsonl --prompt-tokens 128 \\
        --prompts 64 --generations 8 --force-length 256 --steps 5 --trl-generation generate continuous_batching \\
        --trl-cache dynamic static --trl-cb-config '{}' '{"use_cuda_graph": [false, true]}' '{"use_cuda_graph": false}'

Both sides train the same policy on the same prompts in the same order. Ours is grpo.main, whole, with all that it logs;
TRL's trainer runs in a greenlet of the same thread (a second thread would have a pool of OpenMP threads of its own, and
each pool slows the other). They take turns, a step each, and either clock stands still while the other side runs.
Evaluations and checkpoints are outside of all timed steps. TRL is set up as fast as it goes without changing the work:
`trl_settings` and `make_trainer` say how. Each cache and each configuration named is compared for itself: the lowest
ratio of a way is the one to quote. Continuous batching at its fastest needs flash-attn (or kernels): without, it
attends to all requests with a dense mask, which grows with their square. Prints Markdown for RESULTS.md.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import datetime
import gc
import importlib.metadata
import json
import math
import platform
import random
import re
import shlex
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any, Literal

import greenlet
import psutil
import torch
import tyro
from accelerate import PartialState
from torch.optim.optimizer import register_optimizer_step_pre_hook

# Read before all other options: it says what is imported.
ROOT = Path(__file__).resolve().parent.parent
parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
parser.add_argument("--ours", default=str(ROOT))
sys.path.insert(0, parser.parse_known_args()[0].ours)
import grpo  # noqa: E402
import rewards  # noqa: E402

Rows = list[dict[str, Any]]
Reward = Callable[..., Any]  # TRL's signature
Way = tuple[str, dict[str, Any]]  # in which TRL generates: name, and GRPOConfig's settings
CB_CONFIG = "transformers_continuous_batching_config"
REWARD_WEIGHT = 2.0  # as in the tiny preset
NO_TOKEN = 10**9  # as stop token: an id that no token has, so that generation works as ever but nothing ends it
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
    """Instead of one comparison a table of seconds a step against this; length is always forced."""
    prompts: int = 32
    """Prompts a step."""
    generations: int = 8
    """Completions a prompt."""
    max_completion_length: int = 12
    """Tokens, at natural length."""
    steps: int = 10
    """Timed steps of each side."""
    warmup: int = 3
    """Steps of each side before these, at least 2, on a GPU 3; all but the first measure the memory."""
    micro_batch_size: int = 0
    """Completions a forward pass of our update; 0: 1024 on a CPU, 64 on a GPU."""
    trl_batch_size: int = 0
    """Completions a forward pass of TRL's update. 0: all on a CPU, its fastest where memory allows; 64 on a GPU, about
    40 GB of activations at Qwen2-0.5B's shape and 384 tokens (logits TRL computes in tiles): try 128 where it fits."""
    learning_rate: float = 1e-6
    """So small that both policies stay as they are."""
    trl_compile: bool = True
    """TRL's torch_compile: a little faster in the update, once it has compiled in warmup; needs a C++ compiler."""
    trl_generation: tuple[Literal["generate", "continuous_batching"], ...] = ("generate",)
    """How TRL generates; of several, each is compared."""
    trl_cache: tuple[Literal["dynamic", "static", "static_compiled"], ...] = ("dynamic",)
    """Of `generate`, each compared. static is not compiled, which TRL forbids; static_compiled undoes that."""
    trl_cb_config: tuple[str, ...] = ("{}",)
    """Of continuous batching: GRPOConfig's transformers_continuous_batching_config as JSON, each compared. The rest is
    as in `batching_config`, and as transformers chooses (with flash-attn CUDA graphs, captured anew in every step, and
    asynchronous batches). Worth a try: use_cuda_graph, use_async_batching, max_batch_tokens, max_requests_per_batch."""
    trl_attention: str = "sdpa"
    """TRL's attention, such as sdpa (its default) or flash_attention_2; continuous batching itself changes to flash."""
    model: str = "models/tiny"
    """Hugging Face id or folder."""
    system_prompt: str | None = None
    """What the policy is told before each question."""
    temperature: float = 1.0
    """Of sampling, on both sides."""
    dataset_path: str = ""
    """GSM8K's JSONL file, whose questions are the prompts; empty: arithmetic."""
    prompt_tokens: int = 0
    """If above 0: only problems whose prompt has about so many tokens, an eighth more or less."""
    device: Literal["cpu", "cuda"] = "cpu"
    """float32 on a CPU, bfloat16 on a GPU. OMP_NUM_THREADS sets the threads of both sides."""
    trim: bool = False
    """Give freed memory back to the system before every step, as this benchmark once did: it makes both sides fault
    their pages in anew, 15 % of our step and 11 % of TRL's. Only to compare with figures from then."""
    ours: str = str(ROOT)
    """The folder from which grpo.py and rewards.py are taken: another checkout with the same interface."""


def trl_settings(
    config: grpo.Config, device: torch.device, num_steps: int, *, batch_size: int = 10**6, forced: bool = False,
    compiled: bool = False, way: dict[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """What GRPOConfig gets: the work of `config`, and everything off that costs time without being part of it.

    way: settings of its way of generating. Each takes eos_token_id from generation_kwargs, and with top_k 0 and top_p 1
    samples from the whole distribution, as ours does.
    """
    rows = config.prompts_per_step * config.num_generations
    size = min(batch_size, rows)
    assert rows % size == 0, f"the batch size must divide the {rows} completions of a step"
    same = "num_generations max_completion_length temperature learning_rate weight_decay max_grad_norm"
    same += " num_iterations epsilon seed"
    return {name: getattr(config, name) for name in same.split()} | {
        "per_device_train_batch_size": size, "gradient_accumulation_steps": rows // size,
        "steps_per_generation": rows // size, "max_steps": num_steps, "shuffle_dataset": False,
        "top_p": 1.0, "top_k": 0, "loss_type": "dr_grpo", "scale_rewards": "none", "beta": 0.0,
        "reward_weights": [REWARD_WEIGHT], "lr_scheduler_type": "constant", "warmup_steps": 0, "disable_dropout": True,
        "generation_kwargs": {"eos_token_id": NO_TOKEN} if forced else None,
        "use_cpu": device.type == "cpu", "torch_compile": compiled,
        "bf16": False,  # no autocast: the policy itself is float32 on a CPU and bfloat16 on a GPU, like ours
        "gradient_checkpointing": False, "optim": "adamw_torch_fused",
        "dataloader_num_workers": 0, "dataloader_pin_memory": False,
        "logging_strategy": "no", "logging_nan_inf_filter": False, "log_completions": False,
        "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
        **(way or {}),
    }  # fmt: skip


def ways_of_trl(options: Options) -> list[Way]:
    """Those to compare with."""
    ways: list[Way] = []
    for cache in options.trl_cache if "generate" in options.trl_generation else ():
        ways.append((f"generate, {cache} cache", {"cache_implementation": None if cache == "dynamic" else "static"}))
    for text in options.trl_cb_config if "continuous_batching" in options.trl_generation else ():
        settings: dict[str, Any] = {"use_transformers_continuous_batching": True}
        ways.append((f"continuous batching {text}", settings | {CB_CONFIG: json.loads(text)}))
    return ways


def has_flash(given: dict[str, Any], options: Options) -> bool:
    """Whether continuous batching will use flash-attn: the rule of transformers' switch_to_cb_friendly_attn."""
    from transformers.utils import import_utils as found

    there = found.is_flash_attn_2_available, found.is_flash_attn_3_available
    switched = given.get("auto_switch_to_flash", True) and any(f(kernels_fallback_ok=True) for f in there)
    return options.device == "cuda" and ("flash" in options.trl_attention or switched)


def batching_config(given: dict[str, Any], options: Options, rows: int, tokens: int) -> dict[str, Any]:
    """The configuration with a KV cache that holds all rows of so many tokens at once and a quarter more, so that
    transformers' safety margin holds no prompt back. Left alone it takes half of the memory, zeroed in every step.
    Without flash-attn there is a mask of batch tokens x cache, which is to stay small.
    """
    page, batch_tokens = (256, 8192) if has_flash(given, options) else (32, 1024)
    blocks = math.ceil(1.25 * rows * math.ceil(tokens / given.get("page_size", page)))
    return {"page_size": page, "num_blocks": blocks, "max_batch_tokens": batch_tokens} | given


def make_trainer(
    config: grpo.Config, settings: dict[str, Any], reward: Reward, tokenizer: Any, device: torch.device,
    steps: list[Rows], after_step: Callable[[], None] = lambda: None, attention: str = "sdpa",
) -> Any:  # fmt: skip
    """GRPOTrainer with `settings` over the problems of each step; after_step is called when a step is done.

    The prompts are texts to which the chat template is already applied: TRL would render it for every completion.
    """
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    class AfterStep(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            after_step()

    problems = [problem for step in steps for problem in step]
    prompts = grpo.tokenize_prompts(tokenizer, problems, config)
    texts = tokenizer.batch_decode(prompts)
    assert tokenizer(texts).input_ids == prompts, "TRL would see other prompts"
    policy = grpo.load_policy(config, device)
    policy.set_attn_implementation(attention)
    trainer = GRPOTrainer(
        model=policy, reward_funcs=[reward], processing_class=tokenizer,
        train_dataset=Dataset.from_list([{"prompt": t} | p for t, p in zip(texts, problems, strict=True)]),
        args=GRPOConfig(tempfile.gettempdir(), **settings), callbacks=[AfterStep()],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    if settings["generation_kwargs"]:
        trainer.eos_token_ids = [NO_TOKEN]  # TRL's completion mask ends at these
    return trainer


def trim_memory() -> None:
    """Gives what was freed back to the system (glibc), so that what a step takes anew can be seen."""
    getattr(ctypes.CDLL(None), "malloc_trim", int)(0)


def allocated(device: torch.device) -> int:
    """Bytes in tensors on a GPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def compiled_graphs() -> int:
    """How many graphs torch.compile has made."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def watch_memory(device: torch.device) -> Callable[[], int]:
    """Starts to watch; the function returned stops, and gives the most bytes in use since, less those at the start."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        start = allocated(device)
        return lambda: torch.cuda.max_memory_allocated(device) - start
    process, stopped = psutil.Process(), threading.Event()
    resident = [process.memory_info().rss]

    def sample() -> None:
        while not stopped.wait(0.001):
            resident.append(process.memory_info().rss)

    def stop() -> int:
        stopped.set()
        thread.join()
        return max(resident) - resident[0]

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    return stop


class Side:
    """One side's clock, and its reward function, which takes down what came by."""

    def __init__(self, function: Reward, device: torch.device, warmup: int, trim: bool) -> None:
        self.function, self.device, self.warmup, self.trim = function, device, warmup, trim
        self.seconds: list[float] = []  # of each step
        self.rewards: list[list[float]] = []  # of each step, of each completion
        self.lengths: list[list[int]] = []
        self.memory = 0  # bytes
        self.held = 0  # bytes on a GPU that are this side's own and stay from step to step
        self.compiled = 0  # graphs of torch.compile made in timed steps

    def reward(self, completion_ids: list[list[int]], **columns: Any) -> Any:
        self.lengths.append([len(ids) for ids in completion_ids])
        self.rewards.append(self.function(completion_ids=completion_ids, **columns))
        return self.rewards[-1]

    def clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def start(self) -> None:
        # Not in the first step, which allocates what stays, such as the optimizer's state.
        watching = 1 <= len(self.seconds) < self.warmup
        if watching or self.trim:
            trim_memory()
        self.watch = watch_memory(self.device) if watching else None
        self.level, self.graphs = allocated(self.device), compiled_graphs()
        self.started = self.clock()

    def stop(self) -> None:
        self.seconds.append(self.clock() - self.started)
        if self.watch:
            self.memory = max(self.memory, self.held + self.watch())
        self.held += allocated(self.device) - self.level
        self.compiled += (compiled_graphs() - self.graphs) * (len(self.seconds) > self.warmup)


def model_path(config: grpo.Config) -> str:
    """The folder of config.model that lies beside grpo.py, if there is one: as grpo.py finds it."""
    beside = Path(grpo.__file__).resolve().parent / config.model
    return str(beside) if beside.is_dir() else config.model


def forced_reward(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """Unequal within every group, and never equal to its mean, so that every completion carries signal."""
    return [row % 2 + sum(ids) % 97 / 1000 for row, ids in enumerate(completion_ids)]


def with_signal(step_rewards: list[float], num_generations: int) -> float:
    """Share of completions with an advantage other than zero."""
    return grpo.group_advantages(torch.tensor(step_rewards), num_generations).ne(0).float().mean().item()


class Ended(BaseException):
    """Ends a side where it stands. No Exception: grpo.main would save the run."""


@contextlib.contextmanager
def patched(module: Any, **functions: Any) -> Iterator[None]:
    """Puts functions in the place of a module's own."""
    own = {name: getattr(module, name) for name in functions}
    vars(module).update(functions)
    try:
        yield
    finally:
        vars(module).update(own)


def compare(
    config: grpo.Config, options: Options, force_length: int, way: Way
) -> tuple[Side, Side, dict[str, float], Any]:
    """(ours, TRL's, our split in seconds, all settings) after warmup + steps steps of each, in alternation."""
    gc.unfreeze()
    gc.collect()  # what the comparison before has left, and what was compiled for it
    torch.compiler.reset()
    device, forced, num_steps = torch.device(options.device), force_length > 0, options.warmup + options.steps
    name, added = way
    batching, size = CB_CONFIG in added, options.trl_batch_size or (64 if device.type == "cuda" else 10**6)
    torch.cuda.empty_cache()
    function = forced_reward if forced else rewards.accuracy_reward
    ours, trl = (Side(function, device, options.warmup, options.trim) for _ in range(2))
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path(config))
    train, held_out, _ = grpo.load_problems(config)
    if options.prompt_tokens:
        wanted = options.prompt_tokens
        pairs = zip(train, grpo.tokenize_prompts(tokenizer, train, config), strict=True)
        train = [problem for problem, prompt in pairs if abs(len(prompt) - wanted) <= wanted // 8]
        assert train, f"no prompt has about {wanted} tokens"
    steps = [grpo.problems_of_step(train, step, config) for step in range(1, num_steps + 1)]
    prompts = grpo.tokenize_prompts(tokenizer, [problem for step in steps for problem in step], config)
    longest = max(prompts, key=len)
    if batching:
        rows, tokens = config.prompts_per_step * config.num_generations, len(longest) + config.max_completion_length
        added = {**added, CB_CONFIG: batching_config(added[CB_CONFIG], options, rows, tokens)}
    how: dict[str, Any] = {"batch_size": size, "forced": forced, "compiled": options.trl_compile, "way": added}
    trl_args, level = trl_settings(config, device, num_steps, **how), allocated(device)

    def after_trl_step() -> None:
        trl.stop()
        trl_side.parent.switch()
        trl.start()

    trainer = make_trainer(
        config, trl_args, trl.reward, tokenizer, device, steps, after_trl_step, options.trl_attention
    )
    trainer.generation_config.disable_compile = "static_compiled" not in name
    trl.held = allocated(device) - level

    def train_trl() -> None:
        trl.start()
        trainer.train()

    problems_of_step, rollout, level = grpo.problems_of_step, grpo.rollout, allocated(device)

    def begin_step(problems: Rows, step: int, config: grpo.Config) -> Rows:
        """grpo.main calls it once at the beginning of a step, by which the one before has been logged: TRL's turn."""
        if step == 1:
            ours.held = allocated(device) - level
            ours.rewards.clear()  # of the evaluation before training
            ours.lengths.clear()
        else:
            ours.stop()
        left = time.perf_counter()
        if batching:  # it empties caches and collects garbage in every step, of which none shall be ours
            torch.cuda.empty_cache()
            gc.collect()
            gc.freeze()
        if step > num_steps:
            raise Ended
        trl_side.switch()
        ours.start()
        away.append(time.perf_counter() - left)
        return problems_of_step(problems, step, config)

    # In grpo.main's own measurements, of rollout, reward and update, TRL's turns have taken no time either.
    own_time = types.SimpleNamespace(**vars(time) | {"perf_counter": lambda: time.perf_counter() - sum(away)})
    away: list[float] = []  # seconds of each turn
    ours_args = {
        "time": own_time,
        "load_problems": lambda _: (train, held_out, []),
        "load_rewards": lambda *_: {"reward": (ours.reward, REWARD_WEIGHT)},
        "problems_of_step": begin_step,
        "rollout": lambda *args, **how: rollout(*args, **(how | ({"eos_ids": []} if forced else {}))),
    }
    optimizers: dict[str, Any] = {}

    def take_down(optimizer: Any, *_: Any) -> None:
        optimizers["TRL's AdamW" if greenlet.getcurrent() is trl_side else "Our AdamW"] = optimizer

    watched = register_optimizer_step_pre_hook(take_down)
    trl_side = greenlet.greenlet(train_trl)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr), patched(grpo, **ours_args):
        # One step more than is timed: after the last one of a run comes an evaluation.
        run = dataclasses.replace(config, num_steps=num_steps + 1, eval_every=0, save_every=0, run_dir=folder)
        try:
            grpo.main(run)
        except Ended:
            pass
        except SystemExit as ended:
            raise RuntimeError(f"grpo.py ended with exit code {ended.code}") from ended
        finally:
            watched.remove()
        (metrics_file,) = Path(folder).glob("*/metrics.jsonl")
        metrics = [json.loads(line) for line in metrics_file.read_text().splitlines()][1 + options.warmup :]
    for side in (ours, trl):
        assert len(side.seconds) == len(side.lengths) == num_steps
        if forced:
            assert {length for step in side.lengths for length in step} == {force_length}, "not the length forced"
            assert all(with_signal(step, config.num_generations) == 1 for step in side.rewards), "no signal"
        taken_down: tuple[list[Any], ...] = (side.seconds, side.rewards, side.lengths)
        for values in taken_down:
            del values[: options.warmup]
    split = {k: median(m[f"time/{k}_s"] for m in metrics) for k in ("rollout", "reward", "update")}
    settings = {
        "Prompts": {"tokens, mean": fmean(map(len, prompts)), "tokens, most": len(longest)},
        "grpo.py": dataclasses.asdict(run),
        "GRPOConfig": trl_args,
        "GRPOConfig with its defaults": {k: v for k, v in trainer.args.to_dict().items() if not k.endswith("_dir")},
        "TRL's generation_config": trainer.generation_config.to_dict(),
    }
    for label, optimizer in optimizers.items():
        settings[label] = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
    return ours, trl, split, settings


def print_comparison(config: grpo.Config, options: Options, way: Way) -> str:
    """The table of one comparison, the ratio, our split, and every setting; returns the ratio."""
    ours, trl, split, settings = compare(config, options, options.force_length, way)
    rows: dict[str, list[str]] = {}
    for side in (ours, trl):
        seconds, lengths, scores = side.seconds, side.lengths, side.rewards
        tokens, half = sum(map(sum, lengths)), (len(scores) + 1) // 2
        cells = {
            "seconds a step, median": f"{median(seconds):.4f}",
            "seconds a step, min to max": f"{min(seconds):.4f} to {max(seconds):.4f}",
            "completion tokens/s": f"{tokens / sum(seconds):,.0f}",
            "completion tokens": f"{tokens:,}",
            "completion length, mean": f"{fmean(map(fmean, lengths)):.2f}",
            "completions with signal": f"{fmean(with_signal(s, config.num_generations) for s in scores):.1%}",
            "reward, mean of first half": f"{fmean(map(fmean, scores[:half])):.3f}",
            "reward, mean of second half": f"{fmean(map(fmean, scores[-half:])):.3f}",
            "peak memory": f"{side.memory / 2**20:,.0f} MiB",
            "graphs compiled in timed steps": str(side.compiled),
        }
        for label, cell in cells.items():
            rows.setdefault(label, []).append(cell)
    length = f"forced to {options.force_length} tokens" if options.force_length else "natural"
    print(f"{options.prompts} prompts x {options.generations} generations, length {length}; {options.steps} steps.")
    print("Prompts of {tokens, mean:.0f} tokens, at most {tokens, most}.\n".format(**settings["Prompts"]))
    print("| | grpo.py | TRL |\n|---|---:|---:|")
    print("\n".join(f"| {label} | {' | '.join(cells)} |" for label, cells in rows.items()))
    pairs = list(zip(ours.seconds, trl.seconds, strict=True))
    chance = random.Random(0)
    draws = (zip(*chance.choices(pairs, k=len(pairs)), strict=True) for _ in range(2000))
    ratios = sorted(median(b) / median(a) for a, b in draws)
    ratio = median(b for _, b in pairs) / median(a for a, _ in pairs)
    print(f"\n**Ratio of medians: {ratio:.2f}**, 95 % bootstrap interval {ratios[50]:.2f} to {ratios[-51]:.2f}.")
    if ours.compiled + trl.compiled:
        print("Not valid: torch.compile was at work in timed steps. Raise --warmup.")
    print("Our step: " + ", ".join(f"{phase} {seconds:.4f} s" for phase, seconds in split.items()) + " (medians).")
    print("Peak memory: what a step in warmup takes above the level before it", end="")
    print(", and what its side holds; both are on the card at once.\n" if options.device == "cuda" else ".\n")
    print_settings(settings)
    return f"{way[0]}: {ratio:.2f} ({ratios[50]:.2f} to {ratios[-51]:.2f})"


def print_settings(settings: dict[str, Any]) -> None:
    """Folded up, for a page that shows Markdown."""
    for name, values in settings.items():
        print(f"<details><summary>{name}</summary>\n\n`{json.dumps(values, default=str)}`\n\n</details>")


def print_growth(config: grpo.Config, options: Options, way: Way) -> str:
    """Seconds a step of both sides for each value of one setting; returns the last ratio."""
    field, values = GROWTH[options.growth]
    length = f"forced to {options.force_length} tokens" if options.force_length else "natural"
    print(f"Where not varied: {options.prompts} prompts x {options.generations} generations, length {length}. ", end="")
    print(f"Medians of {options.steps} steps, after {options.warmup} of warmup.\n")
    print("| | completions | tokens, ours | tokens, TRL | grpo.py, s | TRL, s | ratio |\n|---|" + "--:|" * 6)
    for value in values:
        change: dict[str, Any] = {field: value}
        changed = dataclasses.replace(config, **change)
        force_length = value if options.growth == "length" else options.force_length
        ours, trl, _, settings = compare(changed, options, force_length, way)
        a, b = (median(side.seconds) for side in (ours, trl))
        tokens = " | ".join(f"{fmean(map(sum, side.lengths)):,.0f}" for side in (ours, trl))
        completions = changed.prompts_per_step * changed.num_generations
        print(f"| {value} {options.growth} | {completions} | {tokens} | {a:.3f} | {b:.3f} | {b / a:.2f} |", flush=True)
    print("\nSettings of the last line:\n")
    print_settings(settings)
    return f"{way[0]}: {b / a:.2f} in the last line"


def print_header(device: torch.device) -> None:
    """Command, machine and versions, and silence on stderr but for errors."""
    from transformers import logging

    logging.set_verbosity_error()
    warnings.simplefilter("ignore", FutureWarning)  # TRL itself uses an old name of gradient checkpointing
    git = ["git", "-C", str(Path(grpo.__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    cpuinfo = Path("/proc/cpuinfo")
    cpus = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else [platform.processor()]
    packages = ("torch", "transformers", "trl", "accelerate", "tokenizers")
    versions = (f"{name} {importlib.metadata.version(name)}" for name in packages)
    print(f"- Command: `uv run benchmarks/{shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}`")
    print(f"- Commit {subprocess.run(git, capture_output=True, text=True).stdout.strip()}, {datetime.date.today()}")
    print(f"- Python {platform.python_version()}, {', '.join(versions)}")
    print(f"- {cpus[0]}, {torch.get_num_threads()} threads; policy on {device.type}", end="")
    print(f" ({torch.cuda.get_device_name(device)})\n" if device.type == "cuda" else "\n", flush=True)


def main(options: Options) -> None:
    """Prints header, a result for each of TRL's ways, and a line with all ratios; exits with 1 if one did not run."""
    size = 64 if options.device == "cuda" else 1024
    config = grpo.Config(
        model=options.model, prompts_per_step=options.prompts, num_generations=options.generations,
        max_completion_length=options.force_length or options.max_completion_length, lr_schedule="constant",
        warmup_steps=0, learning_rate=options.learning_rate, eval_samples=8,
        system_prompt=options.system_prompt, temperature=options.temperature,
        micro_batch_size=options.micro_batch_size or size,
        task="gsm8k" if options.dataset_path else "arithmetic", dataset_path=options.dataset_path,
    )  # fmt: skip
    assert options.device == "cpu" or torch.cuda.device_count() == 1, "TRL would use them all: set CUDA_VISIBLE_DEVICES"
    PartialState(cpu=options.device == "cpu")  # both sides take their device from it
    print_header(torch.device(options.device))
    results, failed = list[str](), False
    for name, added in ways_of_trl(options):
        print(f"\n### TRL with {name}\n", flush=True)
        if CB_CONFIG in added and not has_flash(added[CB_CONFIG], options):
            print("Not at its fastest: without flash-attn, which it is made for.\n")
        try:
            results.append((print_growth if options.growth else print_comparison)(config, options, (name, added)))
        except Exception as error:  # noqa: BLE001  # of libraries, and it shall not take the other results along
            traceback.print_exc()
            results.append(f"{name}: did not run ({str(error).split(chr(10))[0]:.200})")
            failed = True
    print("\nRatios of medians, TRL / grpo.py: " + "; ".join(results))
    sys.exit(failed)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
