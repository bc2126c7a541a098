"""Makes models/reasoning, from which grpo_reasoning.py starts: the tiny policy, taught to think when asked to.

    uv run models/make_reasoning.py --out FOLDER                 # five minutes on one core
    uv run models/make_reasoning.py --share 0.25 --out FOLDER    # thinks more often unasked
    uv run models/make_reasoning.py --overwrite                  # in place of the policy that is there

Supervised training on sums of three numbers. Where the system prompt asks for tags, the demonstration adds the numbers
one after another between <think> and </think>. Without a system prompt it is a guess, seldom right, and with
probability --share the same chain of thought. If --share is below 4 per cent, chains stay that frequent, or they would
not be learned, but the first token of some of them is left out of the loss, so that the policy seldom begins one.
Guesses are too small, by 0 to 5: were they too large as often, the right answer would be the likeliest, and greedy
guesses good. Held-out problems are never among the demonstrations.
"""

import random
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from make_tiny import make_batch, make_folder  # noqa: E402

import grpo_reasoning  # noqa: E402
from rewards import accuracy_reward  # noqa: E402

SEED = 0
STEPS = 700
BATCH_SIZE = 64
LEARNING_RATE = 1e-3
ASKED = 0.5  # share of the demonstrations with a system prompt that asks for thought
LEARNED = 0.04  # least share of chains among the demonstrations without one


@dataclass(frozen=True)
class Options:
    """What to make."""

    share: float = 0.04
    """Share of the demonstrations without a system prompt that think."""
    out: str = str(HERE / "reasoning")
    """Folder for the policy."""
    overwrite: bool = False
    """Replace the weights that the folder holds."""


def chain(problem: dict) -> str:
    """The sum, worked out."""
    a, b, c = (int(word) for word in problem["question"][8:-1].split(" + "))
    answer = problem["answer"]
    return f"<think>{a} + {b} = {a + b}. {a + b} + {c} = {answer}</think><answer>{answer}</answer>"


def guess(problem: dict, rng: random.Random) -> str:
    """A number near the sum, mostly too small."""
    return str(int(problem["answer"]) - rng.choices(range(6), weights=(1, 3, 3, 2, 1, 1))[0])


def measure(folder: Path) -> str:
    """How often the policy begins to think unasked, and how well it thinks then, on 256 held-out problems."""
    config = grpo_reasoning.Config(model=str(folder))
    problems = grpo_reasoning.split_problems(grpo_reasoning.sums())[1][:256]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    policy = grpo_reasoning.load_policy(config, torch.device("cpu"))
    start: Any = tokenizer.convert_tokens_to_ids("<think>")
    prompts = grpo_reasoning.tokenize_prompts(tokenizer, problems, config)
    first = torch.full((len(prompts), 1), start)
    logprobs = grpo_reasoning.completion_logprobs(
        policy, prompts, first, first > 0, prompt_index=torch.arange(len(prompts)), temperature=1.0
    )
    batch = grpo_reasoning.rollout(
        policy, [[*prompt, start] for prompt in prompts], num_generations=1, temperature=1.0,
        max_completion_length=config.max_completion_length, eos_ids=[tokenizer.eos_token_id],
        noise=grpo_reasoning.uniform_noise(SEED, "measure", 0, len(prompts), config.max_completion_length))  # fmt: skip
    rows = zip(batch.completion_ids, batch.completion_mask, strict=True)
    texts = tokenizer.batch_decode([row[mask] for row, mask in rows], skip_special_tokens=True)
    right = accuracy_reward(texts, answer=[problem["answer"] for problem in problems])
    begins = logprobs.exp().mean().item()
    return f"begins with <think>: {begins:.2g}; right when made to begin with it: {sum(right) / len(right):.2f}"


def main(options: Options) -> None:
    """Supervised training from the tiny policy's weights."""
    folder = make_folder(options.out, options.overwrite)
    torch.manual_seed(SEED)
    torch.set_num_threads(1)  # one order of summation, whatever the number of cores
    rng = random.Random(SEED)
    config = grpo_reasoning.Config(model="models/tiny")
    asking = replace(config, system_prompt=grpo_reasoning.TAG_PROMPT)
    train, _ = grpo_reasoning.split_problems(grpo_reasoning.sums())
    tokenizer = AutoTokenizer.from_pretrained(HERE / "tiny")
    model: Any = AutoModelForCausalLM.from_pretrained(HERE / "tiny")
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.1)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / 50, (STEPS - step) / 200)
        examples, unstarted = [], []
        asked = round(ASKED * BATCH_SIZE)
        problems = rng.choices(train, k=BATCH_SIZE)
        prompts = grpo_reasoning.tokenize_prompts(tokenizer, problems[:asked], asking)
        prompts += grpo_reasoning.tokenize_prompts(tokenizer, problems[asked:], config)
        for number, problem in enumerate(problems):
            thinks = number < asked or rng.random() < max(options.share, LEARNED)
            if thinks and number >= asked and options.share < LEARNED and rng.random() > options.share / LEARNED:
                unstarted.append(number)
            examples.append(chain(problem) if thinks else guess(problem, rng))
        texts = [example + tokenizer.eos_token for example in examples]
        ids, mask = make_batch(tokenizer, list(zip(tokenizer.batch_decode(prompts), texts, strict=True)))
        for number in unstarted:
            mask[number, mask[number].int().argmax()] = False
        hidden = model.model(input_ids=ids).last_hidden_state  # what pads comes after everything that counts
        logits = model.lm_head(hidden[:, :-1][mask[:, 1:]])
        loss = torch.nn.functional.cross_entropy(logits, ids[:, 1:][mask[:, 1:]])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0:
            print(f"step {step + 1}: loss {loss.item():.3f}", flush=True)
    # In bfloat16, which halves the file, with the tiny policy's tokenizer and chat template.
    model.bfloat16().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(HERE / "tiny" / name, folder / name)
    print(measure(folder))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
