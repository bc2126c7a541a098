r"""Rewards for completions whose answer can be checked, in TRL's own reward signature.

A reward function takes `completions` (strings, or lists of chat messages), the columns it needs by name, and ignores
every other keyword; it returns one float in [0, 1] for each completion. So the functions here work in TRL's
`GRPOTrainer`, and TRL's functions work in the scripts. The tokenizer is left to the scripts.

No text of a policy makes a function raise, and every function takes time linear in the length of its text; only LaTeX
that is short and has small exponents goes to math-verify. Only a gold answer, which is the user's data, can make one
raise.

The grammar of an answer, the same for a completion and for a gold answer (docs/answers.md has examples):

    form     the first of these that is in the text; if there are several of its kind, the last one:
             <answer>…</answer>     closed, no other answer tag inside; may span lines
             \boxed{…} or \fbox{…}   closed, with balanced braces
             #### …                 to the end of its line
             The answer is …        any letter case, "final" and a colon optional; to the end of its sentence or line
             the last number        only if none of the explicit forms above is there
    number   [-][$]digits[/digits]; digits are 1000, 1,000, 1 000, 1000.5, .5 or 1e3; minus 3 is -3, 1 1/2 is 3/2, and
             \frac{3}{4} is 3/4. What stands before an equals sign, text around the number and a unit are allowed
             (`6*7 = 42`, `42 (6 times 7)`, `18 km/h`, `50%`). Digits within a word (`m2`) are not a number, nor are
             those that words change (`not 41`, `5 and a half`, `3 million`). Malformed, and equal to nothing: 1,00
             1.2.3  1/0  5²  ٣  2½, and any number longer than `MAX_NUMBER_CHARS`. Values are compared exactly.
    LaTeX    10^3, \sqrt{2}, x^2+1, (3, 4): compared by math-verify.

What stands in a think block is no answer, even if the block is not closed. An explicit form that is empty gives no
answer, and no other form is looked for. One that holds several numbers (`17 or 18`) earns nothing,
even if all of them are right. A form that is not closed, because the completion was cut off or badly nested, does not
count.
"""

import asyncio
import inspect
import json
import logging
import math
import pkgutil
import re
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from statistics import fmean
from types import SimpleNamespace
from typing import Any

Record = dict[str, Any]
Completion = str | Sequence[Record]

# ----------------------------------------------------------------------------------------------------------------------
# The answer of a completion


def extract_answer(text: str) -> str | None:
    """Return the answer that `text` gives, in the order of forms at the top of this file, or None if it gives none.

    The content of an explicit form is returned as it is, without surrounding space; None if that is empty.
    """
    numbers = list(_NUMBER.finditer(_plain(_outside(text))))
    return _explicit(text, numbers[-1].group() if numbers else "") or None


# `++`, `*+`, `?+` never backtrack, which keeps the patterns linear on any text. A lookbehind comes after the first
# character of a match, not before it: nearly every place in a text fails at that character, which is much cheaper.
_IN = ""
# How deep braces may be nested.
for _ in range(9):
    _IN = rf"(?:\\.|[^{{}}\\]|\{{{_IN}\}})*+"
# A question mark does not end the sentence: "the answer is 17? No, 18." holds two numbers.
_PHRASE = r"the\s++(?:final\s++)?answer\s++is\b"
_FORMS = [
    r"(?s)<answer>((?:(?!</?answer>).)*+)</answer>",
    rf"(?s)\\f?box(?:ed)?\s*+(?=\{{({_IN})\}})",
    r"####((?:(?!####).)*+)",
    rf"(?i)\b{_PHRASE}\s*+:?\s*+((?:(?!{_PHRASE}|[.!](?!\S)).)*+)",
]


def _explicit(text: str, default: str) -> str:
    """Return the stripped content of the first explicit form that is in `text`, `default` without one."""
    for form in _FORMS:
        found = re.findall(form, _outside(text))
        if found:
            return found[-1].strip()
    return default


def _outside(text: str) -> str:
    """Return `text` without its think block, which the prompt may have opened."""
    return re.sub(r"(?s)<think>.*?(</think>|\Z)", "", text).rpartition("</think>")[2]


# A number with everything attached to it, well formed or not; `_value` decides. A hyphen is not a sign after a word or
# a bracket (`10-12`, `(3)-5`), and before a space (`- 18 eggs` in a list) only at the beginning or after `= `.
_NUMBER = re.compile(
    r"([-\u2212\u2013](?<![\w)].)(?:(?<=\A.) |(?<== .) )?+|\b(?:[Mm]inus|[Nn]egative) )?+\\?+[$€£]?+"
    r"([1-9](?<![\w^.,].)\d{0,2}+(?:[ \xa0]\d{3}(?!\d))++"
    r"|(?:\d(?<![A-Za-z_\d^].)|\.(?<![A-Za-z_\d^.].)\d)\w*+(?:[.,/^]\w++)*+(?:[-+](?<=\d[eE].)\d++)?+"
    r"(?: \d++/\d++)?+)(?! and an? | (?:hundred|thousand|[mb]illion)\b)"
)


def _plain(text: str) -> str:
    r"""Rewrite the LaTeX that occurs in answers: \frac{3}{4} to 3/4, \text{yes} to yes, 1{,}000 to 1,000."""
    # 1\frac{1}{2} is 1 1/2.
    text = re.sub(r"(\d)(?=\\[dt]?frac)", r"\1 ", re.sub(r"\{,\}|,\\!", ",", text))
    text = re.sub(r"\\[dt]?frac *+(?:(\d)(\d)|\{ *+(-?[\d.,]++) *+\} *+\{ *+([\d.,]++) *+\})(?!\d)", r"\1\3/\2\4", text)
    text = re.sub(r"\\(?:text|math|f?box)\w*+\{([^{}]*+)\}|\\(?=[$%])|\\[()\[\],;!]|\^\{?\\circ\}?", r" \1", text)
    # Not an answer: a number that is denied, and a remark in brackets.
    return re.sub(r"\b[Nn]ot [$€£]?[\d.,]*+|(?<=\w) \([^()]*+\)", "", text)


# ----------------------------------------------------------------------------------------------------------------------
# Whether it is right


# A group's completions are often equal.
@lru_cache(2048)
def answers_match(predicted: str | None, gold: str) -> bool:
    """Say whether an extracted answer equals the gold answer.

    The gold answer is the explicit form in `gold`, else all of it. If it begins with its only number, it is that number
    (30, $30, 30 apples), and `predicted` must hold exactly one number, of exactly the same value: 50% is 50, 3/4 is
    0.75, 00101 is 101. Any other gold answer is text, compared without case, surrounding space and one trailing period.
    What is LaTeX on either side is compared by math-verify as well. None never matches. Raises ValueError if the gold
    answer is empty.
    """
    if predicted is None:
        return False
    expected, value = _gold(gold)
    if value is None:
        return _key(predicted) == _key(expected) or _same_maths(expected, predicted)
    # A sum that the policy leaves to the reader, such as \boxed{6 \times 7}, is no number.
    return _value(predicted) == value or (_is_latex(predicted) and _same_maths(expected, predicted))


def is_parsed(text: str, gold: str) -> bool:
    """Say whether `text` gives an answer of the gold answer's kind, right or wrong.

    That is one number or LaTeX if the gold answer is a number, else text that is not empty. Raises ValueError if the
    gold answer is empty.
    """
    answer = _answer(text, gold) or ""
    if _gold(gold)[1] is None:
        return bool(_key(answer))
    return _value(answer) is not None or _is_latex(answer)


@lru_cache(2048)
def _answer(text: str, gold: str) -> str | None:
    """Return the completion's answer, read as what the gold answer is: a number or text."""
    is_text = _gold(gold)[1] is None
    return _explicit(text, _outside(text)) if is_text else extract_answer(text)


@lru_cache
def _gold(gold: str) -> tuple[str, Fraction | None]:
    """Return the text of the gold answer, and its value if it begins with its only number."""
    gold = str(gold) if isinstance(gold, int) else gold
    text = _explicit(gold, gold.strip())
    if not text:
        raise ValueError(f"empty gold answer in {gold[-80:]!r}: give the row an `answer`, or drop the row")
    return text, _value(text) if _NUMBER.match(_plain(text).strip("$ ")) else None


def _key(text: str) -> str:
    """Return what is compared of an answer that is text."""
    text = (_plain(text).strip() or text.strip()).casefold()
    return text.removesuffix(".").rstrip() or text


# Reading a number of n digits takes more than n steps, so there is a limit; Python's own (4300) raises.
MAX_NUMBER_CHARS = 1000
_DIGITS = r"(?a:(?:[1-9]\d{0,2}(?:,\d{3})++|\d++)(?:\.\d++)?+|\.\d++)"
_VALUE = rf"(?as)(?:(\d++) )?({_DIGITS}(?:[eE][-+]?\d{{1,3}}(?!\d))?+)(?:/({_DIGITS}))?+(.*)"


@lru_cache
def _value(text: str) -> Fraction | None:
    """Return the value of the one number in `text`; None if it holds none, several, or a malformed one."""
    left, _, right = _plain(text).rpartition("=")
    numbers = list(_NUMBER.finditer(right.strip()))
    # `x = 18` and `6*7 = 42` are read; lists such as `17 = 18`, LaTeX and terms such as `x + 1` are not.
    is_list = left and not re.search(r"[A-Za-z]\w*+ *\Z|\d *[-+*/\u00d7÷] *[$\d]", left)
    if len(numbers) != 1 or is_list or re.search(r"\\|\d *[+*] *[A-Za-z(]|[A-Za-z)] *[+*] *\d", right):
        return None
    sign, body = numbers[0].groups()
    digits = re.match(_VALUE, body if "/" in body else re.sub(r"\s", ",", body))
    # What is attached to the number may be a unit, but not digits of any script and not an exponent.
    if not digits or len(body) > MAX_NUMBER_CHARS or any(char.isnumeric() or char in "^π" for char in digits[4]):
        return None
    parts = digits[1] or "0", digits[2], digits[3] or "1"
    whole, above, below = (Fraction(part.replace(",", "")) for part in parts)
    return (whole + above / below) * (-1 if sign else 1) if below else None


def _is_latex(text: str) -> bool:
    r"""Say whether `text` is LaTeX that is one number: 10^3, 3 \times 10^5, \sqrt{4}, \frac{\sqrt{16}}{2}."""
    power = r"(?:[\d.]+ *\\(?:times|cdot) *)?\d+ *\^ *\{?-?\d\d?\}?"
    return bool(re.fullmatch(rf"-?(?:{power}|\d*\\(?:sqrt|[dt]?frac)(?:[\d{{}}. ]|\\sqrt)+)", text.strip("$ ")))


# Longer LaTeX and longer equations are not read: no honest completion comes near the limit.
MAX_CHARS = 200


def _same_maths(gold: str, predicted: str) -> bool:
    """Say whether math-verify, as TRL uses it, takes both for the same; without its timeouts, which are signals."""
    both = f"{gold}\n{predicted}"
    # It may need long for words, factorials, large exponents and powers of powers.
    hard = re.search(r"!|(?<![\\A-Za-z])[A-Za-z]{3}|\^ *\{?-?\d{3}|[)}] *\^ *\{?-?\d\d|\^.*\^", both)
    if hard or len(both) > MAX_CHARS or not re.search(r"[\\^(\[+*=]", both):
        return False
    # Imported here, as it takes half a second.
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    try:
        left, right = (parse(f"${text.strip('$ ')}$", parsing_timeout=None) for text in (gold, predicted))
        return bool(verify(left, right, timeout_seconds=None))
    # Whatever sympy raises on a text.
    except Exception:  # noqa: BLE001
        return False


# ----------------------------------------------------------------------------------------------------------------------
# Reward functions


def accuracy_reward(completions: Sequence[Completion], answer: Sequence[str], **kwargs: Any) -> list[float]:
    """Return 1.0 for each completion whose answer is the gold answer, else 0.0.

    If the gold answer is a number, the completion's answer is `extract_answer`'s. If it is text, a bare number is not
    an answer: then it is the explicit form, else the whole completion outside its think block. Raises ValueError if
    a gold answer is empty, or if there are not as many of them as completions.
    """
    texts = map(completion_text, completions)
    return [float(answers_match(_answer(text, gold), gold)) for text, gold in zip(texts, answer, strict=True)]


def format_reward(completions: Sequence[Completion], **kwargs: Any) -> list[float]:
    """Return 1.0 for each completion that is one think block, then one answer block, and nothing else; else 0.0.

    `<think>…</think><answer>…</answer>`: each of the four tags once and in this order, something in both blocks, only
    white space outside them.
    """
    return [float(bool(re.fullmatch(_FORMAT, text))) for text in map(completion_text, completions)]


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
    return [min(_steps(text) / REASONING_STEPS, 1.0) for text in map(completion_text, completions)]


# ----------------------------------------------------------------------------------------------------------------------
# What they are made of


def completion_text(completion: Completion) -> str:
    """Return what the policy wrote, from a string or from chat messages.

    The assistant's messages are joined by line breaks; the policy did not write the others, such as tool results.
    Content may be a string, None (a bare tool call) or a list of parts, of which only those with a `text` count.
    """
    messages = [{"content": completion}] if isinstance(completion, str) else completion
    contents = [message.get("content") for message in messages if message.get("role") in (None, "assistant")]
    parts = [[{"text": content}] if isinstance(content, str) else content for content in contents if content]
    return "\n".join("".join(part.get("text") or "" for part in some) for some in parts)


_BLOCK = r"(?!\s*+</)(?:(?!</?(?:think|answer)>).)++"
_FORMAT = rf"(?s)\s*<think>{_BLOCK}</think>\s*<answer>{_BLOCK}</answer>\s*"


# Equations beyond that number are not read.
MAX_EQUATIONS = 50
_SYMBOLS = {"\u2212": "-", "\u00d7": "*", r"\times": "*", r"\cdot": "*", "÷": "/", r"\div": "/"}
_TERM = rf"-?+\\?+\$?+{_DIGITS}(?![.,]?\d)"
# The longest run of numbers, operators and equals signs on one line, so that no two runs share text.
_EQUATION = rf"(?<![\w.,)]){_TERM}(?:[ \t]*+[-+*/xX=][ \t]*+{_TERM})*+"


def _steps(text: str) -> int:
    """Count the distinct calculations among the first `MAX_EQUATIONS` equations of `text`."""
    for name, symbol in _SYMBOLS.items():
        text = text.replace(name, symbol)
    steps = set()
    runs = [run for run in re.finditer(_EQUATION, text) if "=" in run.group()]
    for run in runs[:MAX_EQUATIONS]:
        start, end = run.span()
        # These show that it is part of a longer expression: `(1+2)*` before it, `*(2)` or `^2` or `%` after it.
        before = re.search(r"[\w)}\]%][ \t]*[-+*/^][ \t]*\Z", text[:start][-8:])
        behind = re.match(r"[ \t]*+(?:\\?%|[\^²³]|[eE]\d|[-+*/xX][ \t]*+\()", text[end:])
        if end - start <= MAX_CHARS and not before and not behind:
            steps.add(_calculation(run.group()))
    return len(steps - {None})


def _calculation(equation: str) -> object:
    """Return what an equation calculates, the same however it is written; None if it is false or changes nothing."""
    found, values = [], set()
    sides = re.sub(r"[\\$,]", "", equation).split("=")
    for side in sides:
        numbers, products = [], []
        # The operator is optional and lazy, so the minus of `5-3` is read as the sign of an added -3.
        for symbol, digits in re.findall(r"([-+*/xX])??\s*(-?[0-9.]+)", side):
            number = Fraction(digits) * (-1 if symbol == "-" else 1)
            numbers.append(number)
            if symbol in ("", "+", "-"):
                products.append(number)
            elif number in (0, 1) or (symbol != "/" and numbers[-2] == 1):
                return None
            else:
                products[-1] *= 1 / number if symbol == "/" else number
        if len(numbers) > 1 and 0 in numbers:
            return None
        if len(numbers) > 1:
            found.append((tuple(sorted(numbers)), tuple(sorted(products))))
        values.add(sum(products))
    # At least one side calculates, and at least one other is a plain result.
    return found[0] if 0 < len(found) < len(sides) and len(values) == 1 else None


# ----------------------------------------------------------------------------------------------------------------------
# From completions to metrics

Rewards = dict[str, tuple[Any, float]]
# What the mean of a record's field is called, where it is not the field's own name.
METRICS = {"right": "accuracy", "truncated": "completions/clipped_ratio", "parsed": "completions/parsed_ratio",
           "length": "completions/mean_length", "terminated_length": "completions/mean_terminated_length"}  # fmt: skip


def load_rewards(specs: Sequence[str], script: dict[str, Any], problems: Sequence[Record] = ()) -> Rewards:
    """Return {name: (function, weight)} for specs such as accuracy=2.0, format and module:function=0.5.

    A name without a module is NAME_reward of `script` (the globals of a script), or else of this file. A weight that is
    not given is 1. Each function is tried on the first of the problems, and each gold answer is read, so that what is
    wrong with them shows before a model is loaded. Raises ValueError that names the spec or the row, and whatever the
    import of a module or a function raises.
    """
    rewards: Rewards = {}
    for spec in specs:
        path, _, number = spec.partition("=")
        name, weight = path.rpartition(":")[2], float(number or 1)
        found = pkgutil.resolve_name(path) if ":" in path else (globals() | script).get(f"{name}_reward")
        if not callable(found) or hasattr(found, "forward") or name in rewards or not math.isfinite(weight):
            raise ValueError(f"{spec}: no function (a model is none), a name twice, or no finite weight")
        rewards[name] = found, weight
    for problem in problems:
        if accuracy_reward([problem["answer"]], [problem["answer"]]) != [1]:
            raise ValueError(f"nothing can match the gold answer {problem['answer']!r} of {problem['question']!r:.60}")
    for problem in problems[:1]:
        json.dumps(grade(rewards, [problem] * 2, [problem["answer"], ""], [[0]] * 2))
    return rewards


def grade(
    rewards: Rewards, problems: list[Record], texts: list[str], ids: list[list[int]], step: int = 0
) -> list[Record]:
    """Return a record for each completion: what is read from it, what each reward gives it, and their weighted sum.

    Functions are called as TRL calls them for conversational data, with what their signatures take. What they log is a
    field of the records. None means "does not apply"; where none applies, the reward is None. `right` and `parsed` are
    always this file's, whatever is rewarded. Raises ValueError on a wrong number of rewards and on one that is not
    finite.
    """
    logged: Record = {}
    columns: Record = {name: [problem.get(name) for problem in problems] for name in problems[0]}
    columns |= {
        "prompts": [[{"role": "user", "content": question}] for question in columns["question"]],
        "completions": [[{"role": "assistant", "content": text}] for text in texts],
        "completion_ids": ids,
        "trainer_state": SimpleNamespace(global_step=step),
        "log_extra": logged.__setitem__,
        "log_metric": lambda name, value: logged.update({name: [float(value)] * len(texts)}),
    }
    records: list[Record] = []
    for question, answer, text in zip(columns["question"], columns["answer"], texts, strict=True):
        read = _answer(text, answer)
        record = {"question": question, "answer": answer, "completion": text, "extracted": read or None}
        record |= {"right": answers_match(read, answer), "parsed": is_parsed(text, answer), "reward": None}
        records.append(record)
    for name, (function, weight) in rewards.items():
        parameters = inspect.signature(function).parameters
        takes_all = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
        values = function(**{key: value for key, value in columns.items() if takes_all or key in parameters})
        values = asyncio.run(values) if inspect.iscoroutine(values) else values
        values = [None if value is None else float(value) for value in values]
        if len(values) != len(texts) or not all(math.isfinite(value or 0) for value in values):
            raise ValueError(f"reward '{name}' must give {len(texts)} finite numbers or None, not {values!r:.200}")
        for row, value in zip(records, values, strict=True):
            row[f"rewards/{name}"] = value
            if value is not None:
                row["reward"] = (row["reward"] or 0.0) + weight * value
    for name, values in logged.items():
        for row, value in zip(records, values, strict=True):
            row.setdefault(name, value)
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


def signal_metrics(records: list[Record], size: int) -> dict[str, float]:
    """Return the share of groups whose rewards are all equal: they carry no signal. Its parts: all right, or not.

    `size` is that of a group.
    """
    groups = [records[i : i + size] for i in range(0, len(records), size)]
    flat = [group for group in groups if not any(row["advantage"] for row in group)]
    right = sum(all(row["right"] for row in group) for group in flat)
    counts = {"reward_zero_std": len(flat), "all_right": right, "all_wrong": len(flat) - right}
    return {f"train/frac_{name}": count / len(groups) for name, count in counts.items()}


def wilson_interval(right: float, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a share, by Wilson's score: it is also good near 0 and 1, where +-1.96 std is not."""
    share, z2 = right / count, 1.96**2 / count
    half = (z2 * (share * (1 - share) + z2 / 4)) ** 0.5
    # Rounding may give more than 1 where all are right; where none is right the difference is exactly 0.
    return (share + z2 / 2 - half) / (1 + z2), min((share + z2 / 2 + half) / (1 + z2), 1.0)


def signal_line(history: Sequence[dict[str, float]], used: Sequence[str] = ("accuracy",), size: int = 8) -> str:
    """Return what to say about the groups that carry signal, those with unequal rewards; "" if there is nothing to say.

    `history` holds the metrics of steps 0, 1, ...; `used` are the rewards that count, `size` is that of a group. In
    step 1 the line gives the share before training. Later there is one line when the last 20 steps had hardly any and
    earlier ones had.
    """
    rows = [row for row in history if "train/frac_all_right" in row]
    if not rows:
        return ""
    shares = [1 - row["train/frac_reward_zero_std"] for row in rows]
    last = rows[-1]
    seen = last["train/frac_all_right"], last["completions/parsed_ratio"], last["completions/clipped_ratio"]
    cause = likely_cause(*seen, used)
    if len(rows) > 1:
        lost = sum(shares[-20:]) < 0.4 <= sum(shares[-21:-1])
        return f"hardly any signal in the last 20 steps: {cause}" if lost else ""
    line = f"before training {shares[0]:.0%} of the groups carry signal"
    if size < 8 and set(used) == {"accuracy"}:
        # A group has signal unless all its completions are right or all are wrong; most if prompts are alike.
        p = rows[0]["train/accuracy"]
        line += f", with 16 --num-generations at most {1 - p**16 - (1 - p) ** 16:.0%}"
    return f"{line}: {cause}" if shares[0] < 0.05 else line


def likely_cause(right: float, parsed: float, truncated: float, used: Sequence[str] = ("accuracy",)) -> str:
    """Return why completions most likely teach nothing, from the shares that are right, parsed and cut off, and from
    the names of the rewards that count."""
    if right > 0.5 and "accuracy" in used:
        return "the task is solved; take a harder --task"
    if truncated > 0.5:
        cure = "check --prompt-format and the chat template" if truncated == 1 else "raise --max-completion-length"
        return f"{truncated:.0%} of the completions never stop; {cure}"
    if "accuracy" not in used:
        return f"{' + '.join(used)} is the same within each group; change --rewards or the prompt"
    if parsed < 0.5:
        return "no answer can be parsed; ask for its form in --system-prompt"
    return "answers are found but wrong; take an easier --task or more --num-generations"
