r"""Rewards for completions whose answer can be checked, in TRL's own reward signature.

A reward function takes `completions` (strings, or lists of chat messages), the columns it needs by name, and ignores
every other keyword; it returns one float in [0, 1] for each completion. So the functions here work in TRL's
`GRPOTrainer`, and TRL's functions work in the scripts. Weights, logging and the tokenizer are left to the scripts.

No text of a policy makes a function raise, and every function takes time linear in the length of its text. Only a gold
answer, which is the user's data, can make one raise.

The grammar of an answer:

    form     the first of these that is in the text; if there are several of its kind, the last one:
             <answer>…</answer>     closed, without another tag inside; may span lines
             \boxed{…}              closed, with balanced braces
             #### …                 to the end of its line
             The answer is …        any letter case, "final" and a colon optional; to the end of its sentence or line
             the last number        only if none of the explicit forms above is there
    number   [-][$]digits[/digits]; digits are 1000, 1,000, 1000.5 or .5. Text around it and a unit are allowed
             (`The total is 18 km/h.`, `x = 18`, `\text{18}`, `50%`); \frac{3}{4} is 3/4. Digits within a word (`m2`)
             are not a number. Malformed, and equal to nothing: 1,00  1.2.3  1/0  1e5  5^2  5²  ٣  2½, and any number
             longer than `MAX_NUMBER_CHARS`. Values are compared exactly, never as floats.

An explicit form that is empty gives no answer, and no other form is looked for. One that holds several numbers
(`17 or 18`, `3*6 = 18`, `18 = 18`, `1 000`) earns nothing, even if all of them are right. A form that is not closed,
because the completion was cut off or badly nested, does not count.
"""

import math
import pkgutil
import re
from collections import deque
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import lru_cache
from itertools import islice, pairwise
from statistics import fmean
from typing import Any

Record = dict[str, Any]
Completion = str | Sequence[Record]

# ----------------------------------------------------------------------------------------------------------------------
# The answer of a completion


def extract_answer(text: str) -> str | None:
    """Return the answer that `text` gives, in the order of forms at the top of this file, or None if it gives none.

    The content of an explicit form is returned as it is, without surrounding space; None if that is empty.
    """
    explicit = _explicit_form(text)
    if explicit is not None:
        return explicit or None
    number = _last(_NUMBER, _plain(text))
    return number.group() if number else None


_ANSWER_IS = re.compile(r"\bthe\s+(?:final\s+)?answer\s+is\b\s*:?\s*", re.IGNORECASE)
# A question mark does not end the sentence: "the answer is 17? No, 18." holds two numbers.
_SENTENCE_END = re.compile(r"[.!](?=\s|$)|\n")


def _explicit_form(text: str) -> str | None:
    """Return the stripped content of the first explicit form that is in `text`, "" if it is empty, None without one."""
    block = _last_answer_block(text)
    if block is None:
        block = _last_boxed(text)
    if block is None and "####" in text:
        block = text.rpartition("####")[2].partition("\n")[0]
    if block is None and (phrase := _last(_ANSWER_IS, text)):
        block = _SENTENCE_END.split(text[phrase.end() :], maxsplit=1)[0]
    return None if block is None else block.strip()


_ANSWER_TAG = re.compile(r"</?answer>")


def _last_answer_block(text: str) -> str | None:
    block = None
    for opening, closing in pairwise(_ANSWER_TAG.finditer(text)):
        if opening.group() == "<answer>" and closing.group() == "</answer>":
            block = opening.end(), closing.start()
    return text[slice(*block)] if block else None


_BRACE = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)


def _last_boxed(text: str) -> str | None:
    last = None
    opened: list[int] = []  # for each brace open here: where the content of its \boxed begins, 0 if it has none
    for token in _BRACE.finditer(text, text.find("\\boxed")) if "\\boxed" in text else ():
        brace = token.group()
        if brace == "{":
            opened.append(0)
        elif brace == "}":
            start = opened.pop() if opened else 0
            # In `\boxed{\boxed{5}}` the inner one begins last and closes first.
            if start and (last is None or start > last[0]):
                last = start, token.start()
        elif len(brace) > 2:  # not an escape such as \{
            opened.append(token.end())
    return text[slice(*last)] if last else None


# `++`, `*+`, `?+` never backtrack, which keeps the patterns linear on any text. A lookbehind comes after the first
# character of a match, not before it: nearly every place in a text fails at that character, which is much cheaper.
_MINUS = "[-\u2212\u2013]"  # hyphen, minus sign, en dash
# A number with everything attached to it, well formed or not; `_value` decides. A hyphen is not a sign after a word or
# a bracket (`10-12`, `(3)-5`), nor before a space (`- 18 eggs` in a list).
_NUMBER = re.compile(
    rf"(?P<sign>{_MINUS}(?<![\w)].))?+\\?+[$€£]?+"
    r"(?P<body>(?:\d(?<![A-Za-z_\d^].)|\.(?<![A-Za-z_\d^.].)\d)\w*+(?:[.,/^]\w++)*+)"
)


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    matches = deque(pattern.finditer(text), maxlen=1)
    return matches[0] if matches else None


_FRAC = re.compile(r"\\(?<!\d.)[dt]?frac\{\s*+(-?[0-9.,]++)\s*+\}\{\s*+([0-9.,]++)\s*+\}(?!\d)")
_TEXT = re.compile(r"\\text\{([^{}]*+)\}")


def _plain(text: str) -> str:
    r"""Rewrite the LaTeX that occurs in answers: \frac{3}{4} to 3/4, \text{yes} to yes, 1{,}000 to 1,000."""
    if "{" not in text:
        return text
    text = _FRAC.sub(r"\1/\2", text)  # not next to a digit: 1\frac{1}{2} is not 11/2
    return _TEXT.sub(r" \1", text).replace("{,}", ",")


# ----------------------------------------------------------------------------------------------------------------------
# Whether it is right


# A group's completions are often equal.
@lru_cache(maxsize=2048)
def answers_match(predicted: str | None, gold: str) -> bool:
    """Say whether an extracted answer equals the gold answer.

    The gold answer is what follows the last `####` in `gold`, else all of it. If that is nothing but a number (with $,
    thousands commas or % allowed, but no unit), `predicted` must hold exactly one number, of exactly the same value:
    50% is 50, 3/4 is 0.75, 00101 is 101. Any other gold answer is text, compared without case, surrounding space and
    one trailing period. None never matches. Raises ValueError if the gold answer is empty.
    """
    expected = _gold(gold)
    read = _only_number if isinstance(expected, Fraction) else _text_key
    return predicted is not None and read(predicted) == expected


# A group's completions are often equal.
@lru_cache(maxsize=2048)
def is_parsed(text: str, gold: str) -> bool:
    """Say whether `text` gives an answer of the gold answer's kind, right or wrong.

    That is one number if the gold answer is a number, else text that is not empty. Raises ValueError if the gold answer
    is empty.
    """
    predicted = _predicted(text, gold)
    read = _only_number if isinstance(_gold(gold), Fraction) else _text_key
    return predicted is not None and read(predicted) not in (None, "")


# ----------------------------------------------------------------------------------------------------------------------
# Reward functions


def accuracy_reward(completions: Sequence[Completion], answer: Sequence[str], **kwargs: Any) -> list[float]:
    """Return 1.0 for each completion whose answer is the gold answer, else 0.0.

    If the gold answer is a number, the completion's answer is `extract_answer`'s. If it is text, a bare number is not
    an answer: then it is the explicit form, else the whole completion outside its think block. Raises ValueError if
    a gold answer is empty, or if there are not as many of them as completions.
    """
    texts = [completion_text(completion) for completion in completions]
    return [float(answers_match(_predicted(text, gold), gold)) for text, gold in zip(texts, answer, strict=True)]


def format_reward(completions: Sequence[Completion], **kwargs: Any) -> list[float]:
    """Return 1.0 for each completion that is one think block, then one answer block, and nothing else; else 0.0.

    `<think>…</think><answer>…</answer>`: each of the four tags once and in this order, something in both blocks, only
    white space outside them.
    """
    return [float(_is_formatted(completion_text(completion))) for completion in completions]


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
    return [min(_count_steps(completion_text(completion)) / REASONING_STEPS, 1.0) for completion in completions]


# ----------------------------------------------------------------------------------------------------------------------
# What they are made of


def completion_text(completion: Completion) -> str:
    """Return what the policy wrote, from a string or from chat messages.

    The assistant's messages are joined by line breaks; the policy did not write the others, such as tool results.
    Content may be a string, None (a bare tool call) or a list of parts, of which only those with a `text` count.
    """
    if isinstance(completion, str):
        return completion
    texts = []
    for message in completion:
        content = message.get("content")
        if content is not None and message.get("role", "assistant") == "assistant":
            parts = [{"text": content}] if isinstance(content, str) else content
            texts.append("".join(part.get("text") or "" for part in parts))
    return "\n".join(texts)


_THOUGHT = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)


@lru_cache(maxsize=2048)
def _predicted(text: str, gold: str) -> str | None:
    """Return the completion's answer, read as what the gold answer is: a number or text."""
    if isinstance(_gold(gold), Fraction):
        return extract_answer(text)
    explicit = _explicit_form(text)
    # The prompt may have opened the think block, so that only its end is in the completion.
    return _THOUGHT.sub("", text).rpartition("</think>")[2] if explicit is None else explicit


_NUMERIC_GOLD = re.compile(rf"(?:[+$€£\\]|{_MINUS})*[0-9.,/]+ ?\\?%?\.?")


@lru_cache(maxsize=2048)
def _gold(gold: str) -> Fraction | str:
    """Return the gold answer: its value if it is nothing but a number, else its text as `_text_key` gives it."""
    text = (str(gold) if isinstance(gold, int) else gold).rpartition("####")[2].strip()
    if not text:
        raise ValueError(f"empty gold answer in {gold[-80:]!r}: give the row an `answer`, or drop the row")
    value = _only_number(text) if _NUMERIC_GOLD.fullmatch(_plain(text)) else None
    return _text_key(text) if value is None else value


def _text_key(text: str) -> str:
    text = _plain(text).strip().casefold()
    return text.removesuffix(".").rstrip() or text


@lru_cache(maxsize=2048)
def _only_number(text: str) -> Fraction | None:
    """Return the value of the one number in `text`; None if it holds none, several, or a malformed one."""
    found = _NUMBER.finditer(_plain(text))
    number = next(found, None)
    if number is None or next(found, None) is not None:
        return None
    return _value(number)


# Reading a number of n digits takes more than n steps, so there is a limit; Python's own (4300) raises.
MAX_NUMBER_CHARS = 1000
_DIGITS = r"(?:(?:[1-9][0-9]{0,2}(?:,[0-9]{3})++|[0-9]++)(?:\.[0-9]++)?+|\.[0-9]++)"
_VALUE = re.compile(rf"({_DIGITS})(?:/({_DIGITS}))?+")


def _value(number: re.Match[str]) -> Fraction | None:
    body = number["body"]
    if len(body) > MAX_NUMBER_CHARS or not (digits := _VALUE.match(body)):
        return None
    # What is attached to the number may be a unit, but not digits of any script and not an exponent.
    if any(char.isnumeric() or char == "^" for char in body[digits.end() :]):
        return None
    numerator, denominator = (Fraction((part or "1").replace(",", "")) for part in digits.groups())
    sign = -1 if number["sign"] else 1
    return sign * numerator / denominator if denominator else None


_FORMAT_TAG = re.compile(r"(</?(?:think|answer)>)")


def _is_formatted(text: str) -> bool:
    before, *rest = _FORMAT_TAG.split(text)
    if rest[::2] != ["<think>", "</think>", "<answer>", "</answer>"]:
        return False
    thought, between, answer, after = (part.strip() for part in rest[1::2])
    return bool(thought and answer) and not (before.strip() or between or after)


# No honest completion comes near these limits: longer equations, and any beyond that number, are not read.
MAX_EQUATION_CHARS = 200
MAX_EQUATIONS = 50
_OPERATOR = r"(?:[-+*/\u00d7÷xX\u2212]|\\times|\\cdot|\\div)"
_OPERAND = rf"[-\u2212]?+\\?+\$?+{_DIGITS}(?![.,]?\d)"
# The longest run of numbers, operators and equals signs on one line, so that no two runs share text.
_EQUATION = re.compile(rf"(?<![\w.,)]){_OPERAND}(?:[ \t]*+(?:=|{_OPERATOR})[ \t]*+{_OPERAND})*+")
# These show that such a run is part of a longer expression: `(1+2)*` before it, `*(2)` or `^2` or `%` after it.
_CUT_BEFORE = re.compile(r"[\w)}\]%][ \t]*[-+*/\u00d7÷^\u2212][ \t]*\Z")
_CUT_BEHIND = re.compile(rf"[ \t]*+(?:\\?%|[\^²³]|[eE]\d|{_OPERATOR}[ \t]*+\()")


def _count_steps(text: str) -> int:
    """Count the distinct calculations among the first `MAX_EQUATIONS` equations of `text`."""
    steps = set()
    for equation in islice((run for run in _EQUATION.finditer(text) if "=" in run.group()), MAX_EQUATIONS):
        before = text[max(0, equation.start() - 8) : equation.start()]
        is_cut = _CUT_BEFORE.search(before) or _CUT_BEHIND.match(text, equation.end())
        if len(equation.group()) <= MAX_EQUATION_CHARS and not is_cut:
            steps.add(_calculation(equation.group()))
    return len(steps - {None})


def _calculation(equation: str) -> tuple[object, ...] | None:
    """Return what an equation calculates, the same however it is written; None if it is false or changes nothing."""
    # The backslash of an operator such as \times stays.
    sides = [_side(side) for side in re.sub(r"\\(?![a-z])|[$,]", "", equation).replace("\u2212", "-").split("=")]
    calculated = [(numbers, operators) for numbers, operators, _ in sides if operators]
    # At least one side calculates, and at least one other is a plain result.
    if not 0 < len(calculated) < len(sides) or None in (values := {value for _, _, value in sides}) or len(values) > 1:
        return None
    numbers, operators = calculated[0]
    for operator, (left, right) in zip(operators, pairwise(numbers), strict=True):
        if 0 in (left, right) or (operator != "+" and right == 1) or (operator == "*" and left == 1):
            return None
    return (*(sorted(numbers) if len(set(operators)) == 1 and "/" not in operators else numbers), *operators)


_MULTIPLY = ("*", "\u00d7", "x", "X", r"\times", r"\cdot")
_DIVIDE = ("/", "÷", r"\div")
# The operator is optional and lazy, so the minus of `5-3` is read as the sign of an added -3.
_TERM = re.compile(rf"({_OPERATOR})??\s*({_OPERAND})")


def _side(side: str) -> tuple[list[int | Fraction], list[str], int | Fraction | None]:
    """Return the numbers of one side of an equation, the + * / between them, and its value (None: division by 0)."""
    numbers, operators = [], []
    for symbol, digits in _TERM.findall(side):
        number = Fraction(digits) if "." in digits else int(digits)  # an int is several times as fast
        numbers.append(-number if symbol == "-" else number)
        operators.append("/" if symbol in _DIVIDE else "*" if symbol in _MULTIPLY else "+")
    products: list[int | Fraction] = []
    for operator, number in zip(operators, numbers, strict=True):
        if operator == "+":
            products.append(number)
        elif operator == "*":
            products[-1] *= number
        elif number:
            products[-1] = Fraction(products[-1], number)
        else:
            return numbers, operators[1:], None
    return numbers, operators[1:], sum(products)


# ----------------------------------------------------------------------------------------------------------------------
# From completions to metrics

Rewards = dict[str, tuple[Callable[..., Any], float]]
# What the mean of a record's field is called, where it is not the field's own name.
METRICS = {"right": "accuracy", "truncated": "completions/clipped_ratio", "parsed": "completions/parsed_ratio",
           "length": "completions/mean_length", "terminated_length": "completions/mean_terminated_length"}  # fmt: skip


def load_rewards(specs: Sequence[str], script: dict[str, Any]) -> Rewards:
    """Return {name: (function, weight)} for specs such as accuracy=2.0, format and module:function=0.5.

    A name without a module is NAME_reward of `script` (the globals of a script), or else of this file. A weight that is
    not given is 1. Raises ValueError that names the spec, and whatever the import of a module raises.
    """
    rewards: Rewards = {}
    for spec in specs:
        path, _, weight = spec.partition("=")
        name = path.rpartition(":")[2]
        found = pkgutil.resolve_name(path) if ":" in path else (globals() | script).get(f"{name}_reward")
        if not callable(found) or name in rewards or not math.isfinite(float(weight or 1)):
            raise ValueError(f"{spec}: no function, a name twice, no finite weight")
        rewards[name] = found, float(weight or 1)
    return rewards


def grade(rewards: Rewards, problems: list[Record], texts: list[str], ids: list[list[int]]) -> list[Record]:
    """Return a record for each completion: what is read from it, what each reward gives it, and their weighted sum.

    Functions are called as TRL calls them for conversational data: message lists, completion_ids, every data column.
    None means "does not apply"; where none applies, the reward is None. `right` and `parsed` are always this file's,
    whatever is rewarded. Raises ValueError on a wrong number of rewards and on one that is not finite.
    """
    columns: Record = {name: [problem.get(name) for problem in problems] for name in problems[0]}
    columns["prompts"] = [[{"role": "user", "content": question}] for question in columns["question"]]
    columns["completions"] = [[{"role": "assistant", "content": text}] for text in texts]
    columns["completion_ids"] = ids
    records: list[Record] = []
    for problem, text in zip(problems, texts, strict=True):
        record = {"question": problem["question"], "answer": problem["answer"], "completion": text}
        record["extracted"] = _predicted(text, problem["answer"]) or None
        record["right"] = accuracy_reward([text], [problem["answer"]]) == [1]
        record["parsed"] = is_parsed(text, problem["answer"])
        records.append(record | {"reward": None})
    for name, (function, weight) in rewards.items():
        values = [None if value is None else float(value) for value in function(**columns)]
        if len(values) != len(records) or not all(math.isfinite(value or 0) for value in values):
            raise ValueError(f"reward '{name}' must give {len(records)} finite numbers or None, not {values!r:.200}")
        for row, value in zip(records, values, strict=True):
            row[f"rewards/{name}"] = value
            if value is not None:
                row["reward"] = (row["reward"] or 0.0) + weight * value
    return records


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


def signal_line(history: Sequence[dict[str, float]]) -> str:
    """Return what to say about the groups that carry signal, those with unequal rewards; "" if there is nothing to say.

    `history` holds the metrics of steps 0, 1, ... In step 1 the line gives their share before training. Later there is
    one line when the last 20 steps had hardly any and earlier ones had.
    """
    rows = [row for row in history if "train/frac_reward_zero_std" in row]
    if not rows:
        return ""
    shares = [1 - row["train/frac_reward_zero_std"] for row in rows]
    names = ("train/frac_all_right", "completions/parsed_ratio", "completions/clipped_ratio")
    cause = likely_cause(*[rows[-1][name] for name in names])
    if len(shares) == 1:
        return f"before training {shares[0]:.0%} of the groups carry signal" + f": {cause}" * (shares[0] < 0.05)
    lost = len(shares) > 20 and sum(shares[-20:]) < 0.4 <= sum(shares[-21:-1])
    return f"hardly any signal in the last 20 steps: {cause}" if lost else ""


def likely_cause(right: float, parsed: float, truncated: float) -> str:
    """Return why completions most likely teach nothing, from the shares that are right, parsed and cut off."""
    if right > 0.5:
        return "the task is solved; take a harder --task"
    if truncated > 0.5:
        cure = "check --prompt-format and the chat template" if truncated == 1 else "raise --max-completion-length"
        return f"{truncated:.0%} of the completions never stop; {cure}"
    if parsed < 0.5:
        return "no answer can be parsed; ask for its form in --system-prompt or reward it"
    return "answers are found but wrong; take an easier --task or more --num-generations"
