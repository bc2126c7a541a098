"""Makes tiny_policy/scheduler, from which grpo_scheduler.py starts: the tiny policy, taught what an answer looks like.

    uv run tiny_policy/make_scheduler.py      # three minutes on one core

Supervised training on imperfect demonstrations: a random schedule, which seldom is the best one, one time in ten in
random order, and one time in twenty with a name too many. Held-out problems are never among them.
"""

import random
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from make import BATCH_SIZE, make_batch  # noqa: E402

import grpo_scheduler  # noqa: E402

SEED = 0
STEPS = 400
LEARNING_RATE = 1e-3
UNSORTED, MALFORMED = 0.1, 0.05  # shares of the demonstrations


def demonstrate(problem: dict, rng: random.Random) -> str:
    """Events in random order, each taken if it overlaps none of those before it and a coin says so."""
    taken: list[list] = []
    for event in rng.sample(problem["events"], len(problem["events"])):
        free = all(event[2] <= other[1] or other[2] <= event[1] for other in taken)
        if free and (not taken or rng.random() < 0.7):
            taken.append(event)
    names = [event[0] for event in sorted(taken, key=lambda event: event[1])]
    if rng.random() < UNSORTED:
        rng.shuffle(names)
    if rng.random() < MALFORMED:
        names.insert(rng.randrange(len(names) + 1), rng.choice([*names, "G"]))
    return " ".join(names)


def save(model: Any) -> None:
    """Its weights in bfloat16, which halves the file, with the tiny policy's tokenizer and chat template."""
    (folder := HERE / "scheduler").mkdir(exist_ok=True)
    model.bfloat16().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(HERE / name, folder / name)


def main() -> None:
    """Supervised training from the tiny policy's weights."""
    torch.manual_seed(SEED)
    torch.set_num_threads(1)  # one order of summation, whatever the number of cores
    rng, config = random.Random(SEED), grpo_scheduler.Config(model="tiny_policy")
    train, _ = grpo_scheduler.split_problems(grpo_scheduler.scheduling())
    tokenizer = AutoTokenizer.from_pretrained(HERE)
    model = AutoModelForCausalLM.from_pretrained(HERE)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.1)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / 50, (STEPS - step) / 100)
        problems = rng.choices(train, k=BATCH_SIZE)
        prompts = tokenizer.batch_decode(grpo_scheduler.tokenize_prompts(tokenizer, problems, config))
        answers = [demonstrate(problem, rng) + tokenizer.eos_token for problem in problems]
        ids, mask = make_batch(tokenizer, list(zip(prompts, answers, strict=True)))
        hidden = model.model(input_ids=ids).last_hidden_state  # what pads comes after everything that counts
        logits = model.lm_head(hidden[:, :-1][mask[:, 1:]])
        loss = torch.nn.functional.cross_entropy(logits, ids[:, 1:][mask[:, 1:]])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0:
            print(f"step {step + 1}: loss {loss.item():.3f}", flush=True)
    save(model)


if __name__ == "__main__":
    main()
