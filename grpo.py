"""Dr GRPO on arithmetic or GSM8K, in one file.

For each prompt the policy samples a group of G completions, and a function rewards each of them. The group's mean
reward is the baseline, and the policy gradient does the rest: no critic, no reference model, no inference server.
Dr GRPO (Liu et al. 2025, arXiv 2503.20783) is GRPO without its two biases, the division by the group's standard
deviation and the division by each completion's length:

    advantages = rewards - mean(rewards over the group)                                           # (N,), N = P * G
    ratio      = exp(logprobs - old_logprobs)                                                     # (N, T)
    loss       = -1 / (N * L) * sum over completions and tokens of
                 min(ratio * advantages, clip(ratio, 1 - epsilon, 1 + epsilon) * advantages)

with L = max_completion_length. N and L are constants of the step, so every token has the same weight. Shapes in the
comments: P prompts, G generations, N = P * G completions of a step, n those of this process (N in one process), m
those of a micro-batch, S prompt tokens, T completion tokens, H hidden size, V vocabulary, B rows of a batch.

    uv run grpo.py                           # with CUDA: Qwen2-0.5B-Instruct on GSM8K; without: the tiny preset
    uv run grpo.py --preset tiny             # sums and differences on a CPU, 2 to 4 minutes
    uv run grpo.py --track                   # logged to Weights & Biases
    uv run grpo.py --resume latest           # continues a run that ended early
    uv run grpo.py --help                    # every setting; [speed]: it changes no result
"""

import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from importlib.metadata import distributions
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any, Literal

import torch
import tyro
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, reduce
from dotenv import load_dotenv
from filelock import FileLock
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from rewards import grade, load_rewards, means, signal_line, signal_metrics, wilson_interval

SCRIPT = Path(__file__).resolve()

# ----------------------------------------------------------------------------------------------------------------------
# Config


@dataclass(frozen=True)
class Config:
    """Every setting of a run; these are the defaults of the tiny preset.

    A setting marked [speed] changes only speed, memory, or what is kept; all others change results.
    """

    preset: Literal["auto", "qwen", "smollm", "tiny"] = "tiny"
    """Which defaults to start from, read before the other flags. auto, when the flag is not given: qwen if CUDA is
    available, else tiny."""
    task: str = "arithmetic"
    """What to train on: arithmetic, simple_math or gsm8k."""
    model: str = "models/tiny"
    """Hugging Face id or folder of a causal language model."""
    dataset_path: str = ""
    """A JSONL file with `question` and `answer`, to train on instead of the task's problems."""
    test_path: str = ""
    """A JSONL file to evaluate on after training; empty: the test split if GSM8K comes from the hub, else none."""
    prompt_format: Literal["chat", "plain"] = "chat"
    """chat: the tokenizer's chat template; plain: "Question: ... Answer:", for models without a template."""
    system_prompt: str | None = None
    """What the policy is told before each question. Empty: an empty system message; None: no message, for which the
    templates of Qwen2 and SmolLM2 put one of their own."""
    chat_template_kwargs: str = "{}"
    """JSON with more arguments for the chat template, such as '{"enable_thinking": false}'."""
    rewards: tuple[str, ...] = ("accuracy=2.0",)
    """Reward functions as name=weight: accuracy, format, reasoning, a NAME_reward of this script, or any
    module:function with TRL's signature. The reward is their weighted sum; a weight that is not given is 1."""

    num_steps: int = 550
    """Steps, one rollout each; ignored if num_epochs is set."""
    num_epochs: int = 0
    """If above 0: passes over the training problems instead of num_steps."""
    prompts_per_step: int = 64
    """P, prompts per step."""
    num_generations: int = 16
    """G, completions per prompt, at least 2; their mean reward is the baseline."""
    max_prompt_length: int = 1024
    """In tokens; a longer prompt is an error and is never cut."""
    max_completion_length: int = 12
    """L, in tokens; longer completions are cut off. L is also a constant that the loss divides by."""
    temperature: float = 1.0
    """Temperature of sampling and of the log-probs that are trained, above 0."""

    learning_rate: float = 3e-4
    """Peak learning rate of AdamW."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"
    """After warmup: constant, or a decay that would reach zero one step after the last."""
    warmup_steps: int = 50
    """Steps of linear warmup."""
    weight_decay: float = 0.0
    """Weight decay of AdamW."""
    max_grad_norm: float = 1.0
    """A gradient with a larger norm is scaled down to this one; 0: no clipping."""
    num_iterations: int = 1
    """Optimizer updates per rollout; above 1 the ratio can differ from 1, so epsilon matters."""
    epsilon: float = 0.2
    """Clip range of the ratio."""
    mask_truncated_completions: bool = False
    """Leave completions without a stop token out of the loss, but not out of the group's mean."""

    eval_every: int = 50
    """Steps between evaluations; there is always one before and one after training; 0: only these. [speed]"""
    eval_samples: int = 512
    """Problems per evaluation, held-out ones if there are at least 100 problems; 0: all. Not for the test split."""
    save_every: int = 100
    """Steps between checkpoints. The newest two and the one with the best evaluation are kept; one is always written at
    the end; 0: only that. [speed]"""
    resume: str | None = None
    """A run folder to continue, or latest: this script's newest run in run_dir. Its settings are the defaults; most
    flags that are given as well replace them. [speed]"""
    micro_batch_size: int = 1024
    """Completions per forward pass of the update; the gradient does not depend on it. [speed]"""
    seed: int = 1
    """Seed of the prompt order and the sampling noise."""
    run_dir: str = "runs"
    """Folder in which the run's own folder is made. [speed]"""
    track: bool = False
    """Log to Weights & Biases, to WANDB_ENTITY and WANDB_PROJECT from the environment or .env. [speed]"""
    log_completions: bool = False
    """With --track: in steps that evaluate, also log a table of training completions. [speed]"""


TAG_PROMPT = "Reason step by step inside <think></think>, then give only the final answer inside <answer></answer>."

# The folder that models/get_smollm2.py makes, or else the hub's model.
SMOLLM = "models/SmolLM2-135M-Instruct"
if not (SCRIPT.parent / SMOLLM).is_dir():
    SMOLLM = "HuggingFaceTB/SmolLM2-135M-Instruct"

PRESETS = {
    "tiny": Config(),
    "smollm": Config(preset="smollm", model=SMOLLM, num_steps=30, prompts_per_step=8,
                     system_prompt="Answer with the number only.", num_generations=12, max_completion_length=16,
                     temperature=0.8, learning_rate=1e-5, lr_schedule="constant", warmup_steps=3, eval_every=10,
                     eval_samples=64, micro_batch_size=16),
    "qwen": Config(preset="qwen", task="gsm8k", model="Qwen/Qwen2-0.5B-Instruct", system_prompt=TAG_PROMPT,
                   rewards=("accuracy=2.0", "format=0.5", "reasoning=0.5"), num_steps=300, prompts_per_step=32,
                   max_prompt_length=512, max_completion_length=512, temperature=0.7, learning_rate=5e-6,
                   lr_schedule="constant", warmup_steps=10, micro_batch_size=32),
}  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# Data. A problem is a dict with at least `question` and `answer`; reward functions get every column of it.


def arithmetic():
    """Two-digit + and -, without negative results: 12,195 problems."""
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    results = {f"{a} + {b}": a + b for a, b in pairs}
    results.update({f"{a} - {b}": a - b for a, b in pairs if a >= b})
    return [{"question": f"What is {text}?", "answer": str(result)} for text, result in results.items()]


def simple_math():
    """12 fixed one-digit problems, to see whether the policy can learn anything at all."""
    results = {"2 + 3": 5, "4 + 4": 8, "7 + 2": 9, "6 + 1": 7, "3 + 5": 8, "8 + 1": 9,
               "9 - 4": 5, "8 - 2": 6, "5 - 5": 0, "7 - 3": 4, "6 - 4": 2, "9 - 1": 8}  # fmt: skip
    return [{"question": f"What is {text}?", "answer": str(result)} for text, result in results.items()]


def gsm8k(split="train"):
    """GSM8K's `main` configuration ("socratic" is another data set) from the Hugging Face hub."""
    from datasets import load_dataset

    with refused("cannot load openai/gsm8k", "check the network, or give --dataset-path"):
        return load_dataset("openai/gsm8k", "main", split=split).to_list()


def read_jsonl(path):
    """Problems from a file with one JSON object per line; exits with code 2 at a line that is not one."""
    with refused(f"cannot read '{path}'", "check the path"):
        lines = Path(path).read_bytes().split(b"\n")
    problems = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            fits = False
            with suppress(Exception):
                # utf-8-sig also reads the mark that some editors put before UTF-8.
                text = line.decode("utf-8-sig")
                problem = json.loads(text)
                # An answer that is a number becomes text.
                problem["answer"] = json.loads(text, parse_int=str, parse_float=str)["answer"]
                # Raises unless both are text that can be encoded.
                (problem["question"] + problem["answer"]).encode()
                problems.append(problem)
                fits = problem["answer"] != "" and problem.keys() == problems[0].keys()
            form = '{"question": "text", "answer": "text"} in UTF-8, not empty, with the columns of the first problem'
            require(fits, f"{path}, line {number}: it must be {form}")
    require(problems, f"'{path}' is empty")
    return problems


TASKS = {"arithmetic": arithmetic, "simple_math": simple_math, "gsm8k": gsm8k}


def split_problems(problems):
    """(train, held out): one in eight is held out, whatever the seed; fewer than 100 problems are not split."""

    def digest(problem):
        # The words are sorted, so that 12 + 34 and 34 + 12 are on the same side of the split.
        words = sorted(re.findall(r"\w+|[^\w\s]", problem["question"]))
        return hashlib.sha256(" ".join(words).encode()).digest()

    # By digest: a fixed random order, in which the held-out problems come first and reorderings are neighbours.
    problems = sorted(problems, key=digest)
    held_out = [problem for problem in problems if digest(problem)[0] < 32 and len(problems) >= 100]
    alike = len(problems) >= 100 and digest(problems[0]) == digest(problems[-1])
    require(len(held_out) < len(problems) and not alike, "all problems are alike: there must be some to train on")
    return problems[len(held_out) :], held_out


def load_problems(config):
    """(train, held out, test). Held-out problems are taken from train; test, if there is one, is only for the end."""
    problems = read_jsonl(config.dataset_path) if config.dataset_path else TASKS[config.task]()
    train, held_out = split_problems(problems)
    test = read_jsonl(config.test_path) if config.test_path else []
    if config.task == "gsm8k" and not config.dataset_path and not test:
        test = gsm8k("test")
    return train, held_out[: config.eval_samples or None], test


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


def render(tokenizer, chats, config, **how):
    """The chats through the chat template; exits with code 2 if there is no template, or if it fails."""
    with refused("the chat template fails", "check --system-prompt, --chat-template-kwargs and --prompt-format"):
        return tokenizer.apply_chat_template(chats, **how, **json.loads(config.chat_template_kwargs))


def tokenize_prompts(tokenizer, problems, config):
    """Token ids of each prompt; exits with code 2 if one is empty or too long."""
    system = config.system_prompt
    if config.prompt_format == "chat":
        head = [] if system is None else [{"role": "system", "content": system}]
        chats = [[*head, {"role": "user", "content": problem["question"]}] for problem in problems]
        prompts = render(tokenizer, chats, config, add_generation_prompt=True, return_dict=True)["input_ids"]
    else:
        texts = [f"{system or ''}\n\nQuestion: {problem['question']}\nAnswer:".lstrip() for problem in problems]
        prompts = tokenizer(texts)["input_ids"]
    require(all(prompts), f"prompts have no tokens: '{config.model}' needs a tokenizer")
    limit = config.max_prompt_length
    long = [problem["question"] for problem, ids in zip(problems, prompts, strict=True) if len(ids) > limit]
    cure = "leave them out, or raise --max-prompt-length within the model's positions"
    require(not long, f"{len(long)} prompts are too long, such as {str(long[:1])[1:-1]:.80}: {cure}")
    return prompts


# ----------------------------------------------------------------------------------------------------------------------
# Rollout


@dataclass
class Rollout:
    """What the policy wrote. Row i * G + j is completion j of prompt i; entries outside the mask are zero.

    The mask is True up to and including the stop token. logprobs are those of the tokens when they were sampled.
    entropy is the exact entropy, in nats, of the distribution that each token was sampled from. All are (n, T): the ids
    long, the mask bool, the other two float32.
    """

    completion_ids: torch.Tensor
    completion_mask: torch.Tensor
    logprobs: torch.Tensor
    entropy: torch.Tensor


def pad_prompts(prompts, device):
    """Token ids and mask, (P, S) each. Padding is on the left, so that all prompts end in the same column."""
    ids = [torch.tensor(prompt, device=device) for prompt in prompts]
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-1, padding_side="left")
    return padded.clamp(min=0), padded >= 0


def hidden_states(policy, ids, mask, cache):
    """Last hidden states (B, T, H) of the tokens ids (B, T), whose keys and values go into the cache.

    mask (B, S + T): which of the S positions in the cache and of these T ones are tokens, not padding. If T is 1, the
    mask may also cover the part of a static cache that is still empty.
    """
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    inputs = {"input_ids": ids, "attention_mask": mask.long(), "position_ids": positions}
    return policy.base_model(**inputs, past_key_values=cache, use_cache=cache is not None).last_hidden_state


def scaled_logits(policy, hidden, temperature):
    """Logits / temperature, (B, V), in float32 or better: the one distribution that is both sampled and scored."""
    logits = policy.get_output_embeddings()(hidden)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # Some model families transform the logits after the head: Gemma caps them, Cohere and Granite scale them.
    config = policy.config.get_text_config()
    cap = getattr(config, "final_logit_softcapping", None)
    if cap:
        logits = cap * torch.tanh(logits / cap)
    return logits * (getattr(config, "logit_scale", 1) / getattr(config, "logits_scaling", 1) / temperature)


def sample_tokens(probs, noise):
    """Inverse CDF: the first token (B,) whose cumulative probability exceeds noise (B,), uniform in [0, 1)."""
    # In float32 the rare tokens of a large vocabulary would be lost.
    cdf = probs.cumsum(-1, dtype=torch.float64)
    # The result is beyond the last token only if the probabilities are NaN.
    return torch.searchsorted(cdf, noise[:, None] * cdf[:, -1:], right=True)[:, 0].clamp(max=probs.shape[-1] - 1)


# The newest checkpoint has the weights of the step before, with which the same step would fail again.
NOT_FINITE = "not finite: delete the newest checkpoint, then --resume with a lower --learning-rate"


@torch.no_grad()
def rollout(policy, prompts, *, num_generations, max_completion_length, temperature, eos_ids, noise):
    """Samples a group of completions for each prompt from softmax(logits / temperature) over the whole vocabulary.

    prompts: P lists of token ids. noise: (n, max_completion_length) uniform in [0, 1), one number for each completion
    and position, or None for greedy. Returns a Rollout. A prompt is computed once, and its cache is copied to the rows
    of its group. Rows that have ended leave the computation. On a GPU the policy's step is a CUDA graph: hundreds of
    kernels in one launch.
    """
    # Imported here, so that --help does not wait for it.
    from transformers import StaticCache

    device = policy.device
    on_gpu = device.type == "cuda"
    if noise is not None:
        noise = noise.to(device)
    prompt_ids, prompt_mask = pad_prompts(prompts, device)  # (P, S) each
    width = prompt_ids.shape[1]
    # A static cache stays where it is while it fills, as a graph needs it.
    cache: Any = StaticCache(policy.config, max_cache_len=width + max_completion_length)
    hidden = hidden_states(policy, prompt_ids, prompt_mask, cache)[:, -1]  # (P, H)
    # Code that reads tensor values cannot be captured, nor can a sliding window's cache, which counts in Python.
    can_capture = on_gpu and policy._can_compile_fullgraph and not any(cache.is_sliding)

    # The B rows that have not ended, at first all n, each with a copy of its prompt's keys and values.
    rows = torch.arange(len(prompts) * num_generations, device=device)  # (B,)
    going = torch.ones_like(rows, dtype=torch.bool)  # (B,)
    prompt_of_row = rows // num_generations
    cache.reorder_cache(prompt_of_row)
    hidden = hidden[prompt_of_row]  # (B, H)
    zeros = torch.zeros(len(rows), max_completion_length, device=device)
    mask = torch.cat([prompt_mask[prompt_of_row], zeros.bool()], dim=1)  # (B, S + L)
    batch = Rollout(zeros.long(), zeros.bool(), zeros.clone(), zeros.clone())
    eos = torch.tensor(eos_ids, dtype=torch.long, device=device)
    graph = None
    for t in range(max_completion_length):
        # Draw a token for each row. (B, V) is large, so it is read and written as few times as possible.
        logits = scaled_logits(policy, hidden, temperature)  # (B, V)
        probs = logits.softmax(-1)  # (B, V)
        tokens = logits.argmax(-1) if noise is None else sample_tokens(probs, noise[rows, t])  # (B,)
        batch.completion_ids[rows, t] = tokens * going
        batch.completion_mask[rows, t] = going
        logprobs = probs.gather(-1, tokens[:, None])[:, 0].log()  # (B,)
        batch.logprobs[rows, t] = logprobs.float() * going
        # Entropy: logsumexp(logits) - sum(probs * logits), where 0 * -inf is 0; the first is a logit - its logprob.
        logsumexp = logits.gather(-1, tokens[:, None])[:, 0] - logprobs
        batch.entropy[rows, t] = (logsumexp - (probs * logits).nansum(-1)).float() * going
        going = going & (tokens[:, None] != eos).all(-1)

        # Drop the rows that have ended. Asking a GPU which ones have ended means waiting for it, so it is asked every
        # 16 tokens. On a GPU rows are dropped only when at least half of them have ended, because each new shape needs
        # a new graph.
        if not on_gpu or t % 16 == 15 or t + 1 == max_completion_length:
            keep = going.nonzero()[:, 0]
            if len(keep) == 0 or t + 1 == max_completion_length:
                break
            if len(keep) < len(rows) and (not on_gpu or len(keep) <= len(rows) // 2):
                rows, tokens, going, mask = (tensor[keep] for tensor in (rows, tokens, going, mask))
                cache.reorder_cache(keep)
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
            # A replay runs the same kernels on the same memory: it reads last, mask and cache, and writes next_hidden.
            last.copy_(tokens[:, None])
            graph.replay()
            hidden = next_hidden
    if not batch.logprobs.isfinite().all():
        raise FloatingPointError(f"the policy's log-probs are {NOT_FINITE}")
    return batch


# ----------------------------------------------------------------------------------------------------------------------
# Advantages, log-probs, loss

# Logits of one chunk: 0.5 GB in float32, and a few times that with the values computed from them.
LOGITS_AT_ONCE = 2**27


def group_advantages(rewards, num_generations):
    """A_i = r_i - mean(r over its group), (n,) -> (n,): equation 3 of the paper, without its division by the std.

    NaN marks a completion that no reward function judged: it is left out of the mean, and its advantage is 0.
    """
    groups = rewards.view(-1, num_generations)  # (P, G)
    advantages = groups - groups.nanmean(-1, keepdim=True)
    # Equal rewards carry no signal; their computed mean can have a rounding error, which would look like a signal.
    lowest = groups.nan_to_num(math.inf).amin(-1, keepdim=True)  # (P, 1)
    highest = groups.nan_to_num(-math.inf).amax(-1, keepdim=True)
    return advantages.masked_fill(lowest >= highest, 0.0).nan_to_num(0.0).flatten()


def completion_hidden_states(policy, prompts, row_prompt, ids, mask):
    """Hidden states (n, T, H) that predict the completion tokens ids (n, T); each prompt is computed once.

    The prompts' keys and values are a prefix that all completions of a prompt share; gradients flow back through it.
    """
    from transformers import DynamicCache

    used, row_prompt = torch.unique(row_prompt, return_inverse=True)
    prompt_ids, prompt_mask = pad_prompts([prompts[i] for i in used.tolist()], policy.device)
    cache = DynamicCache(config=policy.config)
    # index_select, because on a CPU its gradient has the same bits in every run, and that of plain indexing does not.
    start = hidden_states(policy, prompt_ids, prompt_mask, cache)[:, -1:].index_select(0, row_prompt)  # (n, 1, H)
    if ids.shape[1] == 1:
        return start
    cache.reorder_cache(row_prompt)
    whole_mask = torch.cat([prompt_mask[row_prompt], mask[:, :-1]], dim=1)  # (n, S + T - 1)
    return torch.cat([start, hidden_states(policy, ids[:, :-1], whole_mask, cache)], dim=1)


def chunk_logprobs(policy, hidden, token_ids, temperature):
    """Log-probs (B,) of token_ids (B,) after hidden states (B, H)."""
    logits = scaled_logits(policy, hidden, temperature)
    return logits.gather(-1, token_ids[:, None])[:, 0] - logits.logsumexp(-1)


def completion_logprobs(policy, prompts, completion_ids, completion_mask, *, prompt_index, temperature):
    """Log-prob of every completion token under softmax(logits / temperature), (n, T), zero outside the mask.

    prompts: lists of token ids; prompt_index (n,): the prompt of each row. Differentiable. Never holds logits for more
    than a chunk of tokens: a vocabulary of 150,000 makes them the largest tensor of all.
    """
    # Equal completions of a prompt have equal log-probs, so each is scored once. Short answers are often equal.
    longest = int(completion_mask.sum(-1).max())
    tokens = completion_ids.masked_fill(~completion_mask, -1)[:, :longest]
    # rows (n, 1 + longest): a prompt and its tokens; inverse (n,): which distinct row each of them is.
    rows = torch.cat([prompt_index[:, None].to(tokens), tokens], dim=1)
    distinct, inverse = torch.unique(rows, dim=0, return_inverse=True)
    mask = distinct[:, 1:] >= 0
    ids = distinct[:, 1:].clamp(min=0)
    hidden = completion_hidden_states(policy, prompts, distinct[:, 0], ids, mask)

    # The backward pass computes each chunk's logits again instead of keeping them.
    size = max(1, LOGITS_AT_ONCE // policy.config.get_text_config().vocab_size)
    chunks = zip(hidden[mask].split(size), ids[mask].split(size), strict=True)
    values = [checkpoint(chunk_logprobs, policy, *chunk, temperature, use_reentrant=False) for chunk in chunks]
    logprobs = values[0].new_zeros(len(ids), completion_ids.shape[1])
    logprobs[:, :longest][mask] = torch.cat(values)
    return logprobs.index_select(0, inverse)


def dr_grpo_loss(logprobs, old_logprobs, advantages, loss_mask, *, num_completions, max_completion_length, epsilon=0.2):
    """Scalar: -1/(N*L) * sum of min(ratio * A, clip(ratio, 1-epsilon, 1+epsilon) * A) over the mask.

    logprobs, old_logprobs, loss_mask (n, T); advantages (n,): any part of a step's rows. num_completions N and
    max_completion_length L are those of the whole step, so that the sum over its parts is the step's loss.
    """
    assert logprobs.shape == old_logprobs.shape == loss_mask.shape
    ratio = (logprobs - old_logprobs).exp()  # (n, T)
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon)
    per_token = -torch.minimum(ratio * advantages[:, None], clipped * advantages[:, None])
    # Dr GRPO divides by a constant, not by the lengths.
    return (per_token * loss_mask).sum() / (num_completions * max_completion_length)


def micro_batches(batch, advantages, loss_mask, config):
    """Row indices of each micro-batch. Groups of similar length are put together, so that a batch has little padding.

    A completion that is masked or has zero advantage has no gradient: it is left out here, but it counts in N.
    """
    longest = batch.completion_mask.sum(-1).view(-1, config.num_generations).amax(-1)  # (P,)
    order = longest.repeat_interleave(config.num_generations).argsort(stable=True)  # (n,)
    has_gradient = (advantages != 0) & loss_mask.any(-1)
    order = order[has_gradient[order]]
    return [rows for rows in order.split(config.micro_batch_size) if len(rows) > 0]


def make_masters(policy):
    """The weights that the optimizer updates: the policy's own, or float32 copies of them if they are bf16.

    bf16 has eight significant bits, so it would round an update of 1e-6 away. Gradients of micro-batches are summed in
    float32.
    """
    masters = list(policy.parameters())
    for i, weight in enumerate(masters):
        if weight.dtype == torch.bfloat16:
            masters[i] = weight.detach().float()

            def add_gradient(weight, master=masters[i]):
                master.grad += weight.grad
                weight.grad = None

            weight.register_post_accumulate_grad_hook(add_gradient)
        masters[i].grad = torch.zeros_like(masters[i])
    return masters


def learning_rate(step, num_steps, config):
    """The learning rate of a step (1, 2, ..., num_steps)."""
    passed = max(0, step - config.warmup_steps - 1) / max(1, num_steps - config.warmup_steps)
    decay = {"constant": 1.0, "linear": 1 - passed, "cosine": (1 + math.cos(math.pi * passed)) / 2}
    return config.learning_rate * min(1, step / max(1, config.warmup_steps)) * decay[config.lr_schedule]


# ----------------------------------------------------------------------------------------------------------------------
# Rewards and evaluation


def score(run, problems, batch):
    """A record for each completion. None means "does not apply".

    Every number in a record is a metric, logged as its mean in training and in evaluations (`means`): a metric of your
    own is one more line here, such as record["words"] = len(record["completion"].split()), which is train/words.
    """
    lengths = batch.completion_mask.sum(-1).tolist()
    ids = [row[:length] for row, length in zip(batch.completion_ids.tolist(), lengths, strict=True)]
    # Where the prompt has opened the think block, its tag is put back, so that rewards see the whole block.
    texts = [run.opening + text for text in run.tokenizer.batch_decode(ids, skip_special_tokens=True)]
    # From rewards.py: question, answer, completion, extracted (the answer that was read), right, parsed, rewards/NAME,
    # and reward, the weighted sum of those that apply. It calls each reward function as TRL does, as
    # NAME_reward(completions, answer, **other columns) -> one number or None each, with completions[i][0]["content"]
    # the text.
    records = grade(run.rewards, problems, texts, ids, run.step)
    for record, row, entropy in zip(records, ids, batch.entropy.sum(-1).tolist(), strict=True):
        record["truncated"] = row[-1] not in run.sampling["eos_ids"]
        record["length"] = len(row)
        record["terminated_length"] = None if record["truncated"] else len(row)
        # A sum over the tokens; `means` divides this one by the length.
        record["entropy"] = entropy
    return records


def evaluate(run, split, problems):
    """Accuracy, greedy and sampled once at the training temperature: (metrics, two records for each problem).

    The sampling noise is the same at every evaluation, so that before and after are a paired comparison.
    """
    config = run.config
    noise = share(uniform_noise(config.seed, split, 0, len(problems), config.max_completion_length))
    problems = share(problems)
    # As many rows at a time as this process samples in a training step: so many fit in memory.
    size = len(share(range(config.prompts_per_step * config.num_generations)))
    records: list[Any] = []
    for start in range(0, len(problems), size):
        chunk = problems[start : start + size]
        prompts = tokenize_prompts(run.tokenizer, chunk, config)
        for mode, uniform in (("greedy", None), ("sampled", noise[start : start + size])):
            batch = rollout(run.policy, prompts, num_generations=1, noise=uniform, **run.sampling)
            records.extend({"split": split, "mode": mode, **record} for record in score(run, chunk, batch))
    records = gather(records)
    name = "eval/train_subset_accuracy" if split == "train_subset" else f"{split}/accuracy"
    right = [record["right"] for record in records if record["mode"] == "greedy"]
    low, high = wilson_interval(sum(right), len(right))
    sampled = means([record for record in records if record["mode"] == "sampled"], split)
    metrics = {name: fmean(right), f"{name}_low": low, f"{name}_high": high}
    metrics[f"{name}_sampled"] = sampled.pop(f"{split}/accuracy")
    return metrics | sampled, records


# ----------------------------------------------------------------------------------------------------------------------
# Training. From the plumbing: `start` makes the run (policy, masters, optimizer, tokenizer, rewards, train, splits, and
# sampling, the arguments of every rollout), `share` gives this process's part and `gather` all parts, `clock` the time
# after the GPU has finished, and `finish_step` evaluates, logs, saves and prints.


def main(config):
    """Trains, evaluates and logs; returns the metrics of each step, from the evaluation before training (step 0) on."""
    with ExitStack() as stack:
        run = start(config, stack)
        if run.finished:
            return run.history
        policy, masters, optimizer = run.policy, run.masters, run.optimizer
        group_size = config.num_generations
        max_length = config.max_completion_length
        # The history has a row for every step from 0 on. That of the last finished step is missing in a new run, and in
        # a resumed run whose evaluation failed: that evaluation is done now.
        if len(run.history) <= run.step:
            finish_step(run, run.step, {}, [])

        for step in tqdm(range(run.step + 1, run.num_steps + 1), initial=run.step, total=run.num_steps, unit="step",
                         disable=None if PartialState().is_main_process else True):  # fmt: skip
            # Sample: a group of G completions for each prompt of this process.
            began = clock()
            problems = share(problems_of_step(run.train, step, config))
            prompts = tokenize_prompts(run.tokenizer, problems, config)
            noise = uniform_noise(config.seed, "sampling", step, config.prompts_per_step, group_size * max_length)
            # So far a row is the noise of a group, so it is shared like the prompts; now it is that of a completion.
            noise = share(noise).view(-1, max_length)  # (n, L)
            batch = rollout(policy, prompts, num_generations=group_size, noise=noise, **run.sampling)  # fields (n, T)
            sampled = clock()

            # Reward.
            records = score(run, [problem for problem in problems for _ in range(group_size)], batch)
            values = [math.nan if record["reward"] is None else record["reward"] for record in records]
            rewards = torch.tensor(values, device=run.device)  # (n,)
            rewarded = clock()

            # Advantage: the group's mean is the baseline; nothing is divided by its standard deviation.
            advantages = group_advantages(rewards, group_size)  # (n,)
            kept = [not (config.mask_truncated_completions and record["truncated"]) for record in records]
            loss_mask = batch.completion_mask & torch.tensor(kept, device=run.device)[:, None]  # (n, T)

            # Update: the gradients of the micro-batches add up to the step's. Old log-probs come from the first forward
            # pass, not from the sampler, so the ratio is exactly 1 in the first update; train/logprob_gap_mean says how
            # far the two differ. Rows without gradient are skipped.
            optimizer.param_groups[0]["lr"] = learning_rate(step, run.num_steps, config)
            old_logprobs = torch.zeros_like(batch.logprobs)  # (n, T)
            losses, gaps, clipped = [], [], []
            for iteration in range(config.num_iterations):
                optimizer.zero_grad(set_to_none=False)
                for rows in micro_batches(batch, advantages, loss_mask, config):
                    ids, mask = batch.completion_ids[rows], batch.completion_mask[rows]  # (m, T)
                    logprobs = completion_logprobs(policy, prompts, ids, mask, prompt_index=rows // group_size,
                                                   temperature=config.temperature)  # (m, T)  # fmt: skip
                    if iteration == 0:
                        old_logprobs[rows] = logprobs.detach()
                        gaps.extend((batch.logprobs[rows] - logprobs.detach())[mask].abs().tolist())
                    loss = dr_grpo_loss(logprobs, old_logprobs[rows], advantages[rows], loss_mask[rows],
                                        num_completions=config.prompts_per_step * group_size, epsilon=config.epsilon,
                                        max_completion_length=max_length)  # fmt: skip
                    # This adds to the gradients of the masters: the policy's weights, or float32 copies of bf16 ones.
                    loss.backward()
                    losses.append(loss.item())
                    # The clip removes a token's gradient above 1 + epsilon if A > 0, and below 1 - epsilon if A < 0.
                    outside = ((logprobs.detach() - old_logprobs[rows]).exp() - 1) * advantages[rows, None].sign()
                    clipped.extend((outside > config.epsilon)[loss_mask[rows]].tolist())
                # Summed over processes, because the loss divides by the whole step's N. The loss that is logged is the
                # mean over the iterations; the norm is that of the last one.
                total_loss = sum(gather(losses)) / (iteration + 1)
                for master in masters:
                    master.grad = reduce(master.grad, "sum")
                grad_norm = torch.nn.utils.clip_grad_norm_(masters, config.max_grad_norm or math.inf).item()
                if not math.isfinite(grad_norm + total_loss):
                    raise FloatingPointError(f"step {step} is {NOT_FINITE}")
                # Until the update is done the weights are between two steps, and must not be saved.
                run.step = None
                optimizer.step()
                for master, weight in zip(masters, policy.parameters(), strict=True):
                    weight.data.copy_(master)
            run.step = step
            updated = clock()

            # Measure.
            records = gather(records)
            tokens = sum(record["length"] for record in records)
            metrics = {"train/loss": total_loss, "train/grad_norm": grad_norm, **means(records, "train"),
                       "train/learning_rate": optimizer.param_groups[0]["lr"],
                       "train/epoch": step * config.prompts_per_step / len(run.train),
                       "time/rollout_s": sampled - began, "time/reward_s": rewarded - sampled,
                       "time/update_s": updated - rewarded,
                       "perf/completion_tokens_per_s": tokens / (updated - began)}  # fmt: skip
            for record, advantage in zip(records, gather(advantages.tolist()), strict=True):
                record["advantage"] = advantage
            # Groups without signal: those whose rewards are all equal.
            metrics.update(signal_metrics(records, group_size))
            gaps, clipped = gather(gaps), gather(clipped)
            if gaps:
                metrics["train/logprob_gap_mean"] = fmean(gaps)
                metrics["train/logprob_gap_max"] = max(gaps)
            if clipped and config.num_iterations > 1:
                metrics["train/clip_ratio"] = fmean(clipped)
            if torch.cuda.is_available():
                metrics["perf/peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9

            # Evaluate, log, save.
            finish_step(run, step, metrics, records)
    show_report(run)
    return run.history


# ----------------------------------------------------------------------------------------------------------------------
# Plumbing: settings, processes, models, run folder, checkpoints, signals. An experiment changes little below.


def require(condition, message, code=2):
    """Ends the program with one line that says what is wrong and what to do, unless the condition holds."""
    if not condition:
        print("error:", " ".join(message.split()), file=sys.stderr)
        raise SystemExit(code)


@contextmanager
def refused(trouble, cure, code=2):
    """Exits with one line if the body raises an exception."""
    try:
        yield
    except Exception as error:  # noqa: BLE001
        require(False, f"{trouble} ({error!r:.200}): {cure}", code)


def say(text):
    """Prints above the progress bar, once for all processes."""
    if text and PartialState().is_main_process:
        tqdm.write(text)
        sys.stdout.flush()


def check_config(config):
    """Exits with code 2 on a setting that cannot work, before anything is loaded."""
    require(config.task in TASKS, f"unknown task '{config.task}': --task takes {', '.join(TASKS)}")
    require(config.num_generations > 1, "a group needs two completions: raise --num-generations")
    require(config.rewards, "--rewards is empty: give one, such as accuracy=2.0")
    positive = ("temperature", "prompts_per_step", "micro_batch_size", "max_completion_length", "num_iterations")
    for name, value in vars(config).items():
        if isinstance(value, int | float):
            require(0 <= value < math.inf, f"{name} is {value}: it must be finite and not negative")
            require(value > 0 or name not in positive, f"{name} is 0: it must be above 0")
    if config.track and os.getenv("WANDB_MODE") not in ("offline", "disabled", "dryrun"):
        import wandb

        with refused("--track has no login", "set WANDB_API_KEY in .env, `uv run wandb login`, or WANDB_MODE=offline"):
            if not wandb.login(prompt=False, verify=False):
                raise ValueError("no API key")


def parse_config(arguments):
    """Reads --preset or --resume first, then every flag, with the values of that preset or run as defaults, which tyro
    needs before it reads."""
    found = re.search(r"--preset[= ](\S+)", " ".join(arguments))
    name: Any = found[1] if found else "auto"
    preset = name
    if name == "auto":
        preset = "qwen" if torch.cuda.is_available() else "tiny"
    require(preset in PRESETS, f"unknown preset '{preset}': --preset takes auto, {', '.join(PRESETS)}")
    config = tyro.cli(Config, default=replace(PRESETS[preset], preset=name), args=arguments, description=__doc__)
    if config.resume is None:
        return replace(config, preset=preset)
    folder, recorded = recorded_run(config)
    config = tyro.cli(Config, default=recorded, args=arguments)
    return replace(config, preset=recorded.preset if name == "auto" else name, resume=str(folder))


# Processes and devices


def share(items):
    """This process's part of a list or tensor; the parts are contiguous, so that `gather` restores the order."""
    rank, processes = PartialState().process_index, PartialState().num_processes
    return items[len(items) * rank // processes : len(items) * (rank + 1) // processes]


class OtherProcessFailedError(RuntimeError):
    """Another process raised an exception, so this one stops too."""


def gather(items):
    """The items of all processes, in order. If one has failed, the others stop here instead of waiting for it."""
    parts = gather_object([items])
    if None in parts:
        raise OtherProcessFailedError("see the message of the process that failed")
    return [item for part in parts for item in part]


def clock():
    """Seconds, once the GPU has done all that it was given, so that each phase is charged with its own work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


# Model and optimizer


def load_pretrained(loader, config, **kwargs):
    """What loader finds in the folder --model next to this script, or else at --model; exits with code 2 otherwise."""
    beside = SCRIPT.parent / config.model
    name = beside if beside.is_dir() else config.model
    with refused(f"cannot load '{name}'", "check --model, or use --preset tiny"):
        return loader.from_pretrained(name, **kwargs)


def load_policy(config, device):
    """A causal LM in eval mode (no dropout: what is sampled is what is scored), bf16 on a GPU, float32 on a CPU."""
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return load_pretrained(AutoModelForCausalLM, config, dtype=dtype).to(device).eval()


def stop_tokens(policy, tokenizer, config):
    """Ids of the tokens that end a completion: the tokenizer's, generation_config's, and the chat template's.

    Nothing else of generation_config is used. Base models often have a chat template that ends a turn with a token
    which is not among the other two.
    """
    # One id, a list or None.
    ends = policy.generation_config.eos_token_id
    ids = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    if config.prompt_format == "chat":
        turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "ANSWER"}]
        after = render(tokenizer, turns, config, tokenize=False).rpartition("ANSWER")[2].lstrip()
        for text, token in tokenizer.get_added_vocab().items():
            if after.startswith(text) and token not in ids:
                say(f"completions also end with {text}, as turns do in the chat template")
                ids.add(token)
    return sorted(ids)


def check_policy(policy, prompts, config):
    """Exits with code 2 unless sampler and trainer agree with the model's own plain forward pass, before training.

    It compares four tokens after the shortest prompt, which is padded, and four at the end of the longest text that can
    occur, made by repeating the longest prompt. So templates, sliding windows and position limits are part of it.
    """
    needed = max(map(len, prompts)) + config.max_completion_length
    positions = getattr(policy.config.get_text_config(), "max_position_embeddings", None) or needed
    require(positions >= needed, f"the model has {positions} positions, not {needed}: lower --max-completion-length")
    prompts = [(max(prompts, key=len) * needed)[: needed - 4], min(prompts, key=len)]
    with refused(f"{type(policy).__name__} cannot be trained here", "choose another --model"), torch.no_grad():
        batch = rollout(policy, prompts, num_generations=1, max_completion_length=4, temperature=1.0, eos_ids=[],
                        noise=None)  # fmt: skip
        scored = completion_logprobs(policy, prompts, batch.completion_ids, batch.completion_mask, temperature=1.0,
                                     prompt_index=torch.arange(2, device=policy.device))  # fmt: skip
        # For each of the two prompts the log-probs of four tokens, found in two ways: (2, 2, 4).
        both = torch.stack([batch.logprobs, scored], dim=1)
        for prompt, ids, logprobs in zip(prompts, batch.completion_ids, both, strict=True):
            text = torch.tensor([prompt + ids.tolist()], device=policy.device)
            plain = policy(text).logits[0, -5:-1].float().log_softmax(-1).gather(-1, ids[:, None])[:, 0]  # (4,)
            gap = (logprobs - plain).abs().mean().item()
            # Rounding explains gaps up to this; `not` also catches NaN.
            if not gap < (0.1 if policy.dtype == torch.bfloat16 else 1e-4):
                raise ValueError(f"log-probs are inexact by {gap:.2g}")


# Run folder, log, checkpoints

LOGS = ("metrics.jsonl", "completions.jsonl")
DISK_FULL = "make room on the disk (or give --save-every 0)"
# A resumed run keeps these settings; any other can be changed by a flag beside --resume.
KEPT = ("preset", "task", "model", "dataset_path", "test_path")


def start(config, stack):
    """Makes all that a run needs: data, folder, policy, optimizer. What it puts on the stack is undone at the end."""
    # This comes before the import of transformers, which reads HF_HOME.
    load_dotenv()
    from transformers import AutoTokenizer, logging

    logging.disable_progress_bar()
    check_config(config)
    state = PartialState(cpu=not torch.cuda.is_available())
    require(config.prompts_per_step >= state.num_processes, "fewer prompts than processes: raise --prompts-per-step")
    run = SimpleNamespace(config=config, device=state.device, tracker=None, signals=[], folder=None, history=[])
    run.train, held_out, test = load_problems(config)
    with refused("cannot use --rewards", "mend the data, or give NAME=WEIGHT or module:function=WEIGHT"):
        # A reward that is named without its module is looked up in this script first. Each is called once.
        run.rewards = load_rewards(config.rewards, globals(), [*run.train, *held_out, *test])
    # A task with few problems has none to hold out: then accuracy is measured on the training problems.
    subset = [] if held_out else run.train[: config.eval_samples or None]
    run.splits = {"eval": held_out, "train_subset": subset, "test": test}
    run.num_steps = math.ceil(config.num_epochs * len(run.train) / config.prompts_per_step) or config.num_steps

    stack.callback(remove_if_empty, run)
    with refused(f"cannot write to '{config.run_dir}'", "make room on the disk, or choose another --run-dir"):
        opened = open_folder(run, stack) if state.is_main_process else [None] * 3
    run.folder, run.step, run.history = broadcast_object_list(opened)
    task = vars(config).get("dataset_path") or config.task
    task += f" ({len(run.train)} problems to train on, {len(held_out)} held out to evaluate)"
    say(f"preset {config.preset} on {run.device}: {config.model}, {task}, seed {config.seed}, in {run.folder}")
    if config.warmup_steps > run.num_steps:
        say("the run ends before its warmup does: lower --warmup-steps")
    # The row of its last step is logged, and no step is left.
    run.finished = len(run.history) > run.step >= run.num_steps
    if run.finished:
        say(f"this run is finished: all {run.num_steps} steps are done")
        return run

    run.tokenizer = load_pretrained(AutoTokenizer, config)
    prompts = tokenize_prompts(run.tokenizer, [*run.train, *held_out, *test], config)
    # Some chat templates open the think block, so that a completion begins inside it.
    run.opening = "<think>" if run.tokenizer.decode(prompts[0]).rstrip().endswith("<think>") else ""
    run.policy = load_policy(config, run.device)
    check_policy(run.policy, prompts, config)
    run.masters = make_masters(run.policy)
    run.optimizer = torch.optim.AdamW(run.masters, weight_decay=config.weight_decay, fused=True)
    run.sampling = {"max_completion_length": config.max_completion_length, "temperature": config.temperature,
                    "eos_ids": stop_tokens(run.policy, run.tokenizer, config)}  # fmt: skip
    if run.step > 0:
        load_checkpoint(run)
    if state.is_main_process:
        # Three checkpoints are kept while the next one is written, of up to 16 bytes a parameter.
        missing = 4 - len(list(run.folder.glob("checkpoints/step_*"))) if config.save_every > 0 else 1
        needed = missing * 16 * run.policy.num_parameters()
        require(shutil.disk_usage(run.folder).free > needed, f"checkpoints need {needed / 1e9:.3f} GB: {DISK_FULL}")
        if config.track:
            run.tracker = start_tracking(config, run.folder, stack)
    run.first_step = run.saved = run.step
    run.began = time.perf_counter()
    record_signals(run, stack)
    stack.enter_context(saved_at_failure(run))
    return run


def open_folder(run, stack):
    """Makes the run folder, or reopens the one to resume, and locks it: [folder, step, history].

    A run goes on from its newest checkpoint. Steps after that are repeated, so the logs are cut back to it. What has
    changed since it started is said and kept: the settings in changes.txt, a source beside the first one.
    """
    config, changes = run.config, []
    if config.resume is None:
        folder = make_folder(run)
    else:
        folder, recorded = recorded_run(config)
        for name, before in vars(recorded).items():
            if vars(config)[name] != before:
                require(name not in KEPT, f"'{folder}' was started with another {name}: leave the flag out")
                changes.append(f"{name} from {before} to {vars(config)[name]}")
    with refused(f"another process works in '{folder}'", "wait for it, or stop it"):
        stack.enter_context(FileLock(folder / "lock", timeout=0))
    # Written beside and renamed, so that a crash leaves the old one or the new one.
    beside = folder / "config.json.partial"
    beside.write_text(json.dumps({**vars(config), "resume": None}, indent=2))
    beside.replace(folder / "config.json")
    state: Any = {"step": 0, "log_bytes": [0, 0]}
    checkpoints = sorted(folder.glob("checkpoints/step_*"))
    if checkpoints:
        state = json.loads((checkpoints[-1] / "state.json").read_text())
    for name, size in zip(LOGS, state["log_bytes"], strict=True):
        with (folder / name).open("a") as file:
            file.truncate(min(size, file.tell()))
    contents = {path.name: path.read_bytes() for path in (SCRIPT, SCRIPT.with_name("rewards.py"))}
    contents["problems.sha256"] = hashlib.sha256(repr([run.train, run.splits]).encode()).hexdigest().encode()
    for name, content in contents.items():
        first = folder / name
        if not first.exists():
            first.write_bytes(content)
        elif first.read_bytes() != content:
            changes.append(name)
            first.with_stem(f"{first.stem}_after_step_{state['step']}").write_bytes(content)
    if changes:
        text = f"changed after step {state['step']}: {', '.join(changes)}"
        say(text)
        with (folder / "changes.txt").open("a") as file:
            file.write(f"{text}\n")
    history = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [folder, state["step"], history]


def recorded_run(config):
    """The run folder that --resume names, and its settings; exits with code 2 if it is not one of this script's."""
    folder = Path(config.resume)
    if config.resume == "latest":
        folders = [path.parent for path in Path(config.run_dir).glob(f"*/{SCRIPT.name}")]
        folder = max(folders, key=lambda path: path.name.rsplit("__", 1)[-1], default=folder)
    with refused(f"'{folder}' is no run folder of {SCRIPT.name}", "give --resume one, or latest with --run-dir"):
        (folder / SCRIPT.name).stat()
        recorded = json.loads((folder / "config.json").read_text())
        recorded.update(rewards=tuple(recorded["rewards"]), run_dir=config.run_dir, resume=config.resume)
        return folder, Config(**recorded)


def make_folder(run):
    """A new run folder, {exp}__{task}__{model}__{seed}__{time}, with its environment."""
    config = run.config
    model = re.sub(r"[^\w.-]+", "-", Path(config.model).name)
    name = f"{SCRIPT.stem}__{config.task}__{model}__{config.seed}__{datetime.now():%Y%m%d-%H%M%S-%f}"
    run.folder = Path(config.run_dir, name)
    # Tags are not used, and without git this is empty. remote_train.sh gives the commit of a tree that it copied.
    git = "git describe --always --dirty --abbrev=40 --exclude='*'"
    described = subprocess.run(git, shell=True, cwd=SCRIPT.parent, capture_output=True, text=True).stdout.strip()
    environment = {"command": sys.argv, "commit": os.getenv("WANDB_GIT_COMMIT") or described,
                   "packages": {package.name: package.version for package in distributions()},
                   "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"}  # fmt: skip
    run.folder.mkdir(parents=True)
    (run.folder / "environment.json").write_text(json.dumps(environment, indent=2))
    return run.folder


def start_tracking(config, folder, stack):
    """Begins this run's W&B run, or continues it."""
    import wandb

    # Without timeouts the process would wait forever if the network is lost.
    patience = {"init_timeout": 20, "finish_timeout": 20}
    tracker = wandb.init(project=os.getenv("WANDB_PROJECT") or "dr-grpo", name=folder.name, id=folder.name,
                         group=folder.name.rsplit("__", 2)[0], resume="allow", dir=folder, config=vars(config),
                         allow_val_change=True, save_code=True, settings=patience)  # fmt: skip
    # wandb's own `with` would print a traceback for a run that ends by a signal.
    stack.push(lambda error, *_: tracker.finish(exit_code=int(error is not None)))
    return tracker


def checkpoint_folder(run, step):
    """Where the checkpoint of a step is kept."""
    return run.folder / "checkpoints" / f"step_{step:06d}"


def best_step(history):
    """The first step with the highest greedy accuracy, on held-out problems if there are any."""
    return max(history, key=lambda row: row.get("eval/accuracy", row.get("eval/train_subset_accuracy", -1)))["step"]


def save_checkpoint(run):
    """Saves all that a resumed run needs; renamed into place when complete, so a crash leaves the last good one."""
    if not PartialState().is_main_process:
        return
    final = checkpoint_folder(run, run.step)
    partial = final.with_name("partial")
    with refused("cannot save a checkpoint", DISK_FULL, code=1), ExitStack() as stack:
        stack.callback(shutil.rmtree, partial, ignore_errors=True)
        # In Hugging Face format, so that other programs can load it.
        run.policy.save_pretrained(partial)
        run.tokenizer.save_pretrained(partial)
        torch.save({"masters": run.masters, "optimizer": run.optimizer.state_dict()}, partial / "trainer.pt")
        log_bytes = [(run.folder / name).stat().st_size for name in LOGS]
        (partial / "state.json").write_text(json.dumps({"step": run.step, "log_bytes": log_bytes}))
        # It is there already if its evaluation failed, which has been repeated now.
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
    run.saved = run.step
    for old in sorted(final.parent.glob("step_*"))[:-2]:
        if old != checkpoint_folder(run, best_step(run.history)):
            shutil.rmtree(old)


def load_checkpoint(run):
    """Restores the weights and the optimizer's state of run.step."""
    state = torch.load(checkpoint_folder(run, run.step) / "trainer.pt", map_location=run.policy.device)
    for master, weight, saved in zip(run.masters, run.policy.parameters(), state["masters"], strict=True):
        master.data.copy_(saved)
        weight.data.copy_(saved)
    run.optimizer.load_state_dict(state["optimizer"])


def remove_if_empty(run):
    """A start that is refused leaves no run folder; nor does one that ends before its first evaluation."""
    if run.folder and not run.history:
        shutil.rmtree(run.folder, ignore_errors=True)


def record_signals(run, stack):
    """From now on a signal is only recorded, and `finish_step` ends the run; a second SIGINT ends it at once."""

    def record(number, _):
        run.signals.append(number)
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)

    # Windows has no SIGHUP.
    for number in {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}:
        # nohup ignores SIGHUP.
        if signal.getsignal(number) != signal.SIG_IGN:
            stack.callback(signal.signal, number, signal.signal(number, record))


@contextmanager
def saved_at_failure(run):
    """Saves the last finished step when training ends early, by a signal or an exception, and says how to continue."""
    try:
        yield
    except (SystemExit, Exception) as error:
        if not isinstance(error, OtherProcessFailedError):
            # The other processes receive this None from their next gather, and end too.
            gather_object([None])
        # Code 1 is that of a full disk.
        if run.step not in (None, run.saved) and getattr(error, "code", 0) != 1:
            with suppress(SystemExit):
                save_checkpoint(run)
        if run.history:
            say(f"ended early; to continue: uv run {SCRIPT.name} --resume '{run.folder}'")
        if isinstance(error, torch.OutOfMemoryError):
            say("out of memory: take a lower --micro-batch-size, or fewer --prompts-per-step")
        raise


def finish_step(run, step, metrics, records):
    """Evaluates if it is time, logs the step, saves and prints; ends the run if a signal was received meanwhile.

    metrics, records: those of training, empty before it.
    """
    config = run.config
    last = step >= run.num_steps
    # Step 0 is always due.
    due = last or step % (config.eval_every or math.inf) == 0
    metrics = {"step": step, **metrics}
    # Of a training step only two groups are kept in completions.jsonl.
    trained = [{"split": "train", **record} for record in records[: 2 * config.num_generations]]
    evaluated = []
    for split, problems in run.splits.items():
        # The test split is only for the end.
        if problems and due and (last or split != "test"):
            measured, rows = evaluate(run, split, problems)
            metrics.update(measured)
            evaluated.extend(rows)
    run.history.append(metrics)
    if PartialState().is_main_process:
        for name, rows in zip(LOGS, ([metrics], [*trained, *evaluated]), strict=True):
            with refused("cannot write a log", DISK_FULL, code=1), (run.folder / name).open("a") as file:
                file.writelines(json.dumps({"step": step, **row}) + "\n" for row in rows)
    if run.tracker is not None:
        run.tracker.log(metrics, step=step)
        if config.log_completions and due and trained:
            import wandb

            cells = [list(map(str, record.values())) for record in trained]
            run.tracker.log({"completions/table": wandb.Table(columns=list(trained[0]), data=cells)}, step=step)
    wanted = config.save_every > 0 and (step % config.save_every == 0 or best_step(run.history) == step)
    if step > 0 and (last or wanted):
        save_checkpoint(run)
    if due or step % math.ceil(run.num_steps / 20) == 0:
        values = [f"{key} {metrics[key]:.3f}" for key in metrics if key.endswith(("reward", "accuracy", "sampled"))]
        elapsed = time.perf_counter() - run.began
        # Steps, elapsed and remaining time, without the bar itself.
        progress = tqdm.format_meter(step, run.num_steps, elapsed, ncols=0, unit="step", initial=run.first_step)
        say(f"{progress} {', '.join(values)}")
    used = [name for name, (_, weight) in run.rewards.items() if weight]
    say(signal_line(run.history, used, config.num_generations))
    signals = gather(run.signals)
    if signals:
        raise SystemExit(128 + signals[0])


def show_report(run):
    """Prints the closing table and draws curve.png (a failure of report.py is no failure of the run), then names the
    best checkpoint, and ends with a line that a program can read."""
    if PartialState().is_main_process:
        subprocess.run([sys.executable, SCRIPT.with_name("report.py"), run.folder], check=False)
        best, last = checkpoint_folder(run, best_step(run.history)), run.history[-1]
        if best.is_dir():
            print(f"best evaluation: {best}")
        print("final:", *[f"{key}={last[key]:.3f}" for key in last if key.startswith(("eval/", "test/"))])


if __name__ == "__main__":
    main(parse_config(sys.argv[1:]))
    PartialState().destroy_process_group()
