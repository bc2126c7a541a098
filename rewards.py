r"""Rewards for completions whose answer can be checked, in TRL's own reward signature.

A reward function takes `completions` (strings, or lists of chat messages), the columns it needs by name, and ignores
every other keyword; it returns one float in [0, 1] for each completion. So the functions here work in TRL's
`GRPOTrainer`, and TRL's functions work in the scripts. Weights, logging and the tokenizer are left to the scripts.

No text of a policy makes a function raise, and every function takes time linear in the length of its text. Only a gold
answer, which is the user's data, can make one raise.

How an answer is read stands in answers.py.
"""

import asyncio
import inspect
import json
import math
import pkgutil
import re
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from answers import (
    answers_match,
    check_gold as check_gold,
    count_steps,
    extract_answer as extract_answer,
    is_parsed,
    predicted_answer,
)

Record = dict[str, Any]
Completion = str | Sequence[Record]

# ----------------------------------------------------------------------------------------------------------------------
# Reward functions


def accuracy_reward(completions: Sequence[Completion], answer: Sequence[str], **kwargs: Any) -> list[float]:
    """Return 1.0 for each completion whose answer is the gold answer, else 0.0.

    If the gold answer is a number, the completion's answer is `extract_answer`'s. If it is text, a bare number is not
    an answer: then it is the explicit form, else the whole completion outside its think block. Raises ValueError if
    a gold answer is empty, or if there are not as many of them as completions.
    """
    texts = [completion_text(completion) for completion in completions]
    return [float(answers_match(predicted_answer(text, gold), gold)) for text, gold in zip(texts, answer, strict=True)]


def format_reward(completions: Sequence[Completion], **kwargs: Any) -> list[float]:
    """Return 1.0 for each completion that is one think block, then one answer block, and nothing else; else 0.0.

    `<think>…</think><answer>…</answer>`: each of the four tags once and in this order, something in both blocks, only
    white space outside them. The scripts put a <think> that the prompt ends with before the completion.
    """
    return [float(bool(_FORMATTED.fullmatch(completion_text(completion)))) for completion in completions]


# Distinct calculations at which `reasoning_reward` is 1.0.
REASONING_STEPS = 3


def reasoning_reward(completions: Sequence[Completion], **kwargs: Any) -> list[float]:
    """Return for each completion the share, in [0, 1], of `REASONING_STEPS` distinct calculations that it shows.

    A calculation is a true equation of numbers and + - * / on one line, such as `48/2 = 24`, `$5 + $3 = $8`,
    `3 x 4 = 12` or `2*3+4 = 6+4 = 10`, exactly true (10/3 = 3.33 is not), without brackets, percent or words. It counts
    once, however often it is written, and `4 + 3 = 7` is the same as `3 + 4 = 7`. A calculation that changes nothing (0
    as an operand, 1 as a factor or divisor) earns nothing, nor do `7 = 7`, a false equation, or words. Whether a step
    belongs to the problem is not judged, so give this reward a small weight.
    """
    return [min(count_steps(completion_text(completion)) / REASONING_STEPS, 1.0) for completion in completions]


_BLOCK = r"(?!\s*+</)((?:(?!</?(?:think|answer)>).)++)"
_FORMATTED = re.compile(rf"\s*<think>{_BLOCK}</think>\s*<answer>{_BLOCK}</answer>\s*", re.DOTALL)


def completion_text(completion: Completion) -> str:
    """Return what the policy wrote, from a string or from chat messages.

    The assistant's messages are joined by line breaks; the policy did not write the others, such as tool results.
    Content may be a string, None (a bare tool call) or a list of parts, of which only those with a `text` count.
    """
    messages = [{"content": completion}] if isinstance(completion, str) else completion
    contents = [message.get("content") for message in messages if message.get("role", "assistant") == "assistant"]
    parts = [
        [{"text": content}] if isinstance(content, str) else content for content in contents if content is not None
    ]
    return "\n".join("".join(part.get("text") or "" for part in some) for some in parts)


# ----------------------------------------------------------------------------------------------------------------------
# From completions to metrics

Rewards = dict[str, tuple[Callable[..., Any], float]]
# What the mean of a record's field is called, where it is not the field's own name.
METRICS = {"right": "accuracy", "truncated": "completions/clipped_ratio", "parsed": "completions/parsed_ratio",
           "length": "completions/mean_length", "terminated_length": "completions/mean_terminated_length"}  # fmt: skip


def load_rewards(specs: Sequence[str], script: dict[str, Any], problem: Record | None = None) -> Rewards:
    """Return {name: (function, weight)} for specs such as accuracy=2.0, format and module:function=0.5.

    A name without a module is NAME_reward of `script` (the globals of a script), or else of this file. A weight that is
    not given is 1. With a problem, each function is tried on it. Raises ValueError that names the spec, and whatever
    the import of a module or a function raises.
    """
    from torch import nn

    rewards: Rewards = {}
    for spec in specs:
        path, _, weight = spec.partition("=")
        name = path.rpartition(":")[2]
        # A model's id is org/name.
        model = "/" in path
        if not model:
            found = pkgutil.resolve_name(path) if ":" in path else (globals() | script).get(f"{name}_reward")
            model = isinstance(found, nn.Module)
        if model:
            raise ValueError(f"{spec}: a reward model is not supported, only functions are")
        if not callable(found) or name in rewards or not math.isfinite(float(weight or 1)):
            raise ValueError(f"{spec}: no function, a name twice, no finite weight")
        rewards[name] = found, float(weight or 1)
    if problem:
        # A right and an empty completion show a wrong signature, number or type before a model is loaded.
        json.dumps(grade(rewards, [problem] * 2, [problem["answer"], ""], [[0], [0]], max_steps=1))
    return rewards


def grade(
    rewards: Rewards, problems: list[Record], texts: list[str], ids: list[list[int]], step: int = 0, max_steps: int = 0
) -> list[Record]:
    """Return a record for each completion: what is read from it, what each reward gives it, and their weighted sum.

    Functions are called as TRL calls them for conversational data (`_call`). None means "does not apply"; where none
    applies, the reward is None. `right` and `parsed` are always this file's, whatever is rewarded. Raises ValueError on
    a wrong number of rewards and on one that is not finite.
    """
    columns: Record = {name: [problem.get(name) for problem in problems] for name in problems[0]}
    columns["prompts"] = [[{"role": "user", "content": question}] for question in columns["question"]]
    columns["completions"] = [[{"role": "assistant", "content": text}] for text in texts]
    columns["completion_ids"] = ids
    records: list[Record] = []
    for problem, text in zip(problems, texts, strict=True):
        record = {"question": problem["question"], "answer": problem["answer"], "completion": text}
        record["extracted"] = predicted_answer(text, problem["answer"]) or None
        record["right"] = accuracy_reward([text], [problem["answer"]]) == [1]
        record["parsed"] = is_parsed(text, problem["answer"])
        records.append(record | {"reward": None})
    logged: Record = {}
    if rewards:
        from transformers import TrainerState

        columns["trainer_state"] = TrainerState(global_step=step, max_steps=max_steps)
    columns["log_extra"] = logged.__setitem__
    columns["log_metric"] = lambda name, value: logged.update({name: [float(value)] * len(records)})
    for name, (function, weight) in rewards.items():
        values = [None if value is None else float(value) for value in _call(function, columns)]
        if len(values) != len(records) or not all(math.isfinite(value or 0) for value in values):
            raise ValueError(f"reward '{name}' must give {len(records)} finite numbers or None, not {values!r:.200}")
        for row, value in zip(records, values, strict=True):
            row[f"rewards/{name}"] = value
            if value is not None:
                row["reward"] = (row["reward"] or 0.0) + weight * value
    for name, values in logged.items():
        for row, value in zip(records, values, strict=True):
            # A field that the record has already keeps its value.
            row.setdefault(name, value)
    return records


def _call(function: Callable[..., Any], columns: Record) -> Any:
    """Call a reward function, `async def` or not, with what its signature takes of TRL's keywords."""
    parameters = inspect.signature(function).parameters
    if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters.values()):
        columns = {name: value for name, value in columns.items() if name in parameters}
    values = function(**columns)
    return asyncio.run(values) if inspect.iscoroutine(values) else values


def means(records: list[Record], split: str) -> dict[str, float]:
    """Return the mean of each number in the records: {"train/reward": 0.5, ...}; None is left out."""
    metrics = {}
    for field in records[0]:
        values = [row[field] for row in records if isinstance(row[field], int | float)]
        name = f"{field}/mean" if field.startswith("rewards/") else METRICS.get(field, field)
        # Those of training begin with completions/ or rewards/, or else with train/.
        if split != "train" or "/" not in name:
            name = f"{split}/{name}"
        if values:
            metrics[name] = fmean(values)
    # Entropy is that of a token, not of a completion.
    metrics[f"{split}/entropy"] /= fmean(row["length"] for row in records)
    return metrics


def signal_metrics(records: list[Record], num_generations: int) -> dict[str, float]:
    """Return the share of groups whose rewards are all equal: they carry no signal. Its parts: all right, or not."""
    groups = [records[i : i + num_generations] for i in range(0, len(records), num_generations)]
    equal = [group for group in groups if not any(row["advantage"] for row in group)]
    right = sum(all(row["right"] for row in group) for group in equal)
    counts = {"reward_zero_std": len(equal), "all_right": right, "all_wrong": len(equal) - right}
    return {f"train/frac_{name}": count / len(groups) for name, count in counts.items()}


def wilson_interval(right: float, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a share, by Wilson's score: it is also good near 0 and 1, where +-1.96 std is not."""
    share, z2 = right / count, 1.96**2 / count
    half = (z2 * (share * (1 - share) + z2 / 4)) ** 0.5
    # Rounding may give more than 1 where all are right; where none is right the difference is exactly 0.
    return (share + z2 / 2 - half) / (1 + z2), min((share + z2 / 2 + half) / (1 + z2), 1.0)


def signal_line(history: Sequence[dict[str, float]], rewards: Rewards, num_generations: int) -> str:
    """Return what to say about the groups that carry signal, those with unequal rewards; "" if there is nothing to say.

    `history` holds the metrics of steps 0, 1, ... In step 1 the line gives their share before training, and what more
    generations would give if there are few. Later there is one line when the last 20 steps had hardly any and earlier
    ones had.
    """
    rows = [row for row in history if "train/frac_reward_zero_std" in row]
    if not rows:
        return ""
    shares = [1 - row["train/frac_reward_zero_std"] for row in rows]
    used = [name for name, (_, weight) in rewards.items() if weight]
    names = ("train/frac_all_right", "completions/parsed_ratio", "completions/clipped_ratio")
    cause = likely_cause(used, *[rows[-1][name] for name in names])
    if len(shares) == 1:
        line = f"before training {shares[0]:.0%} of the groups carry signal"
        for more in (8, 16) * (num_generations < 8 and shares[0] > 0):
            least, most = signal_with(more, num_generations, shares[0])
            line += f", {least:.0%} to {most:.0%} would with --num-generations {more}"
        return line + f": {cause}" * (shares[0] < 0.05)
    lost = len(shares) > 20 and sum(shares[-20:]) < 0.4 <= sum(shares[-21:-1])
    return f"hardly any signal in the last 20 steps: {cause}" if lost else ""


def signal_with(more: int, generations: int, share: float) -> tuple[float, float]:
    """Return the least and the most share of groups with signal that `more` generations would give, if `share` has it.

    A group of G completions, right with probability p, carries signal with probability 1 - p**G - (1 - p)**G. What p is
    for each prompt, a few completions cannot tell. The share grows least if p is 1/2 for some prompts and 0 or 1 for
    all others, and most if p is the same for all prompts.
    """

    def signal(p: float, size: int) -> float:
        return 1 - p**size - (1 - p) ** size

    p = min((i / 1000 for i in range(501)), key=lambda p: abs(signal(p, generations) - share))
    most = signal(p, more)
    return min(share * signal(0.5, more) / signal(0.5, generations), most), most


def likely_cause(used: Sequence[str], right: float, parsed: float, truncated: float) -> str:
    """Return why completions most likely teach nothing, from the shares that are right, parsed and cut off.

    `used` are the names of the rewards that count.
    """
    if right > 0.5 and "accuracy" in used:
        return "the task is solved; take a harder --task"
    if truncated > 0.5:
        cure = "check --prompt-format and the chat template" if truncated == 1 else "raise --max-completion-length"
        return f"{truncated:.0%} of the completions never stop; {cure}"
    if "accuracy" not in used:
        return f"{' + '.join(used)} is the same for all completions of a group; change --rewards or the prompt"
    if parsed < 0.5:
        return "no answer can be parsed; ask for its form in --system-prompt or reward it"
    return "answers are found but wrong; take an easier --task or more --num-generations"
