"""Makes models/tiny, the embedded policy: a Qwen2 model of 0.9M parameters, with unreliable skill at every task.

    uv run models/make_tiny.py --out FOLDER    # tokenizer, supervised training: about 6 minutes on one core
    uv run models/make_tiny.py --overwrite     # the same in place of the policy that is there

Supervised training on correct examples, with the loss on the completion alone. Every CHECK_EVERY steps each task's
sampled accuracy is measured, and a task's share of the next examples is its weight times how far it stands below the
middle of its band; above it the share is a trickle. Training ends at the first check at which every task
is inside its band. Held-out problems (`split_problems` of the scripts) are never among the examples. The rows printed
at the end are those of the table in models/README.md.
"""

import json
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import grpo  # noqa: E402
import grpo_ladder  # noqa: E402
from rewards import accuracy_reward, is_parsed  # noqa: E402

SEED = 0
BATCH_SIZE = 128
LEARNING_RATE = 1e-3
WARMUP_STEPS = 100
MAX_STEPS = 2000
CHECK_EVERY = 25
TAGGED_SHARE = 0.2  # of the batches: examples with the tag prompt, <think> and <answer>
# The range of sampled pass@1 in which training may end, and the weight of a task's share: arithmetic is learned late.
BANDS = {
    "arithmetic": (0.38, 0.56, 6.0),
    "simple_math": (0.30, 0.87, 0.15),
    "echo": (0.30, 0.82, 1.5),
    "pattern": (0.30, 0.80, 2.0),
    "comparison": (0.60, 0.85, 0.5),
    "counting": (0.30, 0.83, 0.3),
    "binary": (0.30, 0.80, 2.0),
    "word_problem": (0.30, 0.70, 3.0),
}
MAX_GREEDY = {"arithmetic": 0.68}
MAX_LENGTH = 32  # tokens of a completion
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
Example = tuple[str, str]  # prompt text, completion text
Tasks = dict[str, tuple[list[dict], list[dict]]]  # task: (train, held-out) problems


@dataclass(frozen=True)
class Options:
    """What to make."""

    out: str = str(HERE / "tiny")
    """Folder for the policy."""
    overwrite: bool = False
    """Replace the weights that the folder holds."""


def make_folder(out: str, overwrite: bool) -> Path:
    """The folder for a policy; refused if it holds weights that must not be overwritten."""
    folder = Path(out)
    if (folder / "model.safetensors").exists() and not overwrite:
        print(f"error: {folder} holds weights: give --overwrite to replace them, or another --out", file=sys.stderr)
        raise SystemExit(2)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def load_tasks() -> Tasks:
    """(train, held out) problems of each task that the policy is taught."""
    tasks = {name: grpo.TASKS[name] for name in ("arithmetic", "simple_math")} | grpo_ladder.TASKS
    return {name: grpo.split_problems(tasks[name]()) for name in BANDS}


def working(task: str, problem: dict) -> str:
    """The short, correct line that stands between <think> and </think>."""
    question, answer = problem["question"], problem["answer"]
    body = question.split(": ", 1)[-1]
    if task in ("arithmetic", "simple_math"):
        return f"{question[8:-1]} = {answer}"
    if task == "word_problem":
        a, b = (word.strip(".") for word in question.split() if word.strip(".").isdigit())
        return f"{a} {'+' if int(answer) > int(a) else '-'} {b} = {answer}"
    if task == "comparison":
        return f"{body.split('?')[0][3:].replace('>', '>' if answer == 'yes' else '<')}"
    if task == "counting":
        return " ".join(str(i + 1) for i in range(int(answer)))
    if task == "binary":
        bits = [2**i for i, bit in enumerate(reversed(answer)) if bit == "1"]
        return " + ".join(map(str, reversed(bits))) or "0"
    return body


def render(task: str, problem: dict, tagged: bool) -> Example:
    """One supervised example as text, in the chat template's form."""
    system = f"<|im_start|>system\n{grpo.TAG_PROMPT}<|im_end|>\n" if tagged else ""
    prompt = f"{system}<|im_start|>user\n{problem['question']}<|im_end|>\n<|im_start|>assistant\n"
    answer = problem["answer"]
    if tagged:
        answer = f"<think>{working(task, problem)}</think><answer>{answer}</answer>"
    return prompt, answer + "<|im_end|>"


def make_tokenizer(texts: list[str]) -> Qwen2Tokenizer:
    """A byte-level BPE with Qwen2's own pre-tokenizer, its merges learned from the examples."""
    raw = Tokenizer(models.BPE())
    raw.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=512, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
        ),
    )
    model = json.loads(raw.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],  # type: ignore[misc]
        unk_token=None,  # type: ignore[arg-type]
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
        model_max_length=4096,
    )
    tags = ("<think>", "</think>", "<answer>", "</answer>")
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in tags])
    return tokenizer


def make_model(tokenizer: Any) -> Qwen2ForCausalLM:
    """The Qwen2 architecture at 0.9M parameters, random weights."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        initializer_range=0.06,  # three times the usual: at this width it halves the steps to the first sums
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return model


@torch.no_grad()
def measure(
    model: Any, tokenizer: Any, problems: list[dict], generations: int, greedy: bool = False
) -> dict[str, float]:
    """pass@1, pass@generations and the share of parsed answers, without tags, at temperature 1 or greedy."""
    prompts = grpo.tokenize_prompts(tokenizer, problems, grpo.Config())
    noise = grpo.uniform_noise(SEED, "measure", 0, len(prompts) * generations, MAX_LENGTH)
    batch = grpo.rollout(
        model,
        prompts,
        num_generations=generations,
        max_completion_length=MAX_LENGTH,
        temperature=1.0,
        eos_ids=[tokenizer.eos_token_id],
        noise=None if greedy else noise,
    )
    rows = zip(batch.completion_ids, batch.completion_mask, strict=True)
    texts = [tokenizer.decode(ids[mask], skip_special_tokens=True) for ids, mask in rows]
    golds = [p["answer"] for p in problems for _ in range(generations)]
    right = torch.tensor(accuracy_reward(texts, answer=golds)).view(-1, generations)
    parsed = sum(map(is_parsed, texts, golds)) / len(texts)
    return {"pass@1": right.mean().item(), "any": right.amax(-1).mean().item(), "parsed": parsed}


def make_batch(tokenizer: Any, examples: list[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (B, S), padded on the right, and the mask (B, S) of the completions' tokens."""
    prompts = tokenizer([p for p, _ in examples], add_special_tokens=False).input_ids
    completions = tokenizer([c for _, c in examples], add_special_tokens=False).input_ids
    width = max(len(p) + len(c) for p, c in zip(prompts, completions, strict=True))
    ids = torch.zeros(len(examples), width, dtype=torch.long)
    mask = torch.zeros(len(examples), width, dtype=torch.bool)
    for row, (p, c) in enumerate(zip(prompts, completions, strict=True)):
        ids[row, : len(p) + len(c)] = torch.tensor(p + c)
        mask[row, len(p) : len(p) + len(c)] = True
    return ids, mask


def train(model: Any, tokenizer: Any, tasks: Tasks, rng: random.Random) -> dict[str, int]:
    """Supervised training until every task is in its band; returns the number of examples of each task."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.1)
    shares = {task: weight for task, (_, _, weight) in BANDS.items()}
    taught = dict.fromkeys(BANDS, 0)
    start = time.time()
    for step in (bar := tqdm(range(1, MAX_STEPS + 1), desc="supervised", unit="step")):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, step / WARMUP_STEPS)
        tagged = rng.random() < TAGGED_SHARE  # one form a batch: they differ in length, and padding costs time
        examples = []
        for task in rng.choices(list(shares), weights=list(shares.values()), k=BATCH_SIZE):
            taught[task] += 1
            examples.append(render(task, rng.choice(tasks[task][0]), tagged))
        ids, mask = make_batch(tokenizer, examples)
        hidden = model.model(input_ids=ids).last_hidden_state  # what pads comes after everything that counts
        logits = model.lm_head(hidden[:, :-1][mask[:, 1:]])
        loss = torch.nn.functional.cross_entropy(logits, ids[:, 1:][mask[:, 1:]])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % CHECK_EVERY == 0:
            problems = {task: (held_out or train)[:256] for task, (train, held_out) in tasks.items()}
            level = {task: measure(model, tokenizer, problems[task], 2)["pass@1"] for task in BANDS}
            levels = " ".join(f"{task} {value:.2f}" for task, value in level.items())
            bar.write(f"step {step}, {time.time() - start:.0f} s, loss {loss.item():.2f}: {levels}")
            shares = {t: weight * max(0.02, (low + high) / 2 - level[t]) for t, (low, high, weight) in BANDS.items()}
            inside = all(low <= level[task] <= high for task, (low, high, _) in BANDS.items())
            if inside and all(
                measure(model, tokenizer, problems[task], 1, greedy=True)["pass@1"] <= limit
                for task, limit in MAX_GREEDY.items()
            ):
                return taught
    raise SystemExit(f"error: not every task came into its band in {MAX_STEPS} steps: change BANDS")


def print_levels(model: Any, tokenizer: Any, tasks: Tasks, taught: dict[str, int]) -> None:
    """What the policy is and what it can do, as rows of the table in README.md."""
    parameters = sum(p.numel() for p in model.parameters())
    steps = sum(taught.values()) // BATCH_SIZE
    print(f"{parameters:,} parameters, {len(tokenizer)} tokens, {steps:,} steps of {BATCH_SIZE} examples")
    for task, (train_problems, held_out) in tasks.items():
        problems = (held_out or train_problems)[:512]
        sampled = measure(model, tokenizer, problems, 8)
        greedy = measure(model, tokenizer, problems, 1, greedy=True)["pass@1"]
        values = " | ".join(f"{value:.3f}" for value in (sampled["pass@1"], greedy, sampled["any"], sampled["parsed"]))
        label = f"{len(problems)} held out" if held_out else f"{len(problems)}, all taught"
        print(f"| {task} | {taught[task]:,} | {label} | {values} |")


def main(options: Options) -> None:
    """Tokenizer, supervised training, files, levels."""
    folder = make_folder(options.out, options.overwrite)
    torch.manual_seed(SEED)
    torch.set_num_threads(1)  # one order of summation, whatever the number of cores
    tasks = load_tasks()
    texts = ["".join(render(t, p, tagged)) for t in tasks for p in tasks[t][0][:1500] for tagged in (False, True)]
    tokenizer = make_tokenizer(texts)
    model = make_model(tokenizer).eval()
    taught = train(model, tokenizer, tasks, random.Random(SEED))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print_levels(model, tokenizer, tasks, taught)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
