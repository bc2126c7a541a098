"""Makes models/scheduler, from which grpo_scheduler.py starts: the tiny policy, taught what an answer looks like.

    uv run models/make_scheduler.py --out FOLDER    # three minutes on one core
    uv run models/make_scheduler.py --overwrite     # in place of the policy that is there

Supervised training on imperfect demonstrations: a random schedule, which seldom is the best one, one time in ten in
random order, and one time in twenty with a name too many. Held-out problems are never among them.
"""

import random
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from make_tiny import BATCH_SIZE, make_batch, make_folder  # noqa: E402

import grpo_scheduler  # noqa: E402

SEED = 0
STEPS = 400
LEARNING_RATE = 1e-3
UNSORTED, MALFORMED = 0.1, 0.05  # shares of the demonstrations


@dataclass(frozen=True)
class Options:
    """What to make."""

    out: str = str(HERE / "scheduler")
    """Folder for the policy."""
    overwrite: bool = False
    """Replace the weights that the folder holds."""


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


def save(model: Any, folder: Path) -> None:
    """Its weights in bfloat16, which halves the file, with the tiny policy's tokenizer and chat template."""
    model.bfloat16().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(HERE / "tiny" / name, folder / name)


def main(options: Options) -> None:
    """Supervised training from the tiny policy's weights."""
    folder = make_folder(options.out, options.overwrite)
    torch.manual_seed(SEED)
    torch.set_num_threads(1)  # one order of summation, whatever the number of cores
    rng, config = random.Random(SEED), grpo_scheduler.Config(model="models/tiny")
    train, _ = grpo_scheduler.split_problems(grpo_scheduler.scheduling())
    tokenizer = AutoTokenizer.from_pretrained(HERE / "tiny")
    model = AutoModelForCausalLM.from_pretrained(HERE / "tiny")
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
    save(model, folder)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
