"""The overfitting experiment of grpo_overfit.py, sized to fill one H100, in one file.

Differs from grpo_overfit.py:
1. The qwen preset has 64 prompts x 16 generations a step and 1,024 completion tokens.
2. --micro-batch-size auto, the default: the update starts with all completions at once. If memory runs out, it halves
   their number, continues with the same completions, and keeps the new size; exit code 8 if not even one fits.
3. Metrics of the hardware: perf/micro_batch_size, and on a GPU perf/mfu, gpu/utilization and gpu/memory_gb.

For each prompt the policy samples a group of G completions, and a function rewards each of them. The group's mean
reward is the baseline, and the policy gradient does the rest: no critic, no reference model, no inference server.
Dr GRPO (Liu et al. 2025, arXiv 2503.20783) is GRPO without its two biases, the division by the group's standard
deviation and the division by each completion's length:

    advantages = rewards - mean(rewards over the group)                                           # (N,), N = P * G
    ratio      = exp(logprobs - old_logprobs)                                                     # (N, T)
    loss       = -1 / (N * L) * sum over completions and tokens of
                 min(ratio * advantages, clip(ratio, 1 - epsilon, 1 + epsilon) * advantages)

with L = max_completion_length. N and L are constants of the step, so every token has the same weight. Shapes in the
comments: P prompts, G generations, N = P * G completions of a step, n those of this process (N without accelerate), m
those of a micro-batch, S prompt tokens, T completion tokens, H hidden size, V vocabulary, B rows of a batch.

    uv run grpo_overfit_max_gpu.py             # with CUDA: 100 problems of GSM8K; without: the tiny preset, 1 minute

Exit codes: 0 done, 1 an exception, 2 bad input, 4 not finite, 6 target missed, 8 out of memory, 128 + n stopped by
signal n. A setting marked [maths] changes results, so it cannot change when a run is resumed; one marked [speed] may.
"""
# ruff: noqa: B023 (the function in the loop of main is called in the iteration that defines it)

import contextlib
import functools
import hashlib
import json
import math
import os
import pkgutil
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from importlib.metadata import distributions
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any, Literal

import torch
import tyro
from accelerate import PartialState
from accelerate.utils import gather_object, reduce
from dotenv import load_dotenv
from filelock import FileLock
from requests.utils import get_netrc_auth
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from rewards import accuracy_reward, is_parsed, signal_line, wilson_interval

# ----------------------------------------------------------------------------------------------------------------------
# Config


@dataclass(frozen=True)
class Config:
    """Every setting of a run; these are the defaults of the tiny preset."""

    preset: Literal["auto", "qwen", "tiny"] = "tiny"
    """Which defaults to start from, read before the other flags; auto: qwen if CUDA is available, else tiny. [maths]"""
    task: str = "mixed"
    """What to train on: mixed (sums and word problems) or gsm8k. [maths]"""
    model: str = "models/tiny"
    """Hugging Face id or folder of a causal language model. [maths]"""
    dataset_path: str = ""
    """A JSONL file with `question` and `answer`, to use instead of gsm8k's training split on the hub. [maths]"""
    num_samples: int = 100
    """Problems to overfit: a fixed sample of the training problems, the same for every seed. [maths]"""
    target_accuracy: float = 1.0
    """Greedy accuracy on these problems, at most 1; the run ends when an evaluation reaches it. [maths]"""
    prompt_format: Literal["chat", "plain"] = "chat"
    """chat: the tokenizer's chat template; plain: "Question: ... Answer:", for models without a template. [maths]"""
    system_prompt: str | None = None
    """None: asks for <think> and <answer> tags if `format` is rewarded, else no system prompt. [maths]"""
    rewards: tuple[str, ...] = ("accuracy=2.0",)
    """Reward functions as name=weight: accuracy, format, reasoning, a NAME_reward of this script, or any
    module:function with TRL's signature. The reward is their weighted sum; a weight that is not given is 1. [maths]"""

    num_steps: int = 300
    """Steps (one rollout each); ignored if num_epochs is set. May grow later with lr_schedule constant. [maths]"""
    num_epochs: int = 0
    """If above 0: passes over the training problems instead of num_steps. [maths]"""
    prompts_per_step: int = 50
    """P, prompts per step. [maths]"""
    num_generations: int = 32
    """G, completions per prompt, at least 2; their mean reward is the baseline. [maths]"""
    max_prompt_length: int = 1024
    """In tokens; a longer prompt is an error and is never cut. [maths]"""
    max_completion_length: int = 12
    """L, in tokens; longer completions are cut off. L is also a constant that the loss divides by. [maths]"""
    temperature: float = 1.0
    """Temperature of sampling and of the log-probs that are trained, above 0. [maths]"""

    learning_rate: float = 1.5e-4
    """Peak learning rate of AdamW. [maths]"""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After warmup: constant, or a fall that would reach zero one step after the last. [maths]"""
    warmup_steps: int = 20
    """Steps of linear warmup. [maths]"""
    weight_decay: float = 0.0
    """Weight decay of AdamW. [maths]"""
    max_grad_norm: float = 1.0
    """A gradient with a larger norm is scaled down to this one; 0: no clipping. [maths]"""
    num_iterations: int = 1
    """Optimizer updates per rollout; above 1 the ratio can differ from 1, so epsilon matters. [maths]"""
    epsilon: float = 0.2
    """Clip range of the ratio. [maths]"""
    beta: float = 0.0
    """Weight of the KL penalty to the starting policy; above 0 loads a second copy of the model. [maths]"""
    loss_type: Literal["dr_grpo", "grpo", "bnpo"] = "dr_grpo"
    """For ablations. grpo: mean over each completion's tokens; bnpo: mean over all tokens of the step. [maths]"""
    scale_rewards: bool = False
    """For ablations: divide advantages by the group's standard deviation, as GRPO does. [maths]"""
    mask_truncated_completions: bool = False
    """Leave completions without a stop token out of the loss, but not out of the group's mean. [maths]"""

    eval_every: int = 10
    """Steps between evaluations; there is always one before and one after training; 0: only these. [speed]"""
    eval_samples: int = 200
    """Held-out problems per evaluation; 0: all. [maths]"""
    save_every: int = 100
    """Steps between checkpoints; the newest two are kept; one is always written at the end; 0: only that. [speed]"""
    resume: str = ""
    """A run folder to continue, or latest: this script's newest run in run_dir. Its settings become the defaults, and
    those marked [maths] cannot change. [speed]"""
    micro_batch_size: int | Literal["auto"] = "auto"
    """Completions per forward pass of the update; the gradient does not depend on it. auto: as many as fit. [speed]"""
    gradient_checkpointing: bool = False
    """Keep only each layer's inputs, and compute the rest again in the backward pass. [speed]"""
    seed: int = 1
    """Seed of the prompt order and the sampling noise. [maths]"""
    run_dir: str = "runs"
    """Folder in which the run's own folder is made. [speed]"""
    track: bool = False
    """Log to Weights & Biases, to WANDB_ENTITY and WANDB_PROJECT from the environment or .env. [speed]"""
    log_completions: bool = False
    """With --track: also log a table of completions at every evaluation while training. [speed]"""


PRESETS = {
    "tiny": Config(),
    "qwen": Config(preset="qwen", task="gsm8k", model="Qwen/Qwen2-0.5B-Instruct", num_steps=400, prompts_per_step=64,
                   rewards=("accuracy=2.0", "format=0.5", "reasoning=0.5"), max_prompt_length=512,
                   max_completion_length=1024, temperature=0.7, learning_rate=5e-6, lr_schedule="constant",
                   warmup_steps=20, num_generations=16, target_accuracy=0.95),
}  # fmt: skip

# What may change when a run is resumed: the settings marked [speed].
SPEED = {"eval_every", "save_every", "resume", "micro_batch_size", "run_dir", "track", "log_completions"}
SPEED.add("gradient_checkpointing")


def fail(exit_code, message):
    """Ends the program with one line on stderr that says what is wrong and what to do."""
    print("error:", " ".join(message.split()), file=sys.stderr)
    raise SystemExit(exit_code)


def require(condition, message):
    """Exits with code 2 unless the condition holds."""
    if not condition:
        fail(2, message)


@contextlib.contextmanager
def refused(trouble, cure):
    """Exits with code 2 if the body raises an exception."""
    try:
        yield
    except Exception as error:  # noqa: BLE001
        fail(2, f"{trouble} ({error!r:.200}): {cure}")


def say(text):
    """Prints above the progress bar, once for all processes; a closed terminal does not end the run."""
    if text and PartialState().is_main_process:
        with contextlib.suppress(OSError):
            tqdm.write(text)
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:
                # What stays in the buffer would fail again at exit, and change the exit code.
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def check_config(config):
    """Exits with code 2 on a setting that cannot work, before anything is loaded."""
    require(config.task in TASKS, f"unknown task '{config.task}': --task takes one of {', '.join(TASKS)}")
    require(config.target_accuracy <= 1, f"target_accuracy is {config.target_accuracy}: it must be at most 1")
    require(config.num_generations > 1, "a group needs two completions: raise --num-generations")
    for name in ("temperature", "prompts_per_step", "micro_batch_size", "max_completion_length", "num_iterations"):
        allowed = getattr(config, name) == "auto" or 0 < getattr(config, name) < math.inf
        require(allowed, f"{name} is {getattr(config, name)}: it must be above 0")
    for name in ("USE_FSDP", "USE_DEEPSPEED", "MIXED_PRECISION"):
        unused = os.getenv(f"ACCELERATE_{name}", "no") in ("no", "false")
        require(unused, f"launch without {name}: it would change the log-probs that are trained")
    if config.track and os.getenv("WANDB_MODE") not in ("offline", "disabled", "dryrun"):
        key = os.getenv("WANDB_API_KEY") or get_netrc_auth(os.getenv("WANDB_BASE_URL", "https://api.wandb.ai"))
        require(key, "--track needs WANDB_API_KEY in .env, `uv run wandb login` or WANDB_MODE=offline")


# ----------------------------------------------------------------------------------------------------------------------
# Data. A problem is a dict with at least `question` and `answer`; reward functions get every column of it.

TAG_PROMPT = "Reason step by step inside <think></think>, then give only the final answer inside <answer></answer>."


def mixed():
    """Sums of two-digit numbers, and differences told as a story: 1,200 problems."""
    pairs = [(a, b) for a in range(30, 60) for b in range(10, 30)]
    results = {f"What is {a} + {b}?": a + b for a, b in pairs}
    results.update({f"Ann has {a} coins and loses {b}. How many coins now?": a - b for a, b in pairs})
    return [{"question": text, "answer": str(result)} for text, result in results.items()]


def gsm8k(split="train"):
    """GSM8K's `main` configuration ("socratic" is another data set) from the Hugging Face hub."""
    from datasets import load_dataset

    with refused("cannot load openai/gsm8k", "check the network, or give --dataset-path"):
        return load_dataset("openai/gsm8k", "main", split=split).to_list()


def read_jsonl(path):
    """Problems from a file with one JSON object per line; exits with code 2 if a line is not one."""
    problems = []
    with refused(f"cannot read '{path}'", "check the path"):
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, start=1):
        with refused(f"{path}, line {number}", 'it must be {"question": "text", "answer": "text"}'):
            if line.strip():
                problem = json.loads(line)
                if isinstance(problem["answer"], int):
                    problem["answer"] = str(problem["answer"])
                # Called only to validate: it raises unless question and answer are text.
                accuracy_reward([problem["question"]], answer=[problem["answer"]])
                problems.append(problem)
    return problems or fail(2, f"'{path}' is empty")


TASKS = {"mixed": mixed, "gsm8k": gsm8k}


def split_problems(problems):
    """(train, held out): one in eight is held out, whatever the seed; fewer than 100 problems are not split."""

    def digest(problem):
        # The words are sorted, so that 12 + 34 and 34 + 12 are on the same side of the split.
        words = sorted(re.findall(r"\w+|[^\w\s]", problem["question"]))
        return hashlib.sha256(" ".join(words).encode()).digest()

    # This is a fixed random order, so the first n are a fair sample.
    problems = sorted(problems, key=digest)
    held_out = [problem for problem in problems if digest(problem)[0] < 32 and len(problems) >= 100]
    return problems[len(held_out) :], held_out


def load_problems(config):
    """(the subset to overfit, held out, test): a fixed sample of the training problems; there is no test split."""
    problems = read_jsonl(config.dataset_path) if config.dataset_path else TASKS[config.task]()
    train, held_out = split_problems(problems)
    require(0 < config.num_samples <= len(train), f"set --num-samples between 1 and {len(train)}: the rest is held out")
    return train[: config.num_samples], held_out[: config.eval_samples or None], []


def random_generator(seed, stream, step):
    """All randomness is a function of (seed, stream, step): nothing has to be saved to repeat a step exactly."""
    digest = hashlib.sha256(f"{seed}/{stream}/{step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))


def uniform_noise(seed, stream, step, rows, columns):
    """(rows, columns), uniform in [0, 1): one number for each completion and position, drawn up front on the CPU."""
    return torch.rand(rows, columns, generator=random_generator(seed, stream, step), dtype=torch.float64)


def problems_of_step(train, step, config):
    """The P problems of a step (1, 2, ...). Each epoch is a permutation that depends on (seed, epoch)."""
    numbers = range((step - 1) * config.prompts_per_step, step * config.prompts_per_step)
    epochs = {number // len(train) for number in numbers}
    orders = {n: torch.randperm(len(train), generator=random_generator(config.seed, "order", n)) for n in epochs}
    return [train[orders[number // len(train)][number % len(train)]] for number in numbers]


def tokenize_prompts(tokenizer, problems, config):
    """Token ids of each prompt; exits with code 2 if one is too long or the tokenizer has no chat template."""
    system = config.system_prompt
    if system is None:
        system = TAG_PROMPT if any(spec.split("=")[0] == "format" for spec in config.rewards) else ""
    if config.prompt_format == "chat":
        require(tokenizer.chat_template, f"'{config.model}' has no chat template: use --prompt-format plain")
        head = [{"role": "system", "content": system}] if system else []
        chats = [[*head, {"role": "user", "content": problem["question"]}] for problem in problems]
        prompts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=True)["input_ids"]
    else:
        texts = [f"{system}\n\nQuestion: {problem['question']}\nAnswer:".lstrip() for problem in problems]
        prompts = tokenizer(texts)["input_ids"]
    longest = max(map(len, prompts))
    require(longest <= config.max_prompt_length, f"a prompt has {longest} tokens: raise --max-prompt-length")
    return prompts


# ----------------------------------------------------------------------------------------------------------------------
# Rollout


@dataclass
class Rollout:
    """What the policy wrote. Row i * G + j is completion j of prompt i; entries outside the mask are zero.

    The mask is True up to and including the stop token. logprobs are those of the tokens when they were sampled.
    entropy is the exact entropy, in nats, of the distribution that each token was sampled from.
    """

    completion_ids: Tensor  # (N, T) long
    completion_mask: Tensor  # (N, T) bool
    logprobs: Tensor  # (N, T) float32
    entropy: Tensor  # (N, T) float32


def pad_prompts(prompts, device):
    """Token ids and mask, (P, S) each. Padding is on the left, so that all prompts end in the same column."""
    ids = [torch.tensor(prompt, device=device) for prompt in prompts]
    padded = pad_sequence(ids, batch_first=True, padding_value=-1, padding_side="left")
    return padded.clamp(min=0), padded >= 0


def hidden_states(policy, ids, mask, cache):
    """Last hidden states (B, T, H) of the tokens ids (B, T), whose keys and values go into the cache.

    mask (B, S + T): which of the S positions in the cache and of these T ones are tokens, not padding.
    """
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    inputs = {"input_ids": ids, "attention_mask": mask.long(), "position_ids": positions}
    return policy.base_model(**inputs, past_key_values=cache, use_cache=cache is not None).last_hidden_state


def scaled_logits(policy, hidden, temperature):
    """Logits / temperature, (B, V), in float32 or better: the one distribution that is both sampled and scored."""
    logits = policy.get_output_embeddings()(hidden)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # Some model families transform the logits after the head: Gemma caps them, Cohere and Granite scale them.
    shape = policy.config.get_text_config()
    if getattr(shape, "final_logit_softcapping", None):
        logits = shape.final_logit_softcapping * torch.tanh(logits / shape.final_logit_softcapping)
    return logits * (getattr(shape, "logit_scale", 1) / getattr(shape, "logits_scaling", 1) / temperature)


def sample_tokens(probs, noise):
    """Inverse CDF: the first token (B,) whose cumulative probability exceeds noise (B,), uniform in [0, 1)."""
    # In float32 the rare tokens of a large vocabulary would be lost.
    cdf = probs.cumsum(-1, dtype=torch.float64)
    tokens = torch.searchsorted(cdf, noise[:, None] * cdf[:, -1:], right=True)[:, 0]
    # The result is beyond the last token only if the probabilities are NaN.
    return tokens.clamp(max=probs.shape[-1] - 1)


@torch.no_grad()
def rollout(policy, prompts, *, num_generations, max_completion_length, temperature, eos_ids, noise):
    """Samples a group of completions for each prompt from softmax(logits / temperature) over the whole vocabulary.

    prompts: P lists of token ids. noise: (N, max_completion_length) uniform in [0, 1), one number for each completion
    and position, or None for greedy. Returns a Rollout. A prompt is computed once, and its cache is copied to the rows
    of its group. Rows that have ended leave the batch. On a GPU the policy's step is a CUDA graph: hundreds of kernels
    in one launch.
    """
    # Imported here, so that --help does not wait for it.
    from transformers import StaticCache

    device = policy.device
    on_gpu = device.type == "cuda"
    if noise is not None:
        noise = noise.to(device)
    prompt_ids, prompt_mask = pad_prompts(prompts, device)  # (P, S) each
    width = prompt_ids.shape[1]
    full_width = width + max_completion_length
    # A static cache stays where it is while it fills, as a graph needs it.
    cache: Any = StaticCache(policy.config, max_cache_len=full_width)
    hidden = hidden_states(policy, prompt_ids, prompt_mask, cache)[:, -1]  # (P, H)
    # Code that reads tensor values cannot be captured, nor can a sliding window's cache, which counts in Python.
    can_capture = on_gpu and policy._can_compile_fullgraph and not any(cache.is_sliding)

    # The B rows that have not ended, at first all N, each with a copy of its prompt's keys and values.
    rows = torch.arange(len(prompts) * num_generations, device=device)  # (B,)
    going = torch.ones_like(rows, dtype=torch.bool)  # (B,)
    prompt_of_row = rows // num_generations
    cache.reorder_cache(prompt_of_row)
    hidden = hidden[prompt_of_row]  # (B, H)
    mask = torch.zeros(len(rows), full_width, dtype=torch.bool, device=device)
    mask[:, :width] = prompt_mask[prompt_of_row]
    zeros = torch.zeros(len(rows), max_completion_length, device=device)
    batch = Rollout(zeros.long(), zeros.bool(), zeros.clone(), zeros.clone())
    stops = torch.tensor(eos_ids, dtype=torch.long, device=device)
    graph = None
    for t in range(max_completion_length):
        # Draw a token for each row. (B, V) is large, so it is read and written as seldom as possible.
        logits = scaled_logits(policy, hidden, temperature)  # (B, V)
        probs = logits.softmax(-1)  # (B, V)
        tokens = logits.argmax(-1) if noise is None else sample_tokens(probs, noise[rows, t])  # (B,)
        batch.completion_ids[rows, t] = tokens
        batch.completion_mask[rows, t] = going
        batch.logprobs[rows, t] = probs.gather(-1, tokens[:, None])[:, 0].log().float()
        # The sum of -p * log p, where 0 * log 0 is 0.
        batch.entropy[rows, t] = torch.special.entr(probs).sum(-1).float()
        going = going & (tokens[:, None] != stops).all(-1)

        # Drop the rows that have ended. Asking a GPU which ones have ended means waiting for it, so that is done every
        # 16 tokens. There rows are dropped only when at least half have ended, because each new shape needs a new
        # graph.
        if not on_gpu or t % 16 == 15:
            left = going.nonzero()[:, 0]
            if len(left) == 0 or t + 1 == max_completion_length:
                break
            if len(left) < len(rows) and (not on_gpu or len(left) <= len(rows) // 2):
                rows, tokens, going, mask = (tensor[left] for tensor in (rows, tokens, going, mask))
                cache.reorder_cache(left)
                graph = None

        # Feed the tokens to the policy, which gives the next hidden states.
        mask[:, width + t] = True
        if graph is None:
            last = tokens[:, None].clone()
            hidden = hidden_states(policy, last, mask, cache)[:, -1]
            # This first step with a new shape has warmed up everything that the capture needs.
            if can_capture:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    next_hidden = hidden_states(policy, last, mask, cache)[:, -1]
        else:
            # A replay runs the same kernels on the same memory: it reads last and writes next_hidden.
            last.copy_(tokens[:, None])
            graph.replay()
            hidden = next_hidden
    for values in (batch.completion_ids, batch.logprobs, batch.entropy):
        values.masked_fill_(~batch.completion_mask, 0)
    return batch


# ----------------------------------------------------------------------------------------------------------------------
# Advantages, log-probs, loss

# Logits of one chunk: 0.5 GB in float32, and a few times that with the values computed from them.
LOGITS_AT_ONCE = 2**27


def group_advantages(rewards, num_generations, scale_rewards=False):
    """A_i = r_i - mean(r over its group), (N,) -> (N,): equation 3 of the paper, without its division by the std.

    scale_rewards: divide by the group's unbiased standard deviation + 1e-4, as GRPO does.
    """
    groups = rewards.view(-1, num_generations)  # (P, G)
    advantages = groups - groups.mean(-1, keepdim=True)
    # Equal rewards carry no signal; their computed mean can have a rounding error, which would look like a signal.
    all_equal = (groups == groups[:, :1]).all(-1, keepdim=True)  # (P, 1)
    advantages = advantages.masked_fill(all_equal, 0.0)
    if scale_rewards:
        advantages = advantages / (groups.std(-1, keepdim=True) + 1e-4)
    return advantages.flatten()


def completion_hidden_states(policy, prompts, row_prompt, ids, mask):
    """Hidden states (n, T, H) that predict the completion tokens ids (n, T); each prompt is computed once.

    The prompts' keys and values are a prefix that all completions of a prompt share; gradients flow back through it.
    """
    from transformers import DynamicCache

    if getattr(policy, "checkpointed", False):
        # The backward pass cannot fill a cache again: each row is a whole sequence, with its prompt.
        prompt_ids, prompt_mask = pad_prompts([prompts[i] for i in row_prompt.tolist()], policy.device)  # (n, S) each
        whole_ids = torch.cat([prompt_ids, ids[:, :-1]], dim=1)  # (n, S + T - 1)
        whole_mask = torch.cat([prompt_mask, mask[:, :-1]], dim=1)
        return hidden_states(policy, whole_ids, whole_mask, None)[:, prompt_ids.shape[1] - 1 :]
    used, row_prompt = torch.unique(row_prompt, return_inverse=True)
    prompt_ids, prompt_mask = pad_prompts([prompts[i] for i in used.tolist()], policy.device)
    cache = DynamicCache(config=policy.config)
    # index_select, because on a CPU its gradient has the same bits in every run, and that of plain indexing does not.
    first = hidden_states(policy, prompt_ids, prompt_mask, cache)[:, -1:].index_select(0, row_prompt)  # (n, 1, H)
    if ids.shape[1] == 1:
        return first
    cache.reorder_cache(row_prompt)
    whole_mask = torch.cat([prompt_mask[row_prompt], mask[:, :-1]], dim=1)  # (n, S + T - 1)
    return torch.cat([first, hidden_states(policy, ids[:, :-1], whole_mask, cache)], dim=1)


def chunk_logprobs(policy, hidden, token_ids, temperature):
    """Log-probs (B,) of token_ids (B,) after hidden states (B, H)."""
    logits = scaled_logits(policy, hidden, temperature)
    return logits.gather(-1, token_ids[:, None])[:, 0] - logits.logsumexp(-1)


def completion_logprobs(policy, prompts, completion_ids, completion_mask, *, prompt_index, temperature):
    """Log-prob of every completion token under softmax(logits / temperature), (n, T), zero outside the mask.

    prompts: lists of token ids; prompt_index (n,): the prompt of each row. Differentiable. Never holds logits for more
    than a chunk of tokens: a vocabulary of 150,000 makes them the largest tensor of all.
    """
    # Equal completions of a prompt have equal log-probs, so each is scored once. Short answers are often equal: this
    # makes the update of the tiny preset about three times as fast.
    longest = int(completion_mask.sum(-1).max())
    marked = completion_ids.masked_fill(~completion_mask, -1)[:, :longest]
    keys = torch.cat([prompt_index[:, None].to(marked), marked], dim=1)
    keys, key_of_row = torch.unique(keys, dim=0, return_inverse=True)  # (distinct rows, 1 + longest), (n,)
    mask = keys[:, 1:] >= 0
    ids = keys[:, 1:].clamp(min=0)
    hidden = completion_hidden_states(policy, prompts, keys[:, 0], ids, mask)  # (distinct rows, longest, H)

    # The backward pass computes each chunk's logits again instead of keeping them.
    size = max(1, LOGITS_AT_ONCE // policy.config.get_text_config().vocab_size)
    values = []
    for states, tokens in zip(hidden[mask].split(size), ids[mask].split(size), strict=True):
        values.append(checkpoint(chunk_logprobs, policy, states, tokens, temperature, use_reentrant=False))
    logprobs = torch.zeros(len(ids), completion_ids.shape[1], dtype=values[0].dtype, device=policy.device)
    logprobs[:, :longest][mask] = torch.cat(values)
    return logprobs.index_select(0, key_of_row)


def dr_grpo_loss(logprobs, old_logprobs, advantages, loss_mask, *, num_completions, max_completion_length,
                 num_tokens=None, epsilon=0.2, beta=0.0, ref_logprobs=None, loss_type="dr_grpo"):  # fmt: skip
    """Scalar: -1/(N*L) * sum of min(ratio*A, clip(ratio, 1-epsilon, 1+epsilon)*A) over the mask, plus beta * KL.

    logprobs, old_logprobs, ref_logprobs, loss_mask (n, T); advantages (n,): any part of a step's rows. num_completions
    N, max_completion_length L and num_tokens (loss-mask tokens, for bnpo) are those of the whole step, so that the sum
    over its parts is the step's loss. KL is estimated by exp(d) - d - 1 with d = ref_logprobs - logprobs.
    """
    assert logprobs.shape == old_logprobs.shape == loss_mask.shape
    ratio = (logprobs - old_logprobs).exp()  # (n, T)
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon)
    per_token = -torch.minimum(ratio * advantages[:, None], clipped * advantages[:, None])
    if beta > 0:
        difference = ref_logprobs - logprobs
        per_token = per_token + beta * (difference.exp() - difference - 1)
    per_token = per_token * loss_mask
    if loss_type == "dr_grpo":
        # Dr GRPO divides by a constant, not by the lengths.
        return per_token.sum() / (num_completions * max_completion_length)
    if loss_type == "grpo":
        return (per_token.sum(-1) / loss_mask.sum(-1).clamp(min=1)).sum() / num_completions
    if loss_type == "bnpo":
        return per_token.sum() / max(1, loss_mask.sum() if num_tokens is None else num_tokens)
    raise ValueError(f"loss_type '{loss_type}': use dr_grpo, grpo or bnpo")


# ----------------------------------------------------------------------------------------------------------------------
# Policy and optimizer


def load_pretrained(loader, config, **kwargs):
    """What loader finds at --model, or in a folder of that name next to this script; exits with code 2 otherwise."""
    beside = Path(__file__).resolve().parent / config.model
    name = str(beside) if beside.is_dir() else config.model
    is_path = name.startswith((".", "/", "~"))
    require(not is_path or Path(name).is_dir(), f"there is no folder '{name}': check --model")
    with refused(f"cannot load '{name}'", "check --model, or use --preset tiny"):
        return loader.from_pretrained(name, **kwargs)


def load_policy(config, device):
    """A causal LM in eval mode (no dropout: what is sampled is what is scored), bf16 on a GPU, float32 on a CPU."""
    from transformers import AutoModelForCausalLM
    from transformers.modeling_layers import GradientCheckpointingLayer

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    policy = load_pretrained(AutoModelForCausalLM, config, dtype=dtype).to(device).eval()
    policy.checkpointed = config.gradient_checkpointing
    if policy.checkpointed:
        # transformers' own way needs train mode, which turns on dropout and drops caches without an error.
        layers = [layer for layer in policy.modules() if isinstance(layer, GradientCheckpointingLayer)]
        require(layers, f"{type(policy).__name__} cannot checkpoint: leave out --gradient-checkpointing")
        for layer in layers:
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    return policy


def check_policy(policy, prompts, config):
    """Exits with code 2 unless rollout and scores agree with the model's own plain forward pass, for the longest and
    the shortest prompt of the run; so templates, sliding windows and position limits are in it.
    """
    length = min(config.max_completion_length, 4)
    shortest = min(prompts, key=len)
    # A few tokens are enough if they stand at the end of the longest text that can occur.
    needed = max(map(len, prompts)) + config.max_completion_length
    longest = (max(prompts, key=len) * needed)[: needed - length]
    positions = getattr(policy.config.get_text_config(), "max_position_embeddings", None) or needed
    require(positions >= needed, f"the model has {positions} positions, not {needed}: lower --max-completion-length")
    family = type(policy).__name__
    gaps = []
    with refused(f"{family} cannot be trained here", "choose another --model"), torch.no_grad():
        batch = rollout(policy, [longest, shortest], num_generations=1, max_completion_length=length,
                        temperature=config.temperature, eos_ids=[], noise=None)  # fmt: skip
        ids = batch.completion_ids  # (2, length)
        index = torch.arange(2, device=policy.device)
        scored = completion_logprobs(policy, [longest, shortest], ids, batch.completion_mask, prompt_index=index,
                                     temperature=config.temperature)  # fmt: skip
        for i, prompt in enumerate([longest, shortest]):
            text = torch.tensor([prompt + ids[i].tolist()], device=policy.device)
            logits = policy(text).logits[0, -length - 1 : -1].float() / config.temperature  # (length, V)
            plain = logits.log_softmax(-1).gather(-1, ids[i, :, None])[:, 0]
            gaps.append((torch.stack([batch.logprobs[i], scored[i]]) - plain).abs().mean().item())
    exact = max(gaps) < (0.1 if policy.dtype == torch.bfloat16 else 1e-4)
    require(exact, f"log-probs of {family} are inexact here (by {max(gaps):.2g}): choose another --model")


def make_masters(policy):
    """The weights that the optimizer updates: the policy's own, or float32 copies of them if they are bf16.

    bf16 has eight bits, so an update of 1e-6 would be rounded away. Gradients of micro-batches are summed in float32.
    """
    masters = [w.detach().float() if w.dtype == torch.bfloat16 else w for w in policy.parameters()]
    for weight, master in zip(policy.parameters(), masters, strict=True):
        master.grad = torch.zeros_like(master)

        def add_gradient(weight, master=master):
            master.grad += weight.grad
            weight.grad = None

        if master is not weight:
            weight.register_post_accumulate_grad_hook(add_gradient)
    return masters


def learning_rate(step, num_steps, config):
    """The learning rate of a step (1, 2, ..., num_steps)."""
    passed = max(0, step - config.warmup_steps - 1) / max(1, num_steps - config.warmup_steps)
    decay = {"constant": 1.0, "linear": 1 - passed, "cosine": (1 + math.cos(math.pi * passed)) / 2}
    return config.learning_rate * min(1, step / max(1, config.warmup_steps)) * decay[config.lr_schedule]


def micro_batches(batch, advantages, loss_mask, config):
    """Row numbers of each micro-batch. Groups of similar length are put together, so that a batch has little padding.

    Without a KL term a completion that is masked or has zero advantage has no gradient: it is left out.
    """
    longest = batch.completion_mask.sum(-1).view(-1, config.num_generations).amax(-1)  # (P,)
    order = longest.repeat_interleave(config.num_generations).argsort(stable=True)  # (n,)
    if config.beta == 0:
        has_gradient = (advantages != 0) & loss_mask.any(-1)
        order = order[has_gradient[order]]
    return order.split(config.micro_batch_size) if len(order) else []


def halve(run, parts):
    """The same rows in micro-batches of half the size, which is kept; exits with code 8 if not even one row fits."""
    size = max(len(rows) for rows in parts) // 2
    if size == 0:
        fail(8, "one completion does not fit: --gradient-checkpointing or a lower --max-completion-length")
    run.config = replace(run.config, micro_batch_size=size)
    print(f"process {PartialState().process_index} is out of memory: micro-batches of {size} from here on", flush=True)
    return torch.cat(parts).split(size)


def clock():
    """Seconds, once the GPU has done all that it was given, so that each phase is charged with its own work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class OtherProcessFailedError(RuntimeError):
    """Another process raised an exception, so this one stops too."""


def gather(items):
    """The items of all processes, in order. If one has failed, the others stop here instead of waiting for it."""
    parts = gather_object([items])
    if None in parts:
        raise OtherProcessFailedError("see the message of the process that failed")
    return [item for part in parts for item in part]


def share(items):
    """This process's part of a list or tensor; the parts are contiguous, so that `gather` restores the order."""
    rank, processes = PartialState().process_index, PartialState().num_processes
    return items[len(items) * rank // processes : len(items) * (rank + 1) // processes]


# ----------------------------------------------------------------------------------------------------------------------
# Rewards and evaluation


def load_rewards(specs):
    """{name: (function, weight)} from name=weight or module:function=weight; exits with code 2 if one fails."""
    require(specs, "--rewards is empty: give at least one, such as accuracy=2.0")
    functions = {}
    for spec in specs:
        path, _, weight = spec.partition("=")
        name = path.rpartition(":")[2]
        if ":" not in path:
            # From this script, else from rewards.py.
            module = __name__ if f"{name}_reward" in globals() else "rewards"
            path = f"{module}:{name}_reward"
        with refused(f"reward '{spec}'", f"define {name}_reward in this script, or give --rewards module:function=1"):
            functions[name] = pkgutil.resolve_name(path), float(weight or 1)
        require(math.isfinite(functions[name][1]), f"reward '{spec}': its weight must be finite")
    return functions


def score(run, problems, batch):
    """A record for each completion: its text, what each reward function gave it, and `reward`, their weighted sum.

    Functions are called as TRL calls them for conversational data: message lists, completion_ids, every data column.
    None means "does not apply". Raises ValueError on a wrong number of rewards and on one that is not finite.
    """
    lengths = batch.completion_mask.sum(-1).tolist()
    ids = [row[:length] for row, length in zip(batch.completion_ids.tolist(), lengths, strict=True)]
    texts = run.tokenizer.batch_decode(ids, skip_special_tokens=True)
    records = []
    for problem, text, row, entropy in zip(problems, texts, ids, batch.entropy.sum(-1).tolist(), strict=True):
        record = {"question": problem["question"], "answer": problem["answer"], "completion": text}
        # Accuracy is always that of rewards.py, whatever --rewards says.
        record["right"] = accuracy_reward([text], answer=[problem["answer"]])[0] == 1
        record["parsed"] = is_parsed(text, problem["answer"])
        record.update(truncated=row[-1] not in run.sampling["eos_ids"], length=len(row), entropy=entropy, reward=0.0)
        records.append(record)
    columns = {}
    for name in problems[0]:
        columns[name] = [problem.get(name) for problem in problems]
    columns["prompts"] = [[{"role": "user", "content": question}] for question in columns["question"]]
    columns["completions"] = [[{"role": "assistant", "content": text}] for text in texts]
    columns["completion_ids"] = ids
    for name, (function, weight) in run.rewards.items():
        values = [None if value is None else float(value) for value in function(**columns)]
        if len(values) != len(records) or not all(math.isfinite(value or 0) for value in values):
            raise ValueError(f"reward '{name}' must give {len(records)} finite numbers or None, not {values!r:.200}")
        for record, value in zip(records, values, strict=True):
            record[f"rewards/{name}"] = value
            record["reward"] += weight * (value or 0)
    return records


def mean(records, name):
    """Mean over the records in which the field is not None; NaN if there are none."""
    values = [record[name] for record in records if record[name] is not None]
    return fmean(values) if values else math.nan


def evaluate(run, problems, key):
    """Accuracy, greedy and sampled once at the training temperature: (metrics under `key`, two records per problem).

    The sampling noise is the same at every evaluation, so that before and after are a paired comparison.
    """
    config = run.config
    noise = share(uniform_noise(config.seed, key, 0, len(problems), config.max_completion_length))
    problems = share(problems)
    # As many at a time as in a training step, which fits.
    chunk = len(share(range(config.prompts_per_step * config.num_generations)))
    records = []
    for start in range(0, len(problems), chunk):
        some = problems[start : start + chunk]
        prompts = tokenize_prompts(run.tokenizer, some, config)
        for mode, uniform in (("greedy", None), ("sampled", noise[start : start + chunk])):
            batch = rollout(run.policy, prompts, num_generations=1, noise=uniform, **run.sampling)
            for record in score(run, some, batch):
                # The key "eval/accuracy" belongs to the split "eval".
                records.append({"split": key.removesuffix("accuracy").rstrip("/_"), "mode": mode, **record})
    records = gather(records)
    greedy = [record for record in records if record["mode"] == "greedy"]
    sampled = [record for record in records if record["mode"] == "sampled"]
    metrics = {key: mean(greedy, "right"), f"{key}_sampled": mean(sampled, "right")}
    interval = wilson_interval(sum(record["right"] for record in greedy), len(greedy))
    metrics[f"{key}_low"], metrics[f"{key}_high"] = interval
    return metrics, records


def step_metrics(records, num_generations):
    """What the N records of a step say about its completions, groups and rewards."""
    groups = [records[i : i + num_generations] for i in range(0, len(records), num_generations)]
    # Groups whose rewards are all equal carry no signal.
    no_signal = [group for group in groups if not any(record["advantage"] for record in group)]
    right = [group for group in no_signal if all(record["right"] for record in group)]
    metrics = {"train/entropy": mean(records, "entropy") / mean(records, "length")}
    metrics["train/frac_reward_zero_std"] = len(no_signal) / len(groups)
    metrics["train/frac_all_right"] = len(right) / len(groups)
    metrics["train/frac_all_wrong"] = (len(no_signal) - len(right)) / len(groups)
    metrics["train/reward"] = mean(records, "reward")
    metrics["completions/mean_length"] = mean(records, "length")
    metrics["completions/clipped_ratio"] = mean(records, "truncated")
    metrics["completions/parsed_ratio"] = mean(records, "parsed")
    for name in records[0]:
        if name.startswith("rewards/"):
            metrics[f"{name}/mean"] = mean(records, name)
    return {name: value for name, value in metrics.items() if not math.isnan(value)}


# ----------------------------------------------------------------------------------------------------------------------
# Run folder and checkpoints


def recorded_run(config):
    """The run folder that --resume names, and its settings; exits with code 2 if it is not one of this script's."""
    name = Path(__file__).name
    folder = Path(config.resume)
    if config.resume == "latest":
        folders = [path.parent for path in Path(config.run_dir).glob(f"*/{name}")]
        folder = max(folders, key=lambda path: path.name.rsplit("__", 1)[-1], default=folder)
    with refused(f"'{folder}' is no run folder of {name}", "give --resume one, or latest with --run-dir"):
        (folder / name).stat()
        recorded = json.loads((folder / "config.json").read_text())
        return folder, replace(Config(**recorded), rewards=tuple(recorded["rewards"]))


def open_run(config, device):
    """The run folder: the one to resume, else a new one, {exp}__{task}__{model}__{seed}__{time}.

    Exits with code 2 if it cannot be written, or was started with other settings that change the maths.
    """
    if config.resume:
        folder, before = recorded_run(config)
        # More steps are allowed only if the learning rate does not depend on their number.
        free = SPEED | {"num_steps", "num_epochs"} if config.lr_schedule == "constant" else SPEED
        changed = [name for name, value in vars(before).items() if name not in free and value != vars(config)[name]]
        require(not changed, f"'{folder}' was started with other settings; do not change: {', '.join(changed)}")
        return folder
    script = Path(__file__).resolve()
    model = re.sub(r"[^\w.-]+", "-", Path(config.model).name)
    name = f"{script.stem}__{config.task}__{model}__{config.seed}__{datetime.now():%Y%m%d-%H%M%S-%f}"
    folder = Path(config.run_dir) / name
    # Tags are not used, and without git this is empty. remote_train.sh gives the commit of a tree that it copied.
    git = "git describe --always --dirty --abbrev=40 --exclude='*'"
    described = subprocess.run(git, shell=True, cwd=script.parent, capture_output=True, text=True).stdout.strip()
    environment = {
        "command": sys.argv,
        "commit": os.getenv("WANDB_GIT_COMMIT") or described,
        "packages": {package.name: package.version for package in distributions()},
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
    }
    with refused(f"cannot write to '{config.run_dir}'", "choose another --run-dir"):
        folder.mkdir(parents=True)
    shutil.copyfile(script, folder / script.name)
    (folder / "environment.json").write_text(json.dumps(environment, indent=2))
    return folder


def replace_file(path, text):
    """Writes a new file and renames it into place, so that a crash leaves either the old file or the new one."""
    beside = path.with_name(f"{path.name}.partial")
    beside.write_text(text)
    beside.replace(path)


def rewind_log(path, step):
    """The rows up to this step; later rows, and a row that a crash cut short, are removed from the file."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    rows = [row for row in rows if row["step"] <= step]
    replace_file(path, "".join(json.dumps(row) + "\n" for row in rows))
    return rows


def save_checkpoint(run):
    """Saves all that a resumed run needs; renamed into place when complete, so a crash leaves the last good one."""
    final = run.folder / "checkpoints" / f"step_{run.step:06d}"
    partial = final.with_name("partial")
    if final.exists() or not PartialState().is_main_process:
        return
    # In Hugging Face format, so that other programs can load it.
    run.policy.save_pretrained(partial)
    run.tokenizer.save_pretrained(partial)
    state = {"masters": [master.detach() for master in run.masters], "optimizer": run.optimizer.state_dict()}
    torch.save(state, partial / "trainer.pt")
    partial.rename(final)
    for old in sorted(final.parent.glob("step_*"))[:-2]:
        shutil.rmtree(old)


def load_checkpoint(run, folder):
    """Restores the weights and the optimizer's state."""
    state = torch.load(folder / "trainer.pt", map_location=run.policy.device)
    for master, weight, saved in zip(run.masters, run.policy.parameters(), state["masters"], strict=True):
        master.data.copy_(saved)
        weight.data.copy_(saved)
    run.optimizer.load_state_dict(state["optimizer"])


@contextlib.contextmanager
def saved_at_failure(run):
    """Saves the last finished step when training ends early, by a signal or an exception, and says how to continue.

    A signal is only recorded; the training loop stops after the current step. A second SIGINT ends the program at once.
    """

    def remember(number, _):
        if number == signal.SIGINT and number in run.signals:
            os._exit(130)
        run.signals.append(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # nohup ignores SIGHUP.
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, remember)
    try:
        yield
    except (SystemExit, Exception) as error:
        if getattr(error, "code", None) == 2:
            raise
        say(f"ended early; to continue: uv run {Path(__file__).name} --resume '{run.folder}'")
        if run.step is not None:
            save_checkpoint(run)
        if not isinstance(error, OtherProcessFailedError):
            # The other processes find this in place of what they gather, and end too.
            gather_object([None])
        if isinstance(error, torch.OutOfMemoryError):
            fail(8, f"out of memory: --resume with a --micro-batch-size below {run.config.micro_batch_size} continues "
                    "exactly; if a rollout does not fit, start again with fewer --prompts-per-step")  # fmt: skip
        if isinstance(error, FloatingPointError):
            fail(4, f"{error}: start again with a lower --learning-rate; --model takes {run.folder}/checkpoints/step_*")
        raise


# ----------------------------------------------------------------------------------------------------------------------
# Metrics of the hardware

# bf16, dense, from NVIDIA's data sheets.
PEAK_FLOPS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200 NVL": 835e12, "H200": 989e12,
              "A100": 312e12, "L40S": 362e12}  # fmt: skip


def gradient_flops(policy, prompts, lengths, prompt_index):
    """FLOPs that the exact gradient over completions of these lengths (n,) needs, 2 for a multiplication and addition.

    Counts forward once and backward twice, each prompt once, the head only on completion tokens, no recomputation.
    """
    shape = policy.config.get_text_config()
    head = policy.get_output_embeddings().weight.numel()
    body = sum(weight.numel() for weight in policy.base_model.parameters())
    body -= policy.get_input_embeddings().weight.numel()
    size = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    # For one token that attends to another.
    pair = 2 * shape.num_hidden_layers * shape.num_attention_heads * size
    widths = torch.tensor([len(prompt) for prompt in prompts], device=lengths.device)  # (P,)
    used = widths[prompt_index.unique()]
    read = lengths - 1  # (n,), the last token is not read
    rows = body * read + head * lengths + pair * read * (widths[prompt_index] + read / 2)  # (n,)
    return 6 * (rows.sum() + (body * used + pair * used**2 / 2).sum()).item()


def gpu_metrics(run, prompts, batch, parts, seconds):
    """Share of the GPU's peak that the update reached; utilization in % and memory in GB as NVML sees them."""
    import pynvml

    metrics = {}
    names = [name for name in PEAK_FLOPS if name in torch.cuda.get_device_name()]
    if names and parts:
        rows = torch.cat(parts)
        lengths = batch.completion_mask.sum(-1)[rows]
        flops = gradient_flops(run.policy, prompts, lengths, rows // run.config.num_generations)
        metrics["perf/mfu"] = run.config.num_iterations * flops / seconds / PEAK_FLOPS[names[0]]
    # A slice of a GPU has no utilization of its own.
    with contextlib.suppress(pynvml.NVMLError):
        metrics["gpu/memory_gb"] = torch.cuda.device_memory_used() / 1e9
        metrics["gpu/utilization"] = torch.cuda.utilization()
    return metrics


# ----------------------------------------------------------------------------------------------------------------------
# Main


def finish_step(run, metrics, records):
    """Evaluates if it is time, logs and prints the step, returns its metrics. records: those of its completions."""
    config = run.config
    step = metrics["step"]
    last = step == run.num_steps
    due = step == 0 or last or (config.eval_every > 0 and step % config.eval_every == 0)
    shown = [{"split": "train", **record} for record in records[: 2 * config.num_generations]]
    if run.tracker is not None and config.log_completions and due and shown:
        import wandb

        cells = [list(map(str, record.values())) for record in shown]
        run.tracker.log({"completions/table": wandb.Table(columns=list(shown[0]), data=cells)}, step=step)
    for key, problems in run.splits.items():
        # The test split is only for the end.
        if problems and due and (last or key != "test/accuracy"):
            measured, rows = evaluate(run, problems, key)
            metrics.update(measured)
            shown.extend(rows)
    if PartialState().is_main_process:
        for name, rows in (("completions", shown), ("metrics", [metrics])):
            with (run.folder / f"{name}.jsonl").open("a") as file:
                file.writelines(json.dumps({"step": step, **row}) + "\n" for row in rows)
    if run.tracker is not None:
        run.tracker.log(metrics, step=step)
    if due or step % math.ceil(run.num_steps / 20) == 0:
        values = [f"{key} {metrics[key]:.3f}" for key in metrics if key.endswith(("reward", "accuracy", "sampled"))]
        # Steps, elapsed and remaining time, without the bar itself.
        progress = tqdm.format_meter(**{**run.bar.format_dict, "ncols": 0})
        say(f"{progress} {', '.join(values)}")
    return metrics


def verdict(history, config):
    """Says whether the target was reached; exits with code 6 if not, else returns the last values."""
    values = last_values(history)
    accuracy = values["eval/train_subset_accuracy"]
    missed = accuracy < config.target_accuracy
    say(f"{'failed' if missed else 'passed'}: {accuracy:.3f} of the {config.num_samples} problems are right")
    # Only this process fails: under a launcher, the first process to fail ends the others.
    if missed and PartialState().is_main_process:
        fail(6, f"target {config.target_accuracy} missed: try more --num-generations or a lower --learning-rate")
    return values


def main(config):
    """Trains, evaluates and logs; returns the last value of every metric, and the values of step 0 as *_before."""
    # This comes before the import of transformers, which reads HF_HOME.
    load_dotenv()
    from transformers import AutoTokenizer, logging

    logging.disable_progress_bar()
    check_config(config)
    functions = load_rewards(config.rewards)
    state = PartialState(cpu=not torch.cuda.is_available())
    device = state.device
    # The process that prints and writes.
    first = state.is_main_process
    require(config.prompts_per_step >= state.num_processes, "fewer prompts than processes: raise --prompts-per-step")
    train, held_out, test = load_problems(config)
    splits = {"eval/accuracy": held_out, "eval/train_subset_accuracy": train}
    num_steps = math.ceil(config.num_epochs * len(train) / config.prompts_per_step) or config.num_steps
    groups = config.num_generations
    length = config.max_completion_length
    # Gathering one item from the main process sends it to all processes.
    folder = gather([open_run(config, device)] if first else [])[0]
    say(f"preset {config.preset} on {device}: {config.model}, task {config.task}, seed {config.seed}, in {folder}")
    with contextlib.ExitStack() as stack:
        if first:
            with refused(f"another process works in '{folder}'", "wait for it, or stop it"):
                stack.enter_context(FileLock(folder / "lock", timeout=0))
            replace_file(folder / "config.json", json.dumps(asdict(replace(config, resume="")), indent=2))
        checkpoints = sorted(folder.glob("checkpoints/step_*"))
        done = int(checkpoints[-1].name.removeprefix("step_")) if checkpoints else 0
        # Steps after the checkpoint are repeated.
        history = gather(rewind_log(folder / "metrics.jsonl", done) if first else [])
        if len(history) > done >= num_steps:
            say(f"this run is finished: all {num_steps} steps are done")
            return verdict(history, config)
        if first:
            rewind_log(folder / "completions.jsonl", len(history) - 1)

        tokenizer = load_pretrained(AutoTokenizer, config)
        all_prompts = tokenize_prompts(tokenizer, [*train, *held_out, *test], config)
        policy = load_policy(config, device)
        check_policy(policy, all_prompts, config)
        reference = load_policy(config, device) if config.beta > 0 else None
        masters = make_masters(policy)
        optimizer = torch.optim.AdamW(masters, weight_decay=config.weight_decay, fused=True)
        # Only the EOS ids of generation_config are used: one id, a list or None.
        ends = policy.generation_config.eos_token_id
        eos_ids = sorted({tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None})
        sampling = {"max_completion_length": length, "temperature": config.temperature, "eos_ids": eos_ids}
        tracker = None
        if first and config.track:
            import wandb

            # Without these the process would wait forever if the network is lost.
            os.environ.setdefault("WANDB_INIT_TIMEOUT", "20")
            os.environ.setdefault("WANDB_FINISH_TIMEOUT", "20")
            tracker = wandb.init(project=os.getenv("WANDB_PROJECT") or "dr-grpo", name=folder.name, id=folder.name,
                                 group=folder.name.rsplit("__", 2)[0], resume="allow", dir=folder,
                                 config=asdict(config), save_code=True)  # fmt: skip
            # wandb's own `with` would print a traceback for a run that ends by a signal.
            stack.push(lambda error, *_: tracker.finish(exit_code=int(error is not None)))
        screen = sys.stderr if first and sys.stderr.isatty() else open(os.devnull, "w")  # noqa: SIM115
        bar = stack.enter_context(tqdm(total=num_steps, initial=done, unit="step", file=screen))
        # What the functions above share. step: the last finished step, None during an update; signals: those received.
        run = SimpleNamespace(config=config, folder=folder, num_steps=num_steps, rewards=functions, tokenizer=tokenizer,
                              policy=policy, sampling=sampling, masters=masters, optimizer=optimizer, splits=splits,
                              bar=bar, tracker=tracker, step=done, signals=[])  # fmt: skip
        if checkpoints:
            load_checkpoint(run, checkpoints[-1])
        if config.micro_batch_size == "auto":
            size = [{}, *history][-1].get("perf/micro_batch_size", config.prompts_per_step * groups)
            run.config = replace(config, micro_batch_size=size)
        stack.enter_context(saved_at_failure(run))
        # The log has a row for every step from 0 on. The last one is missing before training, and in a resumed run
        # whose evaluation failed: that evaluation is done now.
        if len(history) <= done:
            history.append(finish_step(run, {"step": done}, []))

        for step in range(done + 1, num_steps + 1):
            if history[-1].get("eval/train_subset_accuracy", -1) >= config.target_accuracy:
                save_checkpoint(run)
                break
            # Sample: a group of G completions for each prompt of this process.
            start = clock()
            problems = share(problems_of_step(train, step, config))
            prompts = tokenize_prompts(tokenizer, problems, config)
            noise = uniform_noise(config.seed, "sampling", step, config.prompts_per_step, groups * length)
            # So far a row is the noise of a group, so it is shared like the prompts; now it is that of a completion.
            noise = share(noise).view(-1, length)  # (n, L)
            batch = rollout(policy, prompts, num_generations=groups, noise=noise, **sampling)  # fields (n, T)
            sampled = clock()

            # Reward.
            records = score(run, [problem for problem in problems for _ in range(groups)], batch)
            rewards = torch.tensor([record["reward"] for record in records], device=device)  # (n,)
            rewarded = clock()

            # Advantage: the group's mean is the baseline; nothing is divided by its standard deviation.
            advantages = group_advantages(rewards, groups, config.scale_rewards)  # (n,)
            loss_mask = batch.completion_mask  # (n, T)
            if config.mask_truncated_completions:
                ended = torch.tensor([not record["truncated"] for record in records], device=device)
                loss_mask = loss_mask & ended[:, None]

            # Update: the gradients of the micro-batches add up to the step's. Old log-probs come from the first forward
            # pass, not from the sampler, so the ratio is exactly 1 in the first update; logprob_gap says how far the
            # two differ. Rows without gradient are in no micro-batch.
            optimizer.param_groups[0]["lr"] = learning_rate(step, num_steps, config)
            num_tokens = sum(gather([int(loss_mask.sum())]))
            old_logprobs = torch.zeros_like(batch.logprobs)  # (n, T)
            ref_logprobs = torch.zeros_like(batch.logprobs)  # (n, T)
            scored = torch.zeros_like(loss_mask)  # (n, T)
            clipped = torch.zeros(config.num_iterations, *loss_mask.shape, device=device)
            parts = micro_batches(batch, advantages, loss_mask, run.config)
            # NaN from the start if the policy's log-probs are not finite.
            total_loss = 0.0 * sum(gather([batch.entropy.sum().item()]))
            for iteration in range(config.num_iterations):
                # This is a function, so that its tensors are freed if it runs out of memory.
                def gradient(rows, iteration=iteration):
                    ids, mask = batch.completion_ids[rows], batch.completion_mask[rows]
                    given = {"prompt_index": rows // groups, "temperature": config.temperature}
                    logprobs = completion_logprobs(policy, prompts, ids, mask, **given)  # (m, T)
                    if iteration == 0:
                        old_logprobs[rows] = logprobs.detach()
                        scored[rows] = mask
                    if iteration == 0 and reference is not None:
                        with torch.no_grad():
                            ref_logprobs[rows] = completion_logprobs(reference, prompts, ids, mask, **given)
                    loss = dr_grpo_loss(
                        logprobs, old_logprobs[rows], advantages[rows], loss_mask[rows], epsilon=config.epsilon,
                        num_completions=config.prompts_per_step * groups, max_completion_length=length,
                        num_tokens=num_tokens, beta=config.beta, ref_logprobs=ref_logprobs[rows],
                        loss_type=config.loss_type)  # fmt: skip
                    loss.backward()
                    # Only what the minimum clips counts: above 1 + epsilon for A > 0, below 1 - epsilon for A < 0.
                    moved = ((logprobs.detach() - old_logprobs[rows]).exp() - 1) * advantages[rows, None].sign()
                    clipped[iteration, rows] = (moved > config.epsilon).float()
                    return loss.item()

                losses = None
                while losses is None:
                    policy.zero_grad()
                    optimizer.zero_grad(set_to_none=False)
                    try:
                        losses = [gradient(rows) for rows in parts]
                    except torch.OutOfMemoryError:
                        # The sums hold parts of the failed attempt: start this update again with smaller micro-batches.
                        parts = halve(run, parts)
                # These are sums over processes, because the loss divides by the whole step's N.
                total_loss += sum(gather(losses)) / config.num_iterations
                for master in masters:
                    master.grad = reduce(master.grad, "sum")
                grad_norm = torch.nn.utils.clip_grad_norm_(masters, config.max_grad_norm or math.inf).item()
                if not math.isfinite(grad_norm + total_loss):
                    raise FloatingPointError(f"loss or gradient of step {step} is not finite, and was not applied")
                # Until the update is done the weights are between two steps, and must not be saved.
                run.step = None
                optimizer.step()
                for master, weight in zip(masters, policy.parameters(), strict=True):
                    weight.data.copy_(master)
            run.step = step
            updated = clock()

            # Measure.
            for record, advantage in zip(records, advantages.tolist(), strict=True):
                record["advantage"] = advantage
            records = gather(records)
            metrics = {"step": step, "train/loss": total_loss, "train/grad_norm": grad_norm}
            metrics["train/learning_rate"] = optimizer.param_groups[0]["lr"]
            metrics["train/epoch"] = step * config.prompts_per_step / len(train)
            metrics.update(step_metrics(records, groups))
            gap = (batch.logprobs - old_logprobs)[scored].abs()
            tokens = {"logprob_gap_mean": gap, "logprob_gap_max": gap}
            if reference is not None:
                difference = (ref_logprobs - old_logprobs)[scored]
                tokens["kl"] = difference.exp() - difference - 1
            if config.num_iterations > 1:
                tokens["clip_ratio"] = clipped[:, scored & loss_mask].flatten()
            for name, values in tokens.items():
                values = torch.cat(gather([values.cpu()]))
                if len(values):
                    metrics[f"train/{name}"] = (values.max() if name.endswith("max") else values.mean()).item()
            metrics["time/rollout_s"] = sampled - start
            metrics["time/reward_s"] = rewarded - sampled
            metrics["time/update_s"] = updated - rewarded
            metrics["perf/completion_tokens_per_s"] = sum(r["length"] for r in records) / (updated - start)
            # On a CPU this is the process's resident set, which Linux gives in kB.
            memory = torch.cuda.max_memory_allocated() or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            metrics["perf/peak_memory_gb"] = memory / 1e9

            metrics["perf/micro_batch_size"] = run.config.micro_batch_size
            if device.type == "cuda":
                metrics.update(gpu_metrics(run, prompts, batch, parts, metrics["time/update_s"]))

            # Evaluate, log, save.
            bar.update()
            history.append(finish_step(run, metrics, records))
            say(signal_line(history))
            if step == num_steps or (config.save_every and step % config.save_every == 0):
                save_checkpoint(run)
            signals = gather(run.signals)
            if signals:
                raise SystemExit(128 + signals[0])
    if first:
        subprocess.run([sys.executable, Path(__file__).resolve().with_name("report.py"), folder], check=False)
    return verdict(history, config)


def last_values(history):
    """The last value of every metric, and the values of step 0 as *_before."""
    values = {f"{name}_before": value for name, value in history[0].items()}
    for metrics in history:
        values.update(metrics)
    return values


def parse_config(arguments):
    """Reads --preset or --resume first, then every flag, with the values of that preset or run as defaults."""
    found = re.search(r"--preset[= ](\S+)", " ".join(arguments))
    given: Any = found[1] if found else "auto"
    preset = given
    if given == "auto":
        preset = "qwen" if torch.cuda.is_available() else "tiny"
    require(preset in PRESETS, f"unknown preset '{preset}': --preset takes auto, {', '.join(PRESETS)}")
    default = replace(PRESETS[preset], preset=given)
    config = tyro.cli(Config, default=default, args=arguments, description=__doc__)
    if not config.resume:
        return replace(config, preset=preset)
    folder, recorded = recorded_run(config)
    return replace(tyro.cli(Config, default=recorded, args=arguments), resume=str(folder))


if __name__ == "__main__":
    try:
        main(parse_config(sys.argv[1:]))
    # Before training; from then on a signal is only recorded.
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    PartialState().destroy_process_group()
