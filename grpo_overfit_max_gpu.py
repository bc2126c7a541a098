"""The overfitting experiment of grpo_overfit.py, sized to fill one H100.

Differs from grpo_overfit.py:
1. The qwen preset has 64 prompts x 16 generations a step and 1,024 completion tokens.
2. --micro-batch-size auto, the default: the update starts with as many completions at a time as should fit; when the
   GPU runs out of memory it halves that number, goes on with the same completions, and remembers. Exit code 8 if not
   even one fits.
3. Metrics of the hardware: perf/mfu, gpu/utilization and gpu/memory_gb.

Without a GPU it trains the tiny preset, all completions at a time, and leaves 2 and 3 out.

For each prompt the policy samples a group of G completions; each is rewarded by a function; the group's mean reward
is the baseline; the policy gradient does the rest. No critic, no reference model, no inference server.
Dr GRPO (Liu et al. 2025, arXiv 2503.20783) is GRPO without its two biases, the division by the group's standard
deviation and the division by each completion's length:

    advantages = rewards - mean(rewards over the group)                                           # (N,), N = P * G
    ratio      = exp(logprobs - old_logprobs)                                                     # (N, T)
    loss       = -1 / (N * L) * sum over completions and tokens of
                 min(ratio * advantages, clip(ratio, 1 - epsilon, 1 + epsilon) * advantages)

with L = max_completion_length. N and L are constants of the step, so a token weighs the same wherever it stands.
Shapes in the comments: P prompts, G generations, N = P * G completions, T completion tokens, S prompt tokens,
M packed or selected tokens, H hidden size, V vocabulary.

    uv run grpo_overfit_max_gpu.py             # qwen preset where CUDA is there, else the tiny preset (CPU, 1 minute)
    uv run grpo_overfit_max_gpu.py --help

Exit codes: 0 done, 1 unexpected, 2 bad input, 3 no learning signal, 4 non-finite, 5 disk, 6 target missed,
7 reward function failed, 8 out of memory, 128 + n stopped by signal n. --resume RUN_FOLDER continues a run that ended
early.
Settings marked [maths] change what is computed, those marked [speed] only how fast, and what is kept of it.
"""

import contextlib
import copy
import dataclasses
import fcntl
import hashlib
import importlib.metadata
import json
import math
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, NoReturn

import torch
import tyro
from accelerate import PartialState
from accelerate.utils import gather_object as gather
from dotenv import load_dotenv
from requests.utils import get_netrc_auth
from torch import Tensor, distributed as dist
from torch.nn.functional import linear, pad, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

import rewards as reward_module

Prompts = list[list[int]]  # token ids
Metrics = dict[str, float]
Rows = list[dict[str, Any]]  # problems, or lines of completions.jsonl

# ----------------------------------------------------------------------------------------------------------------------
# Config


@dataclasses.dataclass(frozen=True)
class Config:
    """Every setting of a run. [maths] changes what is computed, [speed] only how fast or in how much memory."""

    preset: Literal["auto", "qwen", "tiny"] = "tiny"
    """Which defaults to start from, read before the other flags. On the command line the default is auto: qwen where
    CUDA is there, tiny where it is not. [maths]"""
    task: str = "mixed"
    """What to train on; a wrong name prints the list. [maths]"""
    model: str = "tiny_policy"
    """Hugging Face id or folder of a causal language model. [maths]"""
    dataset_path: str = ""
    """A JSONL file with `question` and `answer`, in place of the task's problems; implies --task gsm8k. [maths]"""
    num_samples: int = 100
    """Problems to overfit: a fixed sample of the training problems, the same for every seed. [maths]"""
    target_accuracy: float = 1.0
    """Greedy accuracy on these problems, at most 1; an evaluation that finds it ends the run. [maths]"""
    prompt_format: Literal["chat", "plain"] = "chat"
    """chat: the tokenizer's chat template; plain: "Question: ... Answer:", for models without a template. [maths]"""
    system_prompt: str | None = None
    """None: asks for <think> and <answer> tags if `format` is rewarded, else no system prompt. [maths]"""
    rewards: tuple[str, ...] = ("accuracy=2.0",)
    """Reward functions as name=weight: accuracy, format, reasoning, or any module:function with TRL's signature.
    The reward is their weighted sum. [maths]"""

    num_steps: int = 300
    """Steps (one rollout each); ignored if num_epochs is set. May grow later with lr_schedule constant. [maths]"""
    num_epochs: int = 0
    """If above 0: passes over the training problems instead of num_steps. [maths]"""
    prompts_per_step: int = 50
    """P, prompts a step. [maths]"""
    num_generations: int = 32
    """G, completions a prompt, at least 2: the group whose mean is the baseline. [maths]"""
    max_prompt_length: int = 1024
    """Tokens; a longer prompt is an error, never cut. [maths]"""
    max_completion_length: int = 12
    """L, tokens; longer completions are cut. Also the constant in the loss's normalizer. [maths]"""
    temperature: float = 1.0
    """Of sampling and of the log-probs that are trained, above 0. [maths]"""

    learning_rate: float = 1.5e-4
    """Peak learning rate of AdamW. [maths]"""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After warmup: constant, or falling to zero, which the step after the last would reach. [maths]"""
    warmup_steps: int = 20
    """Steps of linear warmup. [maths]"""
    weight_decay: float = 0.0
    """Of AdamW. [maths]"""
    max_grad_norm: float = 1.0
    """The gradient is scaled down to this norm; 0: no clipping. [maths]"""
    num_iterations: int = 1
    """Optimizer updates a rollout; above 1 the ratio leaves 1 and epsilon matters. [maths]"""
    epsilon: float = 0.2
    """Clip range of the ratio. [maths]"""
    beta: float = 0.0
    """Weight of the KL penalty to the starting policy; above 0 loads a second copy of the model. [maths]"""
    loss_type: Literal["dr_grpo", "grpo", "bnpo"] = "dr_grpo"
    """For ablations. grpo: mean over each completion's tokens; bnpo: mean over all tokens of the step. [maths]"""
    scale_rewards: bool = False
    """For ablations: divide advantages by the group's standard deviation, as GRPO does. [maths]"""
    mask_truncated_completions: bool = False
    """Leave completions without a stop token out of the loss (not out of the group's mean). [maths]"""

    eval_every: int = 10
    """Steps between evaluations; always one before and one after training; 0: only these. [speed]"""
    eval_samples: int = 200
    """Held-out problems an evaluation; 0: all. [maths]"""
    save_every: int = 100
    """Steps between checkpoints; one is always written at the end; 0: only that. [speed]"""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints are kept; 0: all. [speed]"""
    resume: str = ""
    """A run folder to continue, or latest: this script's newest in run_dir. Its settings become the defaults, and those
    marked [maths] cannot change. [speed]"""
    max_bad_steps: int = 3
    """Steps in a row without a finite loss and gradient, none of them applied, until the run ends; 0: never. [speed]"""
    compile: bool = True
    """On a GPU: fuse its kernels with torch.compile, which takes minutes at the start; not if deterministic. [speed]"""
    deterministic: bool = False
    """On a GPU: slower kernels that repeat to the bit, so that a resumed run does. A CPU's always do. [speed]"""
    patience: int = 20
    """Steps in a row in which every group's rewards are equal until the likely cause is named; 0: never. [speed]"""
    abort_on_no_signal: bool = False
    """End the run then, with exit code 3. [speed]"""
    micro_batch_size: int | Literal["auto"] = "auto"
    """Completions a forward pass of the update; the gradient does not depend on it. auto: as many as fit. [speed]"""
    gradient_checkpointing: bool = False
    """Keep each layer's inputs alone and compute the rest again in the backward pass. [speed]"""
    seed: int = 1
    """Of prompt order and sampling noise. [maths]"""
    run_dir: str = "runs"
    """Folder in which the run's own folder is made. [speed]"""
    track: bool = False
    """Log to Weights & Biases, to WANDB_ENTITY and WANDB_PROJECT of the environment or .env. [speed]"""
    log_completions: bool = False
    """With --track: also log a table of completions at every evaluation while training. [speed]"""


PRESETS: dict[str, Config] = {
    "tiny": Config(), "qwen": Config(
        preset="qwen", model="Qwen/Qwen2-0.5B-Instruct", task="gsm8k", num_steps=400, target_accuracy=0.95,
        rewards=("accuracy=2.0", "format=0.5", "reasoning=0.5"), max_prompt_length=512, max_completion_length=1024,
        temperature=0.7, learning_rate=5e-6, prompts_per_step=64, num_generations=16)}  # fmt: skip


# What may change when a run is resumed: the settings marked [speed].
SPEED = {"eval_every", "save_every", "keep_checkpoints", "resume", "max_bad_steps", "deterministic", "patience",
         "abort_on_no_signal", "micro_batch_size", "compile", "run_dir", "track", "log_completions",
         "gradient_checkpointing"}  # fmt: skip


def fail(exit_code: int, message: str) -> NoReturn:
    """Ends the program with one line on stderr that names the cause and the cure."""
    if os.environ.get("RANK", "0") == "0" or exit_code in (7, 8):  # once, but for what one process may meet alone
        with contextlib.suppress(OSError):  # a terminal that is gone
            print("error:", "".join(c if c.isprintable() else " " for c in message), file=sys.stderr)
    raise SystemExit(exit_code)


def say(text: str) -> None:
    """Prints, once for all processes; a terminal that is gone, or a log on a full disk, ends no run."""
    with contextlib.suppress(OSError):
        PartialState().print(text, flush=True)


def check_config(config: Config) -> None:
    """Exits with code 2 on a setting that cannot work, or --track without a login, before anything is loaded."""
    if config.target_accuracy > 1:
        fail(2, f"target_accuracy is {config.target_accuracy}: set --target-accuracy to 1 or less")
    if config.task not in TASKS:
        fail(2, f"unknown task '{config.task}': --task takes one of {', '.join(TASKS)}")
    positive = ["prompts_per_step", "micro_batch_size", "max_prompt_length", "max_completion_length", "num_iterations"]
    at_least: dict[str, float] = dict.fromkeys(positive, 1) | {"num_generations": 2, "temperature": 0.001}
    for name, value in dataclasses.asdict(config).items():
        if isinstance(value, int | float) and not (least := at_least.get(name, 0)) <= value < math.inf:
            fail(2, f"{name} is {value}: set --{name.replace('_', '-')} to {least} or more")
    key = os.environ.get("WANDB_API_KEY") or get_netrc_auth(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    if config.track and not key and os.environ.get("WANDB_MODE") not in ("offline", "disabled", "dryrun"):
        fail(2, "--track needs a W&B login: put WANDB_API_KEY into .env, `uv run wandb login`, or WANDB_MODE=offline")


# ----------------------------------------------------------------------------------------------------------------------
# Data. A problem is a dict with at least `question` and `answer`; rewards get every column of it.

TAG_PROMPT = "Reason step by step inside <think></think>, then give only the final answer inside <answer></answer>."


def mixed() -> Rows:
    """Sums of two-digit numbers, and differences told as a story: 1,200 problems."""
    pairs = [(a, b) for a in range(30, 60) for b in range(10, 30)]
    sums = {f"What is {a} + {b}?": a + b for a, b in pairs}
    stories = {f"Ann has {a} coins and loses {b}. How many coins now?": a - b for a, b in pairs}
    return [{"question": text, "answer": str(result)} for text, result in (sums | stories).items()]


def gsm8k(split: str = "train") -> Rows:
    """GSM8K's `main` configuration ("socratic" is another data set) from the Hugging Face hub."""
    from datasets import load_dataset

    try:
        return [dict(row) for row in load_dataset("openai/gsm8k", "main", split=split)]
    except (OSError, ValueError) as error:  # the hub's and requests' errors are OSErrors
        fail(2, f"cannot load openai/gsm8k ({type(error).__name__}): check the network, or give --dataset-path")


def read_jsonl(path: str) -> Rows:
    """Problems from a file with one JSON object a line; exits with code 2 on a line without question or answer."""
    problems: Rows = []
    try:
        for line in Path(path).read_bytes().splitlines():
            problems.append({})  # counted before it is read, so that an error names the right line
            problems[-1] |= json.loads(line)
            reward_module.accuracy_reward([problems[-1]["question"]], answer=[problems[-1]["answer"]])
            problems[-1]["question"].encode()  # half a surrogate pair is no text
    except OSError as error:
        fail(2, f"cannot read '{path}' ({error.strerror}): check --dataset-path and --test-path")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        fail(2, f'{path} line {len(problems)}, {error!r}: each line must be {{"question": "text", "answer": "text"}}')
    return problems or fail(2, f"'{path}' is empty: check --dataset-path and --test-path")


TASKS: dict[str, Callable[[], Rows]] = {task.__name__: task for task in (mixed, gsm8k)}


def problem_digest(problem: dict[str, Any]) -> bytes:
    """Hash of a question's words in sorted order, so that 12 + 34 and 34 + 12 fall on the same side of the split."""
    return hashlib.sha256(" ".join(sorted(re.findall(r"\w+|[^\w\s]", problem["question"]))).encode()).digest()


def split_problems(problems: Rows) -> tuple[Rows, Rows]:
    """(train, held out): one in eight is held out, whatever the seed; fewer than 100 problems are not split."""
    problems = sorted(problems, key=problem_digest)  # a fixed random order: the first n are a fair sample
    held_out = [p for p in problems if problem_digest(p)[0] < 32 and len(problems) >= 100]
    return problems[len(held_out) :], held_out  # the digests below 32 stand first


def load_problems(config: Config) -> tuple[Rows, Rows]:
    """(the subset to overfit, held out): a fixed sample of the training problems, and problems outside of training."""
    train, held_out = split_problems(read_jsonl(config.dataset_path) if config.dataset_path else TASKS[config.task]())
    if not 0 < config.num_samples <= len(train):
        fail(2, f"{len(train)} problems are not held out: set --num-samples between 1 and {len(train)}")
    return train[: config.num_samples], held_out[: config.eval_samples or None]


def problems_of_step(train: Rows, step: int, config: Config) -> Rows:
    """The P problems of step 1, 2, ...: each epoch is a permutation by (seed, epoch)."""
    at = [divmod((step - 1) * config.prompts_per_step + i, len(train)) for i in range(config.prompts_per_step)]
    orders = {e: torch.randperm(len(train), generator=generator(config.seed, "order", e)).tolist() for e in dict(at)}
    return [train[orders[epoch][index]] for epoch, index in at]


def generator(seed: int, stream: str, step: int) -> torch.Generator:
    """All randomness is a function of (seed, stream, step): nothing has to be saved to repeat a step exactly."""
    digest = hashlib.sha256(f"{seed}/{stream}/{step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))


def uniform_noise(seed: int, stream: str, step: int, rows: int, columns: int) -> Tensor:
    """(rows, columns), uniform in [0, 1): one number for each completion and position, drawn up front on the CPU."""
    return torch.rand(rows, columns, generator=generator(seed, stream, step), dtype=torch.float64)


def tokenize_prompts(tokenizer: Any, problems: Rows, config: Config) -> Prompts:
    """Token ids of each prompt; exits with code 2 if one is too long or the tokenizer has no chat template."""
    tags = TAG_PROMPT if any(spec.startswith("format=") for spec in config.rewards) else ""
    system = tags if config.system_prompt is None else config.system_prompt
    if config.prompt_format == "chat":
        if not tokenizer.chat_template:
            fail(2, f"'{config.model}' has no chat template: use --prompt-format plain")
        head = [{"role": "system", "content": system}] * bool(system)
        chats = [[*head, {"role": "user", "content": p["question"]}] for p in problems]
        texts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    else:
        texts = [f"{system}\n\nQuestion: {p['question']}\nAnswer:".lstrip() for p in problems]
    # A chat template writes its own special tokens.
    prompts = tokenizer(texts, add_special_tokens=config.prompt_format == "plain").input_ids
    if (longest := max(map(len, prompts))) > config.max_prompt_length:
        fail(2, f"a prompt has {longest} tokens, over {config.max_prompt_length}: set --max-prompt-length {longest}")
    return prompts


# ----------------------------------------------------------------------------------------------------------------------
# Rollout


@dataclasses.dataclass
class Rollout:
    """What the policy said. Row i * G + j is completion j of prompt i; entries outside the mask are zero."""

    completion_ids: Tensor  # (N, T) long
    completion_mask: Tensor  # (N, T) bool, True up to and including the stop token
    logprobs: Tensor  # (N, T) float32, log-prob of each sampled token when it was sampled
    entropy: Tensor  # (N, T) float32, exact, of the distribution it was sampled from, in nats


def additive(mask: Tensor, config: Any, dtype: torch.dtype) -> Tensor:
    """0 where mask (B, T, S), else -inf, (B, 1, folds * T, S): `grouped_attention` adds it to the scores.

    Made once for all layers, each of which would else keep its own for the backward pass. Its rows begin where a GPU's
    fused kernel can read them.
    """
    folds = config.num_attention_heads // (getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    bias = pad(torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf), (0, -mask.shape[2] % 8))[:, None]
    return bias.repeat(1, 1, folds if mask.shape[1] > 1 else 1, 1)[..., : mask.shape[2]]  # one query's is broadcast


def grouped_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scaling: float) -> Tensor:
    """Attention of query (B, heads, T, D) to key, value (B, key heads, S, D), plus bias: (B, T, heads, D).

    Query heads that share a key head are folded into further queries of that head, so that no key is ever copied.
    """
    (batch, heads, length, size), key_heads = query.shape, key.shape[1]
    query = query.reshape(batch, key_heads, heads // key_heads * length, size)
    if 1 < bias.shape[2] != query.shape[2]:  # the config does not tell the model's number of key heads
        bias = bias[:, :, :length].repeat(1, 1, heads // key_heads, 1)
    if length == 1 and query.device.type == "cpu":  # decoding: there several times faster than the fused kernel
        attended = (query * scaling @ key.transpose(2, 3) + bias).softmax(-1) @ value
    else:
        attended = scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scaling)
    return attended.reshape(batch, heads, length, size).transpose(1, 2)  # a GPU's kernels have strides of their own


def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, **how: Any) -> Any:
    """What the model's layers call. With packed=, query, key and value are (1, heads, M, D): M tokens without padding.

    packed: segments, which hold the M tokens one after another, and which attention alone sees as padded batches.
    Of each: queries (B, T), which token stands there; keys (B, S), which ones it may attend to; bias, see `additive`;
    places, where the segment's tokens stand in (B * T).
    """
    if "packed" not in how:
        bias = additive(mask[:, 0], module.config, query.dtype) if mask.dtype == torch.bool else mask  # of a plain call
        return grouped_attention(query, key, value, bias, scaling), None
    parts = []
    for queries, keys, bias, places in how["packed"]:
        pairs = (query, queries), (key, keys), (value, keys)
        q, k, v = (x[0].index_select(1, i.flatten()).unflatten(1, i.shape).transpose(0, 1) for x, i in pairs)
        parts.append(grouped_attention(q, k, v, bias, scaling).flatten(0, 1).index_select(0, places))
    return torch.cat(parts)[None], None


def forward(policy: Any, ids: Tensor, mask: Tensor, positions: Tensor, **how: Any) -> Tensor:
    """Hidden states (B, T, H) of ids (B, T), which attend where mask (B, T, S), cached by a Decoder, or if packed."""
    if policy.config._attn_implementation != "grouped":
        from transformers import AttentionInterface, AttentionMaskInterface

        full_mask = AttentionMaskInterface()["sdpa"]  # for plain calls of the model, and there always a mask
        AttentionMaskInterface.register("grouped", lambda **k: full_mask(**k | {"allow_is_causal_skip": False}))
        AttentionInterface.register("grouped", attention)
        policy.set_attn_implementation("grouped")
        if policy.config._attn_implementation != "grouped":
            fail(2, f"the attention of {type(policy).__name__} cannot be replaced by ours: choose another --model")
    bias = additive(mask, policy.config, policy.dtype)
    inputs = {"input_ids": ids, "attention_mask": bias, "position_ids": positions, **how}
    return policy.base_model(**inputs, use_cache="past_key_values" in how).last_hidden_state


def pad_prompts(policy: Any, prompts: Prompts) -> tuple[Tensor, Tensor, Tensor]:
    """(P, S) each: token ids, where they are tokens and not padding, which stands behind, and positions."""
    width = max(map(len, prompts))
    ids = torch.tensor([p + [0] * (width - len(p)) for p in prompts], device=policy.device)
    valid = torch.tensor([[1] * len(p) + [0] * (width - len(p)) for p in prompts], device=policy.device)
    return ids, valid.bool(), torch.arange(width, device=policy.device).expand_as(ids)


def fused(function: Any, policy: Any) -> Any:
    """The function compiled, once for each kind of shape, if `load_policy` said so."""
    return torch.compile(function, dynamic=True) if getattr(policy, "fuse", False) else function


def scaled_logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """Logits / temperature (M, V), in float32 or better: the one distribution that is sampled and scored."""
    logits = linear(hidden, weight)
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).div_(temperature)


def first_above(weights: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """First index (M, 1) at which the sum of weights (M, K) exceeds threshold (M, 1), and what is left of it there."""
    cdf = weights.cumsum(-1, dtype=torch.float64)  # in float32 the rare tokens of a large V are lost
    threshold = torch.minimum(threshold, torch.nextafter(cdf[:, -1:], torch.zeros_like(threshold)))
    index = (cdf <= threshold).sum(-1, keepdim=True)  # NaN: 0
    return index, threshold - pad(cdf, (1, 0)).gather(-1, index)


def sample_tokens(probs: Tensor, noise: Tensor) -> Tensor:
    """Inverse CDF: the first token (M,) whose cumulative probability exceeds noise (M,), uniform in [0, 1).

    The block of tokens first, then the token in it: the M * V probabilities are read once.
    """
    probs = pad(probs, (0, -probs.shape[-1] % 128)) if probs.shape[-1] % 128 else probs
    blocks = probs.unflatten(-1, (-1, 128))  # (M, V / 128, 128)
    sums = blocks.sum(-1, dtype=torch.float64)
    block, left = first_above(sums, noise[:, None] * sums.sum(-1, keepdim=True))
    token, _ = first_above(blocks[torch.arange(len(block), device=block.device), block[:, 0]], left)
    return (128 * block + token)[:, 0]


class Decoder:
    """The rows of a rollout that still go on, their keys and values, and the step that adds a token to each of them.

    static: all of it stays where it is from rollout to rollout, so that a GPU repeats a step as a CUDA graph, its
    hundreds of kernels in one launch; the weights change in place, which keeps a graph valid. A CPU is faster without.
    """

    def __init__(self, policy: Any, static: bool = False) -> None:
        self.policy, self.static, self.capture = policy, static, static and policy.device.type == "cuda"
        self.step = fused(self.decode, policy)
        self.layers: list[Any] = []  # keys and values (B, heads, S, D) of each layer
        self.buffers: dict[str, Tensor] = {}
        self.graphs: dict[Any, Any] = {}
        self.most: dict[int, int] = {}  # rows at a time that fit into memory, for a number of generations that did not

    def place(self, name: str, value: Tensor, keys: int | None = None) -> Tensor:
        """value, or its copy at the front of the static buffer of that name; keys: which dimension is one of keys."""
        if not self.static:
            return value
        old = self.buffers.get(name, value[:0])
        least = [self.most_keys if i == keys else size for i, size in enumerate(value.shape)]
        if any(a < b for a, b in zip(old.shape, least, strict=True)):
            self.graphs.clear()  # they would write to the old one
            self.buffers[name] = value.new_zeros([max(sizes) for sizes in zip(old.shape, least, strict=True)])
        return self.buffers[name][tuple(map(slice, value.shape))].copy_(value)

    def get_seq_length(self, *_: Any) -> int:
        """How many keys there is room for; called by the model, as is `update`."""
        return self.layers[0][0].shape[2] if self.layers else 0

    def update(self, key: Tensor, value: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Adds a layer's new keys and values, returns all that may be attended to, unused room included."""
        if layer == len(self.layers):
            self.layers.append((key, value))
        else:
            for buffer, new in zip(self.layers[layer], (key, value), strict=True):
                buffer.index_copy_(2, self.at, new)
        return self.layers[layer]

    def run(self, prompts: Prompts, source: Tensor, noise: Tensor | None, length: int, temperature: float,
            eos_ids: list[int]) -> list[Tensor]:  # fmt: skip
        """The fields of a Rollout of n rows; source (n,): the prompt of each; noise (n, length)."""
        ids, mask, places = pad_prompts(self.policy, prompts)
        (n, device), width = (len(source), ids.device), ids.shape[1]
        self.layers.clear()
        hidden = forward(self.policy, ids, places[:, None] <= places[..., None], places, past_key_values=self)
        self.source, self.mask, self.temperature = source, mask[source], temperature
        self.rows, self.going = torch.arange(n, device=device), torch.ones(n, dtype=torch.bool, device=device)
        self.tokens, self.positions = torch.zeros_like(self.rows), self.mask.sum(-1)  # the last ones, and the next
        self.noise = None if noise is None else self.place("noise", noise.to(device))
        self.eos = self.place("eos", torch.tensor([-1, *eos_ids], device=device))
        self.column = self.place("column", torch.tensor([0], device=device))  # of the next token in the records
        self.at = self.place("at", torch.tensor([width], device=device))  # of its key
        zeros = torch.zeros(n, length, device=device)
        records = vars(Rollout(zeros.long(), zeros.bool(), zeros, zeros.clone()))
        self.records = [self.place(name, record) for name, record in records.items()]
        self.sample(hidden[source, self.positions - 1])
        # Static: few shapes, so few graphs, and seldom a look at who has ended, for which a GPU is waited for.
        # Else rows leave at once, and little of the room is empty.
        size_unit, key_unit, every = (-(-n // 512) * 64, 128, 16) if self.static else (1, 16, 1)
        self.most_keys = width + length + -(width + length) % key_unit
        for t in range(1, length):
            if (t - 1) % every == 0 and (left := int(self.going.sum())) == 0:
                break
            size, keys = min(len(self.rows), left + -left % size_unit), width + t
            if size < len(self.rows) or keys > self.mask.shape[1]:
                self.keep(self.going.int().argsort(descending=True, stable=True)[:size], keys + -keys % key_unit)
            self.advance()
        return self.records

    def keep(self, order: Tensor, keys: int) -> None:
        """Goes on with these rows, and room for at least so many keys: zeros, since what is masked must be finite."""
        source, room = self.source[order], max(0, keys - self.mask.shape[1])  # source: where a row's keys are
        for i, pair in enumerate(self.layers):  # one layer at a time: two copies of all of them might not fit
            grown = [pad(x[source], (0, 0, 0, room)) if room else x[source] for x in pair]
            self.layers[i] = [self.place(f"{i}/{j}", x, keys=2) for j, x in enumerate(grown)]
        self.mask = self.place("mask", pad(self.mask[order], (0, room)), keys=1)
        for name in ("rows", "tokens", "positions", "going"):
            setattr(self, name, self.place(name, getattr(self, name)[order]))
        self.source = torch.arange(len(order), device=order.device)

    def decode(self) -> None:
        """Reads the last token of each row and samples the next, without waiting for the device."""
        self.mask.index_fill_(1, self.at, True)
        ids, seen, positions = self.tokens[:, None], self.mask[:, None], self.positions[:, None]
        hidden = forward(self.policy, ids, seen, positions, past_key_values=self)[:, -1]
        for counter in (self.column, self.at, self.positions):
            counter += 1
        self.sample(hidden)

    def sample(self, hidden: Tensor) -> None:
        """Draws and records a token of each row that goes on, from its last hidden state (B, H)."""
        head = self.policy.get_output_embeddings().weight
        logprobs = scaled_logits(hidden, head, self.temperature).log_softmax(-1)  # (B, V)
        probs = logprobs.exp()
        tokens = logprobs.argmax(-1) if self.noise is None else sample_tokens(probs, self.noise[self.rows, self.column])
        entropy = -(probs * logprobs.clamp(min=-1e4)).sum(-1)  # 0 * log 0 is 0
        values = tokens, self.going, logprobs.gather(-1, tokens[:, None])[:, 0], entropy
        for record, value in zip(self.records, values, strict=True):
            record[self.rows, self.column] = torch.where(self.going, value, 0).to(record.dtype)
        self.tokens.copy_(tokens)
        self.going.logical_and_((tokens[:, None] != self.eos).all(-1))

    def advance(self) -> None:
        """A step: the first of its shape compiles and warms up what it needs, the second is captured."""
        key = *self.mask.shape, *self.records[0].shape, self.noise is None, len(self.eos), self.temperature
        if not self.capture or key not in self.graphs:
            self.graphs[key] = None
            return self.step()
        if self.graphs[key] is None:
            pool = next((graph.pool() for graph in self.graphs.values() if graph), None)
            try:
                with torch.cuda.graph(graph := torch.cuda.CUDAGraph(), pool=pool, capture_error_mode="thread_local"):
                    self.step()
            except RuntimeError as error:
                if torch.OutOfMemoryError in (type(error), type(error.__context__)):
                    raise torch.OutOfMemoryError(*error.args) from error
                say(f"no CUDA graphs, so decoding is slower: {str(error).splitlines()[0]}")
                self.capture = False
                return self.step()
            self.graphs[key] = graph
        self.graphs[key].replay()


@torch.no_grad()
def rollout(policy: Any, prompts: Prompts, *, num_generations: int, max_completion_length: int, temperature: float,
            eos_ids: list[int], noise: Tensor | None, decoder: Any = None) -> Rollout:  # fmt: skip
    """Samples a group of completions for each prompt from softmax(logits / temperature) over the whole vocabulary.

    prompts: P lists of token ids. noise: (N, max_completion_length) uniform in [0, 1), one number for each completion
    and position, or None for greedy. decoder: a Decoder of this policy, kept between calls; None: one for this call.
    A prompt is computed once and its KV cache copied to its group's rows. What does not fit into memory at once is
    sampled in parts, every token with the noise it would have had.
    """
    decoder, parts, rows = decoder or Decoder(policy), [], torch.arange(len(prompts) * num_generations)
    while len(rows):
        part = rows[: decoder.most.get(num_generations, len(rows))]
        first, last = int(part[0]) // num_generations, int(part[-1]) // num_generations
        source, given = (part // num_generations - first).to(policy.device), None if noise is None else noise[part]
        try:
            records = decoder.run(prompts[first : last + 1], source, given, max_completion_length, temperature, eos_ids)
            parts.append([record.clone() for record in records])  # the next part is written over them
            rows = rows[len(part) :]
        except torch.OutOfMemoryError:
            if len(part) == 1:
                raise
            decoder.most[num_generations] = len(part) // 2
            for held in (decoder.graphs, decoder.buffers, decoder.layers):
                held.clear()
    return Rollout(*(torch.cat(fields) for fields in zip(*parts, strict=True)))


# ----------------------------------------------------------------------------------------------------------------------
# Advantages, log-probs, loss

LOGITS_AT_ONCE = 2**27  # logits of one chunk: 0.5 GB in float32, a few times that with what is computed from them


def group_advantages(rewards: Tensor, num_generations: int, scale_rewards: bool = False) -> Tensor:
    """A_i = r_i - mean(r over its group), (N,) -> (N,): equation 3 of the paper, without its division by the std.

    scale_rewards: divide by the group's unbiased standard deviation + 1e-4, as GRPO does.
    """
    groups = rewards.view(-1, num_generations)  # (P, G)
    advantages = groups - groups.mean(-1, keepdim=True)
    # Equal rewards carry no signal; their computed mean can be off by a rounding, which would look like one.
    advantages = torch.where((groups == groups[:, :1]).all(-1, keepdim=True), 0.0, advantages)
    return (advantages / (groups.std(-1, keepdim=True) + 1e-4) if scale_rewards else advantages).flatten()


def chunk_logprobs(hidden: Tensor, token_ids: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """Log-probs (M,) of token_ids (M,) after hidden states (M, H)."""
    logits = scaled_logits(hidden, weight, temperature)
    return logits.gather(-1, token_ids[:, None])[:, 0] - logits.logsumexp(-1)


def completion_logprobs(policy: Any, prompts: Prompts, completion_ids: Tensor, completion_mask: Tensor, *,
                        prompt_index: Tensor, temperature: float) -> Tensor:  # fmt: skip
    """Log-prob of every completion token under softmax(logits / temperature), (n, T), zero outside the mask.

    prompts: lists of token ids; prompt_index (n,): the prompt of each row. In one pass over packed tokens, none of them
    padding, each prompt is computed once and its rows attend to that; so is each of its equal completions.
    Differentiable; never holds logits for more than a chunk of tokens.
    """
    longest = int(completion_mask.sum(-1).max())
    keys = completion_ids[:, :longest].masked_fill(~completion_mask[:, :longest], -1)
    keys, copies = torch.unique(torch.cat([prompt_index.to(keys.device)[:, None], keys], 1), dim=0, return_inverse=True)
    ids, mask = keys[:, 1:].clamp(min=0), keys[:, 1:] >= 0  # (u, longest): a prompt's equal completions only once
    used, row_prompt = torch.unique(keys[:, 0], return_inverse=True)
    prompt_ids, in_prompt, places = pad_prompts(policy, [prompts[i] for i in used.tolist()])  # (P, S) each
    lengths, read = in_prompt.sum(-1), mask[:, 1:]  # of a row those tokens are read that another follows
    row_places = lengths[row_prompt, None] + torch.arange(longest - 1, device=policy.device)  # (u, T)
    # Which of the packed tokens stands where: the prompts' come first, then those of the rows.
    numbers, rows = (x.flatten().cumsum(0).view(x.shape).sub(1).clamp(min=0) for x in (in_prompt, read))
    rows = rows + lengths.sum()
    keys = torch.cat([numbers[row_prompt], rows], dim=1)  # (u, S + T)
    key_places = torch.cat([places.masked_fill(~in_prompt, 2**40)[row_prompt], row_places], dim=1)
    seen = (x[:, None] <= y[..., None] for x, y in ((places, places), (key_places, row_places)))
    prompt_bias, row_bias = (additive(mask, policy.config, policy.dtype) for mask in seen)
    packed = [(numbers, numbers, prompt_bias, in_prompt.flatten().nonzero()[:, 0])]
    packed += [(rows, keys, row_bias, read.flatten().nonzero()[:, 0])]
    tokens = torch.cat([prompt_ids[in_prompt], ids[:, :-1][read]])[None]  # (1, M)
    positions = torch.cat([places[in_prompt], row_places[read]])[None]
    hidden = fused(forward, policy)(policy, tokens, tokens[..., None] >= 0, positions, packed=packed)[0]  # (M, H)
    before = torch.cat([(lengths.cumsum(0) - 1)[row_prompt, None], rows], dim=1)  # (u, longest): what predicts it

    chunk, head = max(1, LOGITS_AT_ONCE // policy.config.vocab_size), policy.get_output_embeddings().weight
    pairs = zip(hidden.index_select(0, before[mask]).split(chunk), ids[mask].split(chunk), strict=True)
    # The backward pass computes each chunk's logits again instead of keeping them.
    score, how = fused(chunk_logprobs, policy), dict[str, Any](use_reentrant=False, preserve_rng_state=False)
    values = torch.cat([checkpoint(score, *pair, head, temperature, **how) for pair in pairs])
    logprobs = torch.zeros(mask.shape, dtype=values.dtype, device=policy.device).masked_scatter(mask, values)
    return pad(logprobs, (0, completion_ids.shape[1] - longest)).index_select(0, copies)  # (n, T)


def dr_grpo_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, loss_mask: Tensor, *, num_completions: int,
                 max_completion_length: int, num_tokens: int | None = None, epsilon: float = 0.2, beta: float = 0.0,
                 ref_logprobs: Tensor | None = None, loss_type: str = "dr_grpo") -> Tensor:  # fmt: skip
    """Scalar: -1/(N*L) * sum of min(ratio*A, clip(ratio, 1-epsilon, 1+epsilon)*A) over the mask, less beta * KL.

    logprobs, old_logprobs, ref_logprobs, loss_mask (n, T); advantages (n,): any part of a step's rows. num_completions
    N, max_completion_length L and num_tokens (loss-mask tokens, for bnpo) are those of the whole step, so that the sum
    over its parts is the step's loss. KL is estimated by exp(d) - d - 1 with d = ref_logprobs - logprobs.
    """
    assert logprobs.shape == old_logprobs.shape == loss_mask.shape == (*advantages.shape, logprobs.shape[-1]), "shapes"
    ratio, advantages = (logprobs - old_logprobs).exp(), advantages[:, None]  # (n, T), (n, 1)
    per_token = -torch.minimum(ratio * advantages, ratio.clamp(1 - epsilon, 1 + epsilon) * advantages)
    if beta > 0:
        assert ref_logprobs is not None, "beta > 0 needs ref_logprobs"
        difference = ref_logprobs - logprobs
        per_token = per_token + beta * (difference.exp() - difference - 1)
    per_token = per_token * loss_mask
    if loss_type == "dr_grpo":
        return per_token.sum() / (num_completions * max_completion_length)  # Dr GRPO: a constant, not the lengths
    if loss_type == "grpo":
        return (per_token.sum(-1) / loss_mask.sum(-1).clamp(min=1)).sum() / num_completions
    if loss_type == "bnpo":
        return per_token.sum() / max(1, int(loss_mask.sum()) if num_tokens is None else num_tokens)
    raise ValueError(f"loss_type '{loss_type}': use dr_grpo, grpo or bnpo")


# ----------------------------------------------------------------------------------------------------------------------
# Rewards

RewardFunctions = dict[str, tuple[Callable[..., list[float | None]], float]]  # {name: (function, weight)}


def load_rewards(specs: tuple[str, ...]) -> RewardFunctions:
    """From name=weight or module:function=weight; exits with code 2 on one that does not exist."""
    functions: RewardFunctions = {}
    for spec in specs or ("",):
        path, _, weight = spec.rpartition("=")
        module, _, name = path.rpartition(":")
        try:
            owner = importlib.import_module(module) if module else reward_module
            functions[name] = (getattr(owner, name if module else f"{name}_reward"), float(weight))
        except (ImportError, AttributeError, ValueError) as error:
            fail(2, f"reward '{spec}' ({error}): --rewards takes accuracy=2.0 format=0.5 or module:function=weight")
    return functions


def compute_rewards(functions: RewardFunctions, problems: Rows, texts: list[str], ids: Prompts,
                    run: Path) -> dict[str, list]:  # fmt: skip
    """What each function gave, None where it "does not apply", and as "reward" their weighted sum; lists of length n.

    Functions are called as TRL calls them for conversational data: message lists, completion_ids, all data columns.
    Exits with code 7, the batch written to the run folder, if one raises, gives a wrong count or one not finite.
    """
    data: dict[str, list] = {
        key: [p.get(key) for p in problems] for key in problems[0] if key not in ("prompt", "completion")
    }
    data["prompts"] = [[{"role": "user", "content": p["question"]}] for p in problems]
    data["completions"] = [[{"role": "assistant", "content": text}] for text in texts]
    data["completion_ids"] = ids
    columns: dict[str, list] = {"reward": [0.0] * len(texts)}
    for name, (function, weight) in functions.items():
        wrong: list[str] = []
        try:
            values = list(function(**data))
            wrong = [text for text, value in zip(texts, values, strict=False) if not math.isfinite(value or 0)]
            if wrong or len(values) != len(texts):
                raise ValueError(f"{len(values)} values for {len(texts)} completions, {len(wrong)} of them not finite")
        except Exception as error:  # noqa: BLE001  # whatever a function from outside may raise
            batch = [p | {"completion": text} for p, text in zip(problems, texts, strict=True)]
            write_rows(path := run / "failed_batch.jsonl", batch)
            at = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(at.filename).name} line {at.lineno}"
            what = f"reward '{name}' failed with {error!r} in {place}, for completions such as"
            fail(7, f"{what} {[*wrong, texts[0]][0]!r:.300} (all of them: {path}): mend it, then --resume")
        columns[f"rewards/{name}"] = values
        columns["reward"] = [r + weight * (value or 0.0) for r, value in zip(columns["reward"], values, strict=True)]
    return columns


# ----------------------------------------------------------------------------------------------------------------------
# Processes. `accelerate launch` starts them; alone, there is one. Each works on its part of the prompts.


def start_processes(config: Config) -> torch.device:
    """Joins the processes that `accelerate launch` started, if it did; exits with code 2 on what it may not change."""
    used = {os.environ.get(f"ACCELERATE_{name}", "no") for name in ("USE_FSDP", "USE_DEEPSPEED", "MIXED_PRECISION")}
    if not used <= {"no", "false"}:
        fail(2, "FSDP, DeepSpeed or mixed precision would score other numbers than were sampled: launch without them")
    state = PartialState(cpu=not torch.cuda.is_available())
    if config.prompts_per_step < state.num_processes:
        fail(2, f"{state.num_processes} processes share {config.prompts_per_step} prompts: raise --prompts-per-step")
    return state.device


def share(items: Any) -> Any:
    """This process's part of a list or tensor; the parts are contiguous, so that `gather` restores the order."""
    rank, processes = PartialState().process_index, PartialState().num_processes
    return items[len(items) * rank // processes : len(items) * (rank + 1) // processes]


# ----------------------------------------------------------------------------------------------------------------------
# Learner: the policy and what trains it


@dataclasses.dataclass
class Learner:
    """What a run holds in memory."""

    config: Config
    functions: RewardFunctions
    policy: Any
    tokenizer: Any
    eos_ids: list[int]
    masters: list[Tensor]  # the float32 weights that the optimizer moves; the policy's own where these are float32
    optimizer: torch.optim.Optimizer
    reference: Any  # the starting policy if beta > 0, else None
    decoder: Decoder | None = None  # on a GPU
    micro_batch_size: int = 0  # the one in force, from the first update on
    run: Path = Path(os.devnull)  # the run folder
    done: tuple[int, Metrics, Rows] = (0, {}, [])  # the last step that was finished, and what `train_step` returned
    updating: bool = False  # from the first change of the weights to the end of the step, which cannot be abandoned
    signals: dict[int, float] = dataclasses.field(default_factory=dict)  # that have come, and when


def load_pretrained(loader: str, config: Config, **kwargs: Any) -> Any:
    """transformers.{loader} of --model, or of a folder of that name beside this script; exits with code 2."""
    import transformers  # here, so that --help and bad flags do not wait for it

    transformers.logging.disable_progress_bar()
    beside = Path(__file__).resolve().parent / config.model
    try:
        return getattr(transformers, loader).from_pretrained(beside if beside.is_dir() else config.model, **kwargs)
    except (OSError, ValueError) as error:
        fail(2, f"cannot load '{config.model}' ({str(error).split(chr(10))[0]:.120}): check it, or use --preset tiny")


def load_policy(config: Config, device: torch.device) -> Any:
    """A causal LM in eval mode (no dropout: what is sampled is what is scored), bf16 on a GPU, float32 on a CPU."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    policy = load_pretrained("AutoModelForCausalLM", config, dtype=dtype).to(device).eval()
    if config.compile and not config.deterministic and device.type == "cuda":  # which kernel is best, a clock decides
        policy.fuse = torch._dynamo.config.suppress_errors = True  # what cannot be compiled runs as it is
        torch._dynamo.config.recompile_limit = 64  # sizes that happen to be equal make a kind of their own
    with torch.no_grad():  # some families cap or scale their logits after the head, which we would miss
        expected = policy(torch.tensor(probe := [[1, 2, 3]], device=device)).logits
        ids, _, places = pad_prompts(policy, probe)
        hidden = forward(policy, ids, places[:, None] <= places[..., None], places)
        error = (scaled_logits(hidden, policy.get_output_embeddings().weight, 1.0) - expected).abs().max()
    window = getattr(policy.config, "sliding_window", None) or math.inf  # our masks have none
    seen = config.max_prompt_length + config.max_completion_length
    if window < seen or error > (1e-3 if dtype == torch.float32 else 0.05) * expected.abs().max():
        fail(2, f"'{config.model}' caps its logits, has a head with a bias or attends to fewer than {seen} tokens")
    return policy


def make_learner(config: Config, functions: RewardFunctions, tokenizer: Any, device: torch.device) -> Learner:
    """Loads the policy; of its generation_config only the EOS ids are used. Exits with code 2 if there are none."""
    if not tokenizer("0").input_ids:  # transformers makes an empty one without a word
        fail(2, f"'{config.model}' has no tokenizer files (tokenizer.json): add them, or choose another")
    policy = load_policy(config, device)
    if config.gradient_checkpointing:
        (getattr(policy, "activation_checkpointing_enable", None) or policy.gradient_checkpointing_enable)()
    configured = policy.generation_config.eos_token_id
    eos_ids = {*(configured if isinstance(configured, list) else [configured]), tokenizer.eos_token_id} - {None}
    if not eos_ids:
        fail(2, f"'{config.model}' names no EOS token, so no completion could end: choose another")
    masters = [p.detach().float() if p.dtype == torch.bfloat16 else p for p in policy.parameters()]  # too coarse
    optimizer = torch.optim.AdamW(masters, weight_decay=config.weight_decay, fused=True)
    reference = load_policy(config, device) if config.beta > 0 else None
    decoder = Decoder(policy, static=True) if device.type == "cuda" else None
    return Learner(config, functions, policy, tokenizer, sorted(eos_ids), masters, optimizer, reference, decoder)


def guess_micro_batch_size(config: Config, policy: Any) -> int:
    """auto: free memory over what the backward pass keeps of a completion of full length; `update` corrects it."""
    if config.micro_batch_size != "auto":
        return config.micro_batch_size
    if policy.device.type != "cuda":
        return config.prompts_per_step * config.num_generations
    shape, tokens = policy.config, config.max_completion_length + config.max_prompt_length / config.num_generations
    layers = 1 if config.gradient_checkpointing else shape.num_hidden_layers  # what these keep, in bytes a token
    kept = layers * (16 * shape.hidden_size + 10 * (getattr(shape, "intermediate_size", None) or 4 * shape.hidden_size))
    groups = shape.num_attention_heads // (getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads)
    kept += 2 * groups * (config.max_completion_length + config.max_prompt_length)  # attention's bias
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    free -= 14 * policy.num_parameters()  # gradients and AdamW's state are still to come
    return max(1, int(0.85 * free / (tokens * (kept + 2 * shape.num_hidden_layers * shape.hidden_size))))


def learning_rate(step: int, num_steps: int, config: Config) -> float:
    """Of step 1, 2, ..., num_steps."""
    progress = max(0, step - config.warmup_steps - 1) / max(1, num_steps - config.warmup_steps)
    factor = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}
    return config.learning_rate * min(1, step / max(1, config.warmup_steps)) * factor[config.lr_schedule]


def training_state(learner: Learner) -> dict[str, Any]:
    """All that training changes."""
    return {"masters": [m.detach() for m in learner.masters], "optimizer": learner.optimizer.state_dict()}


def load_training_state(learner: Learner, state: dict[str, Any]) -> None:
    """Puts it into place, and the weights that follow from the masters."""
    for master, weight, saved in zip(learner.masters, learner.policy.parameters(), state["masters"], strict=True):
        master.data.copy_(saved)
        weight.data.copy_(saved)
    learner.optimizer.load_state_dict(state["optimizer"])


def update(learner: Learner, prompts: Prompts, batch: Rollout, advantages: Tensor, loss_mask: Tensor) -> Metrics:
    """The optimizer updates of one step, in micro-batches whose gradients are summed; returns the step's metrics."""
    config, policy, groups, start = learner.config, learner.policy, learner.config.num_generations, time.perf_counter()
    longest = batch.completion_mask.sum(-1).view(-1, groups).amax(-1)  # (P,)
    order = longest.repeat_interleave(groups).argsort(stable=True)  # groups of like length share a micro-batch
    # Without a KL term a completion that is masked or has zero advantage has no gradient: it is left out, N stays.
    order = order[((advantages != 0) & loss_mask.any(-1))[order] | (config.beta > 0)]
    whole: dict[str, Any] = {k: getattr(config, k) for k in ("max_completion_length", "epsilon", "beta", "loss_type")}
    whole |= {"num_completions": sum(gather([len(advantages)])), "num_tokens": sum(gather([int(loss_mask.sum())]))}
    low_precision = [pair for pair in zip(learner.masters, policy.parameters(), strict=True) if pair[0] is not pair[1]]
    # Log-probs (N, T) before the first update and under the reference.
    old = torch.zeros_like(batch.logprobs, dtype=learner.masters[0].dtype)
    ref, losses, norms, clipped = torch.zeros_like(old), [], [], []
    undo = copy.deepcopy(training_state(learner)) if config.num_iterations > 1 else {}
    learner.micro_batch_size = learner.micro_batch_size or guess_micro_batch_size(config, policy)
    for layer in policy.modules():  # those that checkpoint do so in train mode alone, where some have dropout
        layer.training = config.gradient_checkpointing and hasattr(layer, "gradient_checkpointing")
        vars(layer).update({k: 0.0 for k, v in vars(layer).items() if "drop" in k and isinstance(v, float)})
    for iteration in range(config.num_iterations):
        for master in learner.masters:
            master.grad = torch.zeros_like(master)

        def add_gradient(rows: Tensor, iteration: int = iteration) -> None:  # whose tensors go with it if it fails
            given = prompts, batch.completion_ids[rows], batch.completion_mask[rows]
            score: dict[str, Any] = {"prompt_index": rows // groups, "temperature": config.temperature}
            logprobs = completion_logprobs(policy, *given, **score)  # (n, T)
            if iteration == 0:  # before any update
                old[rows] = logprobs.detach()
                if learner.reference is not None:
                    with torch.no_grad():
                        ref[rows] = completion_logprobs(learner.reference, *given, **score)
            loss = dr_grpo_loss(logprobs, old[rows], advantages[rows], loss_mask[rows], ref_logprobs=ref[rows], **whole)
            moved = ((logprobs.detach() - old[rows]).exp() - 1) * advantages[rows, None].sign()
            loss.backward()
            losses.append(loss.detach())
            clipped.append((moved > config.epsilon)[loss_mask[rows]].float())
            for master, weight in low_precision:  # sum over micro-batches in float32
                master.grad += weight.grad
                weight.grad = None

        done = 0
        while done < len(order):
            rows = order[done : done + learner.micro_batch_size]
            try:
                add_gradient(rows)
                done += len(rows)
            except torch.OutOfMemoryError:
                if len(rows) == 1:
                    fail(8, "one completion does not fit: --gradient-checkpointing or a lower --max-completion-length")
                learner.micro_batch_size = len(rows) // 2
                for _, weight in low_precision:  # on a GPU all weights: what is summed so far is safe in the masters
                    weight.grad = None
                text = f"--micro-batch-size {learner.micro_batch_size} from here on"
                print(f"process {PartialState().process_index} is out of memory: {text}", flush=True)

        for master in learner.masters if dist.is_initialized() else ():  # a sum: the loss divides by the whole step's N
            dist.all_reduce(master.grad)  # type: ignore[arg-type]
        norms.append(torch.nn.utils.clip_grad_norm_(learner.masters, config.max_grad_norm or math.inf).item())
        total = sum(gather([loss.item() for loss in losses]))
        if not math.isfinite(norms[-1] + total):  # the weights stay, or become again, what they were
            if undo and iteration:
                load_training_state(learner, undo)
            return {"time/update_s": time.perf_counter() - start}
        learner.updating = True
        learner.optimizer.step()
        for master, weight in low_precision:
            weight.data.copy_(master)
    metrics = {"train/loss": total / config.num_iterations, "train/grad_norm": fmean(norms)}
    metrics["time/update_s"] = time.perf_counter() - start
    policy.eval()
    gap, d = ((other - old)[order][batch.completion_mask[order]] for other in (batch.logprobs, ref))  # (M,) each
    measured = {"logprob_gap_mean": gap.abs(), "logprob_gap_max": gap.abs()}
    measured |= {"kl": d.exp() - d - 1} if config.beta > 0 else {}
    measured |= {"clip_ratio": torch.cat([gap[:0], *clipped])} if config.num_iterations > 1 else {}
    for name, values in measured.items():
        if len(tokens := torch.cat(gather([values.cpu()]))):
            metrics[f"train/{name}"] = (tokens.max() if name.endswith("max") else tokens.mean()).item()
    return metrics


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation


def generate(learner: Learner, problems: Rows, num_generations: int, noise: Tensor | None) -> tuple[Any, ...]:
    """Samples and rewards: (prompts, rollout, a record for each completion, seconds of the two phases)."""
    config, start = learner.config, time.perf_counter()
    prompts = tokenize_prompts(learner.tokenizer, problems, config)
    batch = rollout(learner.policy, prompts, num_generations=num_generations, eos_ids=learner.eos_ids, noise=noise,
                    max_completion_length=config.max_completion_length, temperature=config.temperature,
                    decoder=learner.decoder)  # fmt: skip
    lengths = batch.completion_mask.sum(-1).tolist()
    ids = [row[:length] for row, length in zip(batch.completion_ids.tolist(), lengths, strict=True)]
    texts = learner.tokenizer.batch_decode(ids, skip_special_tokens=True)
    sampled = time.perf_counter()
    problems = [p for p in problems for _ in range(num_generations)]
    golds = [p["answer"] for p in problems]
    columns: dict[str, list] = {"question": [p["question"] for p in problems], "answer": golds, "completion": texts}
    columns |= compute_rewards(learner.functions, problems, texts, ids, learner.run) | {
        "right": [reward == 1 for reward in reward_module.accuracy_reward(texts, answer=golds)],
        "parsed": [reward_module.is_parsed(text, gold) for text, gold in zip(texts, golds, strict=True)],
        "length": lengths, "truncated": [row[-1] not in learner.eos_ids for row in ids],
        "entropy": batch.entropy.sum(-1).tolist()}  # fmt: skip
    records = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return prompts, batch, records, {"time/rollout_s": sampled - start, "time/reward_s": time.perf_counter() - sampled}


def check_diverged(learner: Learner, records: Rows) -> None:
    """Exits with code 4 if the policy's own distribution is not finite: then its weights are of no use any more."""
    if not all(math.isfinite(r["entropy"]) for r in records):
        if PartialState().is_main_process:
            write_rows(learner.run / f"bad_batch_{learner.done[0] + 1:06d}.jsonl", records)
        names = sorted(str(path) for path in learner.run.glob("checkpoints/step_*"))
        good = [name for name in names if not name.endswith(f"{learner.done[0]:06d}")][-1:]  # not of these weights
        text = f"from --model {good[0]}, the last good checkpoint" if good else "there is no good checkpoint"
        fail(4, f"the policy's log-probs are not finite, it has diverged: start with a lower --learning-rate, {text}")


def evaluate(learner: Learner, problems: Rows, key: str) -> tuple[Metrics, Rows]:
    """Accuracy, greedy and sampled once at the training temperature: (metrics under `key`, two records a problem).

    The sampling noise is the same at every evaluation, so that before and after are a paired comparison.
    """
    config, split, records = learner.config, key.split("/")[0], Rows()
    noise = share(uniform_noise(config.seed, key, 0, len(problems), config.max_completion_length))
    chunk = len(share(range(config.prompts_per_step * config.num_generations)))  # as many as fit in training
    problems = share(problems)
    for start in range(0, len(problems), chunk):
        for mode, uniform in (("greedy", None), ("sampled", noise[start : start + chunk])):
            _, _, rows, _ = generate(learner, problems[start : start + chunk], 1, uniform)
            records += [{"split": key.removesuffix("accuracy").rstrip("/_"), "mode": mode, **row} for row in rows]
    records = gather(records)
    check_diverged(learner, records)
    greedy, sampled = ([r for r in records if r["mode"] == mode] for mode in ("greedy", "sampled"))
    low, high = reward_module.wilson_interval(sum(r["right"] for r in greedy), len(greedy))
    metrics = {key: fmean(r["right"] for r in greedy), f"{key}_low": low, f"{key}_high": high}
    names = {f"{key}_sampled": "right", f"{split}/reward": "reward", f"{split}/parsed_ratio": "parsed"}
    names[f"{split}/clipped_ratio"] = "truncated"
    return metrics | {name: fmean(r[column] for r in sampled) for name, column in names.items()}, records


# ----------------------------------------------------------------------------------------------------------------------
# Run folder, checkpoints, logging


def make_run_folder(config: Config, device: torch.device) -> Path:
    """{exp}__{task}__{model}__{seed}__{time}, with the config, where it runs and the script's own source."""
    script, stamp = Path(__file__).resolve(), time.strftime("%Y%m%d-%H%M%S") + f"-{time.time_ns() // 10**6 % 1000:03d}"
    model = re.sub(r"[^\w.-]+", "-", Path(config.model).name)
    run = Path(config.run_dir) / f"{script.stem}__{config.task}__{model}__{config.seed}__{stamp}"
    git = "git describe --always --dirty --abbrev=40 --exclude='*'"  # no tags; nothing where git is not there
    described = subprocess.run(git, shell=True, cwd=script.parent, capture_output=True, text=True).stdout.strip()
    # remote_train.sh names the commit of a tree that it copied.
    environment = {"command": sys.argv, "python": sys.version, "commit": os.getenv("WANDB_GIT_COMMIT") or described,
                   "packages": {d.name: d.version for d in importlib.metadata.distributions()},
                   "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu"}  # fmt: skip
    with writing(run):
        run.mkdir(parents=True)
        for name, content in (("config.json", dataclasses.asdict(config)), ("environment.json", environment)):
            (run / name).write_text(json.dumps(content, indent=2))
        (run / script.name).write_bytes(script.read_bytes())
    return run


def find_run(config: Config) -> Path:
    """The run folder that --resume names; exits with code 2 if there is none, or not one of this script."""
    name = Path(__file__).name
    runs = [path.parent for path in Path(config.run_dir).glob(f"*/{name}")]
    newest = max(runs, key=lambda run: run.name.rsplit("__", 1)[-1], default=Path(config.run_dir))
    run = newest if config.resume == "latest" else Path(config.resume)
    if not (run / "config.json").is_file() or not (run / name).is_file():
        fail(2, f"'{run}' is no run folder of {name}: --resume takes one, or latest with --run-dir")
    return run


def check_resumed(config: Config, run: Path) -> None:
    """Exits with code 2 and the list of differences if a setting that changes the maths is not what it was."""
    free = SPEED | ({"num_steps", "num_epochs"} if config.lr_schedule == "constant" else set())  # else rates change
    before, now = json.loads((run / "config.json").read_text()), json.loads(json.dumps(dataclasses.asdict(config)))
    kept = sorted((before.keys() & now.keys()) - free)
    if changed := [f"{name} {before[name]} -> {now[name]}" for name in kept if before[name] != now[name]]:
        fail(2, f"'{run}' was begun with other settings, leave these as they were: {', '.join(changed)}")


def lock(run: Path) -> Any:
    """An open file, locked until this process ends, however it ends; exits with code 2 if another one holds it."""
    with writing(run / "lock"):
        file = (run / "lock").open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            fail(2, f"process {file.read()} works in '{run}': wait for it, or stop it")
        file.truncate(0)
        print(os.getpid(), end="", file=file, flush=True)
    return file


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Exits with code 5 if what is done inside, to write this file or folder, raises."""
    try:
        yield
    except Exception as error:  # noqa: BLE001  # each library has its own for a full disk
        fail(5, f"cannot write '{path}' ({error!r:.200}): free space there, or see to its rights, then --resume")


def write_rows(path: Path, rows: Rows, mode: str = "w") -> None:
    """One line of JSON each, in ASCII: no character of a completion ends it early."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)  # of a batch that failed on a second machine
        with path.open(mode) as file:
            file.writelines(json.dumps(row, default=str) + "\n" for row in rows)


def replace(path: Path, text: str) -> None:
    """Writes a file beside and renames it into place, so that a crash leaves the old one or the new one."""
    with writing(path):
        (beside := path.with_name(f"{path.name}.partial")).write_text(text)
        beside.replace(path)


def save_checkpoint(learner: Learner) -> None:
    """All that a resumed run needs, written beside and renamed into place: a crash leaves the last good checkpoint."""
    final, keep = learner.run / "checkpoints" / f"step_{learner.done[0]:06d}", learner.config.keep_checkpoints
    if final.exists():
        return
    partial = final.with_name("partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a save that was killed
    state = {"done": json.dumps(learner.done), "config": dataclasses.asdict(learner.config), **training_state(learner)}
    state |= {"micro_batch_size": learner.micro_batch_size}
    try:
        with writing(final):
            for part in (learner.policy, learner.tokenizer):  # in Hugging Face format, for everybody else
                part.save_pretrained(partial)
            torch.save(state, partial / "trainer.pt")
            (partial / "checksum").write_text(checksum(partial))
            partial.rename(final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # of a save that failed
    for old in sorted(final.parent.glob("step_*"))[:-keep] if keep else ():
        shutil.rmtree(old, ignore_errors=True)


def checksum(folder: Path) -> str:
    """Of a checkpoint's tensors; neither of their formats has its own."""
    digest = hashlib.sha256()
    for path in sorted((*folder.glob("*.safetensors"), folder / "trainer.pt")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def find_checkpoint(run: Path) -> list[Path]:
    """The newest one that is whole, those that are not being set aside; exits with code 2 if there are only such."""
    damaged: list[Path] = []
    for folder in sorted(run.glob("checkpoints/step_*"), reverse=True):
        with contextlib.suppress(OSError):
            if (folder / "checksum").read_text() == checksum(folder):
                for path in damaged:  # out of the way of those that will be written again
                    path.rename(path.with_name(f"damaged_{path.name}_{time.time_ns()}"))
                return [folder]
        say(f"'{folder}' is damaged: taking the one before")
        damaged.append(folder)
    return fail(2, f"every checkpoint in '{run}' is damaged: start anew without --resume") if damaged else []


def restore_checkpoint(learner: Learner, folder: Path) -> None:
    """Takes up the run where `save_checkpoint` left it."""
    state = torch.load(folder / "trainer.pt", map_location=learner.policy.device, weights_only=True)
    load_training_state(learner, state)
    if learner.config.micro_batch_size == "auto":
        learner.micro_batch_size = state["micro_batch_size"]
    learner.done = tuple(json.loads(state["done"]))


def reopen_run(config: Config, run: Path, step: int) -> Rows:
    """Records the settings and cuts off what was logged from `step` on; returns the metrics that stay."""
    replace(run / "config.json", json.dumps(dataclasses.asdict(config) | {"resume": ""}, indent=2))
    if (script := Path(__file__)).read_bytes() != (run / script.name).read_bytes():
        say(f"{script.name} has changed since this run began; the run folder keeps both")
        replace(run / f"from_step_{step:06d}_{script.name}", script.read_text(encoding="utf-8"))
    for path in (run / "completions.jsonl", run / "metrics.jsonl"):
        rows, size = Rows(), 0
        with path.open("ab+") as file:
            file.seek(0)
            for line in file:  # the last one may have been cut short
                if not line.endswith(b"\n") or (row := json.loads(line)).pop("step") >= step:
                    break
                rows.append(row)
                size += len(line)
            file.truncate(size)
    return rows


def stop_if_told(learner: Learner) -> None:
    """Ends every process if a signal has come to one of them."""
    if numbers := gather(list(learner.signals)):
        raise SystemExit(128 + numbers[0])


@contextlib.contextmanager
def saved_at_exit(learner: Learner) -> Iterator[None]:
    """Saves on SIGINT, SIGTERM and SIGHUP, and exits with 128 + n: at once, or after a step whose update has begun.

    It also saves when something else fails and the weights are as the last step left them. A second SIGINT waits for
    nothing.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}

    def stop(number: int, _: Any) -> None:
        now, told = time.monotonic(), bool(learner.signals)
        if number == signal.SIGINT and now - learner.signals.get(number, now) > 0.3:  # sooner: a launcher's copy of it
            os._exit(128 + number)
        learner.signals.setdefault(number, now)
        if not told and not learner.updating and PartialState().num_processes == 1:  # several agree where to stop
            raise SystemExit(128 + number)

    for number, handler in handlers.items():
        signal.signal(number, handler if handler == signal.SIG_IGN else stop)  # nohup ignores SIGHUP
    try:
        yield
    except (SystemExit, Exception) as end:
        code, stopped = end.code if isinstance(end, SystemExit) else 1, [128 + number for number in handlers]
        whole, learner.updating = not learner.updating, True  # no signal interrupts the saving
        if whole and code in (1, 7, 8, *stopped) and PartialState().is_main_process:
            with contextlib.suppress(*[SystemExit] * (code == 1)):  # if saving fails too, it must not hide the first
                save_checkpoint(learner)
                say(f"saved; to continue: uv run {Path(__file__).name} --resume {shlex.quote(str(learner.run))}")
        if code in stopped:
            PartialState().wait_for_everyone()
        raise
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def wandb_run(config: Config, run: Path) -> Iterator[Any]:
    """None, or with --track a W&B run with the run folder's name, grouped over seeds; closed whatever happens."""
    if not config.track or not PartialState().is_main_process:
        yield None
        return
    import wandb

    # Else a network that is gone holds the process for ever.
    os.environ.update({"WANDB_INIT_TIMEOUT": "20", "WANDB_FINISH_TIMEOUT": "20"} | os.environ)
    environment = json.loads((run / "environment.json").read_text())
    recorded = dataclasses.asdict(config) | {name: environment[name] for name in ("commit", "device")}
    tags = [Path(__file__).stem, config.preset, config.task, Path(config.model).name[:64]]
    names: Any = {"project": os.getenv("WANDB_PROJECT") or "dr-grpo", "group": run.name.rsplit("__", 2)[0]}
    names |= {"name": run.name, "id": run.name, "resume": "allow"}  # a resumed run goes on in the same one
    try:
        tracker = wandb.init(**names, dir=run, save_code=True, config=recorded, tags=tags)
    except wandb.Error as error:
        fail(2, f"no W&B ({str(error)!r:.200}): check network and login, or WANDB_MODE=offline and `wandb sync` later")
    tracker.save(str(reward_module.__file__), base_path=str(Path(reward_module.__file__).parent), policy="now")
    code = 1
    try:
        yield tracker
        code = 0
    finally:
        tracker.finish(exit_code=code)


def log(run: Path, tracker: Any, step: int, metrics: Metrics, records: Rows, table: Rows) -> None:
    """To metrics.jsonl, completions.jsonl and, if tracked, to W&B, there with a table of completions if it has rows."""
    for name, rows in (("metrics", [metrics]), ("completions", records)):
        write_rows(run / f"{name}.jsonl", [{"step": step, **row} for row in rows], mode="a")
    sent = run / "wandb" / "next_step"  # W&B itself does not know it offline
    if tracker is not None and step >= (tracker.step or int(sent.read_text() if sent.exists() else 0)):
        import wandb

        cells = [[step, *map(str, row.values())] for row in table]
        tables = {"completions/table": wandb.Table(columns=["step", *table[0]], data=cells)} if table else {}
        tracker.log(metrics | tables, step=step)
        tracker.summary.update({f"{name}_before": value for name, value in metrics.items() if step == 0})
        replace(sent, str(step + 1))


PEAK_FLOPS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200 NVL": 835e12,
              "H200": 989e12, "A100": 312e12, "L40S": 362e12}  # fmt: skip  # bf16, dense, by NVIDIA's data sheets


def gradient_flops(policy: Any, prompts: Prompts, lengths: Tensor, prompt_index: Tensor) -> float:
    """FLOPs that the exact gradient over completions of these lengths (n,) needs, 2 for a multiplication and addition.

    Forward once and backward twice; each of their prompts once, the head on completion tokens alone, no recomputation.
    """
    shape, head = policy.config, policy.get_output_embeddings().weight.numel()
    body = sum(p.numel() for p in policy.base_model.parameters()) - policy.get_input_embeddings().weight.numel()
    size = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    pair = 2 * shape.num_hidden_layers * shape.num_attention_heads * size  # of one token that attends to another
    widths = torch.tensor([len(prompt) for prompt in prompts], device=lengths.device)
    before, widths, read = widths[prompt_index], widths[prompt_index.unique()], lengths - 1  # the last is not read
    rows = body * read + head * lengths + pair * read * (before + read / 2)  # (n,)
    return 6 * (rows.sum() + (body * widths + pair * widths**2 / 2).sum()).item()


def gpu_metrics(learner: Learner, prompts: Prompts, batch: Rollout, advantages: Tensor, loss_mask: Tensor,
                seconds: float) -> Metrics:  # fmt: skip
    """Share of the GPU's peak that the update reached; utilization in % and memory in GB as NVML sees them."""
    if learner.policy.device.type != "cuda":
        return {}
    import pynvml

    metrics = Metrics()
    rows = ((advantages != 0) & loss_mask.any(-1) | (learner.config.beta > 0)).nonzero()[:, 0]
    index = rows // learner.config.num_generations
    flops = gradient_flops(learner.policy, prompts, batch.completion_mask.sum(-1)[rows], index)
    for peak in [peak for name, peak in PEAK_FLOPS.items() if name in torch.cuda.get_device_name()][:1]:
        metrics["perf/mfu"] = learner.config.num_iterations * flops / seconds / peak
    with contextlib.suppress(pynvml.NVMLError):  # a slice of a GPU has no utilization of its own
        metrics |= {"gpu/memory_gb": torch.cuda.device_memory_used() / 1e9, "gpu/utilization": torch.cuda.utilization()}
    return metrics


def peak_memory_gb(device: torch.device) -> float:
    """Most memory in use so far, in GB: torch's allocations on a GPU, the process's resident set on a CPU."""
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return (torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident) / 1e9


# ----------------------------------------------------------------------------------------------------------------------
# Main


def preflight(learner: Learner, prompt: list[int], num_steps: int) -> None:
    """One step in which each prompt is this one, the longest, and each completion has full length, without a trace.

    Says what num_steps such steps will take; exits with code 8 if one does not fit into memory. On a GPU a first one
    compiles and captures before it.
    """
    config, length, groups = learner.config, learner.config.max_completion_length, learner.config.num_generations
    prompts = [prompt for _ in share(range(config.prompts_per_step))]
    noise = uniform_noise(config.seed, "preflight", 0, len(prompts) * groups, length)
    endless = [-1] * len(learner.eos_ids)  # ids of no token, as many as in training, whose graphs these then are
    say(
        "preflight: a step of full length"
        + " after a first one, which compiles" * getattr(learner.policy, "fuse", False)
    )
    make = torch.optim.SGD if learner.optimizer.state else torch.optim.AdamW  # of a resumed run the state is there
    optimizer, learner.optimizer = learner.optimizer, make(learner.masters, lr=0.0, fused=True)
    try:
        for _ in range(2 if learner.decoder else 1):
            start = time.perf_counter()
            batch = rollout(learner.policy, prompts, num_generations=groups, max_completion_length=length, noise=noise,
                            temperature=config.temperature, eos_ids=endless, decoder=learner.decoder)  # fmt: skip
            rollout_s = time.perf_counter() - start
            # Random tokens, of which no two completions are equal and computed once.
            batch.completion_ids = (noise * learner.policy.config.vocab_size).long().to(learner.policy.device)
            update(learner, prompts, batch, torch.ones_like(batch.logprobs[:, 0]), batch.completion_mask)
    except torch.OutOfMemoryError:
        size = f"--micro-batch-size (now {config.micro_batch_size})"
        fail(8, f"a step of full length does not fit into memory: lower {size} or --max-completion-length")
    finally:
        learner.optimizer, learner.updating = optimizer, False
    seconds, memory = time.perf_counter() - start, peak_memory_gb(learner.policy.device)
    tokens = num_steps * config.prompts_per_step * groups * length / 1e6
    say(f"preflight: {seconds:.2f} s, {rollout_s:.2f} of it rollout, in {memory:.1f} GB; {num_steps} such steps:"
        f" {num_steps * seconds / 3600:.2f} hours without evaluations, {tokens:.1f}M completion tokens")  # fmt: skip
    if learner.decoder and torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()  # perf/peak_memory_gb is of training


def train_step(learner: Learner, train: Rows, step: int, num_steps: int) -> tuple[Metrics, Rows]:
    """Samples, rewards, updates: (metrics, a record for each completion of the first two groups, or of all of a step
    that was not applied, whose metrics lack train/loss and train/grad_norm).
    """
    config, device, groups = learner.config, learner.policy.device, learner.config.num_generations
    noise = uniform_noise(config.seed, "sampling", step, config.prompts_per_step, groups * config.max_completion_length)
    noise = share(noise).view(-1, config.max_completion_length)  # (n, L), n the completions of this process
    prompts, batch, records, metrics = generate(learner, share(problems_of_step(train, step, config)), groups, noise)
    advantages = group_advantages(torch.tensor([r["reward"] for r in records]), groups, config.scale_rewards)  # (n,)
    truncated = torch.tensor([r["truncated"] for r in records], device=device)  # (n,)
    loss_mask = batch.completion_mask & ~(truncated[:, None] & config.mask_truncated_completions)
    learner.optimizer.param_groups[0]["lr"] = learning_rate(step, num_steps, config)
    stop_if_told(learner)
    metrics |= update(learner, prompts, batch, advantages.to(device), loss_mask)
    metrics |= gpu_metrics(learner, prompts, batch, advantages.to(device), loss_mask, metrics["time/update_s"])

    records = gather([r | {"advantage": a} for r, a in zip(records, advantages.tolist(), strict=True)])  # N of them
    check_diverged(learner, records)
    by_group = [records[i : i + groups] for i in range(0, len(records), groups)]  # P lists of G
    flat = [group for group in by_group if all(r["advantage"] == 0 for r in group)]  # these teach nothing
    all_right = [group for group in flat if all(r["right"] for r in group)]
    tokens = sum(r["length"] for r in records)
    metrics |= {
        "train/reward": fmean(r["reward"] for r in records),
        "train/epoch": step * config.prompts_per_step / len(train),
        "train/learning_rate": learning_rate(step, num_steps, config),
        "train/entropy": sum(r["entropy"] for r in records) / tokens,
        "train/frac_reward_zero_std": len(flat) / len(by_group),
        "train/frac_all_right": len(all_right) / len(by_group),
        "train/frac_all_wrong": (len(flat) - len(all_right)) / len(by_group),
        "completions/mean_length": tokens / len(records),
        "completions/clipped_ratio": fmean(r["truncated"] for r in records),
        "completions/parsed_ratio": fmean(r["parsed"] for r in records),
        "perf/completion_tokens_per_s": tokens / sum(value for name, value in metrics.items() if "time/" in name),
        "perf/peak_memory_gb": peak_memory_gb(device),
    }
    given = {name: [r[name] for r in records if r[name] is not None] for name in records[0] if "rewards/" in name}
    metrics |= {f"{name}/mean": fmean(values) for name, values in given.items() if values}
    shown = records[: 2 * groups] if "train/grad_norm" in metrics else records  # two groups show what is learned
    return metrics, [{"split": "train", **r} for r in shown]


def main(config: Config) -> Metrics:
    """Trains, evaluates, writes the run folder; returns every metric's last value, and as *_before those of step 0."""
    load_dotenv()  # before transformers is imported, which reads HF_HOME
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # its retries would bury our one line
    check_config(config)
    config = dataclasses.replace(config, task="gsm8k" if config.dataset_path else config.task)  # the file's format
    if config.resume:
        check_resumed(config, find_run(config))
    if config.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # without it cuBLAS does not repeat
        torch.backends.cuda.enable_mem_efficient_sdp(False)
        torch.use_deterministic_algorithms(True, warn_only=True)
    functions = load_rewards(config.rewards)
    device = start_processes(config)
    if first := PartialState().is_main_process:  # the process that prints and writes
        say(f"preset {config.preset} on {device}: {config.model}, task {config.task}, seed {config.seed}")
    train, held_out = load_problems(config)
    tokenizer = load_pretrained("AutoTokenizer", config)
    longest = max(tokenize_prompts(tokenizer, [*train, *held_out], config), key=len)  # too long: found here
    learner = make_learner(config, functions, tokenizer, device)
    num_steps = math.ceil(config.num_epochs * len(train) / config.prompts_per_step) or config.num_steps
    eval_key = "eval/train_subset_accuracy"
    run = gather([find_run(config) if config.resume else make_run_folder(config, device)] if first else [])[0]
    held, learner.run = lock(run) if first else contextlib.nullcontext(), run
    history = Rows()  # metrics of steps 0, 1, ...
    if config.resume:
        for folder in gather(find_checkpoint(run) if first else []):  # none: it was killed before its first
            restore_checkpoint(learner, folder)
        history = gather(reopen_run(config, run, learner.done[0]) if first else [])
    num_steps = max(num_steps, learner.done[0])  # a resumed run may have done more
    good = learner.done  # the last step that was applied
    with held, wandb_run(config, run) as tracker, saved_at_exit(learner):
        say(f"run folder: {run}" + f", going on after step {learner.done[0]}" * bool(config.resume))
        preflight(learner, longest, num_steps - learner.done[0])
        missing = "" if device.type == "cuda" else "; no GPU, so gpu/* and perf/mfu are left out"
        say(f"micro-batches of {learner.micro_batch_size} completions{missing}")
        for step in range(learner.done[0], num_steps + 1):  # step 0 is the evaluation before training
            if step > learner.done[0]:
                learner.done = step, *train_step(learner, train, step, num_steps)
            learner.updating = False
            stop_if_told(learner)
            metrics, table = dict(learner.done[1]), learner.done[2][: 2 * config.num_generations]
            history.append(metrics)
            if bad_steps := streak(history[1:], "train/grad_norm", None):
                batch = run / f"bad_batch_{step:06d}.jsonl"
                if first:
                    write_rows(batch, learner.done[2])
                say(f"step {step}: its loss or gradient is not finite, so it was not applied; see {batch}")
            else:
                good = learner.done
            if bad_steps == config.max_bad_steps > 0:
                learner.done = good
                if first:
                    save_checkpoint(learner)
                PartialState().wait_for_everyone()  # the first process to exit ends the others
                text = f"start anew with a lower --learning-rate, from --model {run}/checkpoints/step_{good[0]:06d}"
                fail(4, f"{bad_steps} such steps in a row: {text}, the last good checkpoint")
            silent = streak(history[1:], "train/frac_reward_zero_std", 1) == config.patience > 0
            records, last = list(table), step == num_steps or (silent and config.abort_on_no_signal)
            if step == 0 or last or (config.eval_every and step % config.eval_every == 0):
                for key, problems in (("eval/accuracy", held_out), (eval_key, train)):
                    if problems:
                        measured, rows = evaluate(learner, problems, key)
                        metrics |= measured
                        records += rows
            last |= (reached := metrics.get(eval_key, -1) >= config.target_accuracy)
            stop_if_told(learner)
            if first:
                shown = table * (config.log_completions and eval_key in metrics)
                log(run, tracker, step, metrics, records, shown)
                if eval_key in metrics or step % max(1, num_steps // 20) == 0:
                    keys = "train/reward", "completions/mean_length", eval_key, f"{eval_key}_sampled", "eval/accuracy"
                    text = ", ".join(f"{key} {metrics[key]:.3f}" for key in keys if key in metrics)
                    say(f"step {step} of {num_steps}: {text}")
                if last or (config.save_every and step and step % config.save_every == 0 and not bad_steps):
                    save_checkpoint(learner)
            part, right = ("completions", "train/frac_all_right") if step else ("eval", f"{eval_key}_sampled")
            if silent or (step == 0 and not 0.02 < metrics[right] < 0.98):
                shares = [metrics[key] for key in (right, f"{part}/parsed_ratio", f"{part}/clipped_ratio")]
                cause = f"step {step}: hardly any signal, {shares[0]:.0%} right; {reward_module.likely_cause(*shares)}"
                if not (silent and config.abort_on_no_signal):  # then it is the error
                    say(cause)
            if last:
                break
    if first:
        # The closing table and curve.png, from a program of its own: its failure does not fail the run.
        subprocess.run([sys.executable, Path(__file__).resolve().with_name("report.py"), run], check=False)
        accuracy = history[-1][eval_key]
        say(f"{'passed' if reached else 'failed'}: {accuracy:.3f} of the {len(train)} problems are right")
    if silent and config.abort_on_no_signal and not reached:
        PartialState().wait_for_everyone()
        fail(3, cause)
    if first and not reached:  # under a launcher, the first process to fail would end this one
        fail(6, f"target {config.target_accuracy} missed: try more --num-generations or a lower --learning-rate")
    results = {name: value for row in history for name, value in row.items()}
    return results | {f"{name}_before": value for name, value in history[0].items()}


def streak(history: list[Metrics], name: str, value: float | None) -> int:
    """In how many of the last steps, without a gap, this metric had this value; None: was not there."""
    return next((i for i, metrics in enumerate(reversed(history)) if metrics.get(name) != value), len(history))


def parse_config(arguments: list[str]) -> Config:
    """--preset or --resume first, then every flag, with the values of that preset or run as defaults."""
    preset: Any = ["auto", *re.findall(r"--preset[= ](\S+)", " ".join(arguments))][-1]
    preset = {"auto": "qwen" if torch.cuda.is_available() else "tiny"}.get(preset, preset)
    config = tyro.cli(Config, default=PRESETS.get(preset, Config()), args=arguments, description=__doc__)
    if config.resume:  # once more, with that run's settings as the defaults
        recorded = json.loads(((run := find_run(config)) / "config.json").read_text())
        recorded = {k: tuple(v) if isinstance(v, list) else v for k, v in recorded.items() if hasattr(config, k)}
        config = tyro.cli(Config, default=Config(**recorded), args=arguments, description=__doc__)
        return dataclasses.replace(config, resume=str(run))
    return dataclasses.replace(config, preset=preset)


if __name__ == "__main__":
    try:
        main(parse_config(sys.argv[1:]))
        PartialState().destroy_process_group()
    except KeyboardInterrupt:  # before training; from then on it is saved
        raise SystemExit(130) from None
    finally:  # gloo's threads may yet let go of tensors, which aborts a process whose interpreter is ending
        time.sleep(0.5 if "RANK" in os.environ else 0)
