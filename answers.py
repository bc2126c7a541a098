r"""What is read from a text: its answer, whether that is the gold answer, and its calculations. rewards.py uses it.

No text of a policy makes a function raise, and every function takes time linear in the length of its text. Only a gold
answer, which is the user's data, can make one raise.

The grammar of an answer, the same for a completion and for a gold answer:

    form     the first of these that is in the text; if there are several of its kind, the last one:
             <answer>…</answer>     closed, without another tag inside; may span lines
             \boxed{…}              closed, with balanced braces
             #### …                 to the end of its line
             The answer is …        any letter case, "final" and a colon optional; to the end of its sentence or line
             the last number        only if none of the explicit forms above is there
    number   [-][$]digits[/digits]; digits are 1000, 1,000, 1 000, 1000.5, .5 or 1e3; minus 3 is -3, and 1 1/2 is 3/2.
             Text around it and a unit are allowed (`The total is 18 km/h.`, `x = 18`, `50%`). Digits within a word
             (`m2`) are no number. Values are compared exactly, never as floats.
    LaTeX    is read by math-verify, if it is short and its exponents are small: \frac12, \sqrt{2}, 10^3.

What stands in a think block is no answer, even if the block is not closed. An explicit form that is empty gives no
answer, and no other form is looked for. One that holds several numbers (`17 or 18`, `18 = 18`) earns nothing, even if
all of them are right. A form that is not closed, because the completion was cut off or badly nested, does not count.
docs/answers.md shows what is read by examples.
"""

import ctypes
import logging
import re
import threading
from collections import deque
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from itertools import islice, pairwise
from typing import Any

# ----------------------------------------------------------------------------------------------------------------------
# The answer of a completion


def extract_answer(text: str) -> str | None:
    """Return the answer that `text` gives, in the order of forms at the top of this file, or None if it gives none.

    The content of an explicit form is returned as it is, without surrounding space; None if that is empty.
    """
    explicit = _explicit_form(text)
    if explicit is not None:
        return explicit or None
    number = _last(_NUMBER, _plain(_outside_thought(text)))
    return number.group().strip() if number else None


# `++`, `*+`, `?+` never backtrack, which keeps the patterns linear on any text. A lookbehind comes after the first
# character of a match, not before it: nearly every place in a text fails at that character, which is much cheaper.
_BRACED = r"(?:\\.|[^{}\\])*+"
for _ in range(8):  # braces may be nested so deep
    _BRACED = rf"(?:\\.|[^{{}}\\]|\{{{_BRACED}\}})*+"
# A question mark does not end the sentence: "the answer is 17? No, 18." holds two numbers.
_PHRASE = r"the\s++(?:final\s++)?answer\s++is\b"
_FORMS = [
    re.compile(r"<answer>((?:(?!</?answer>).)*+)</answer>", re.DOTALL),
    re.compile(rf"\\boxed\s*+(?=\{{({_BRACED})\}})", re.DOTALL),
    re.compile(r"####((?:(?!####)[^\n])*+)"),
    re.compile(rf"\b{_PHRASE}\s*+:?\s*+((?:(?!{_PHRASE}|[.!](?:\s|\Z))[^\n])*+)", re.IGNORECASE),
]


def _explicit_form(text: str) -> str | None:
    """Return the stripped content of the first explicit form that is in `text`, "" if it is empty, None without one."""
    text = _outside_thought(text)
    found = next(filter(None, (_last(form, text) for form in _FORMS)), None)
    return found[1].strip() if found else None


_THOUGHT = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)


def _outside_thought(text: str) -> str:
    """Return `text` without its think block, which the prompt may have opened."""
    return _THOUGHT.sub("", text).rpartition("</think>")[2] if "think>" in text else text


_FRACTION = r"\\[dt]?frac *+(?:\d\d|\{ *+-?[\d.,]++ *+\} *+\{ *+[\d.,]++ *+\})"
# A number with everything attached to it, well formed or not; `_value` decides. A hyphen is not a sign after a word or
# a bracket (`10-12`, `(3)-5`), and before a space (`- 18 eggs` in a list) only at the beginning or after `= `.
_NUMBER = re.compile(
    r"(?P<sign>[-\u2212\u2013](?<![\w)].)(?:(?:(?<=\A.)|(?<== .)) )?+|\b(?:[Mm]inus|[Nn]egative) )?+(?:\\?[$€£])?+"
    rf"(?P<body>{_FRACTION}|[1-9](?<![\w^.,].)\d{{0,2}}+(?:[ \xa0\u202f]\d{{3}}(?!\d))++"
    r"|(?:\d(?<![A-Za-z_\d^].)|\.(?<![A-Za-z_\d^.].)\d)\w*+(?:[.,/^]\w++)*+(?:[-+](?<=\d[eE].)\d++)?+"
    rf"(?: ?{_FRACTION}| \d++/\d++(?![/\d]))?+)"
)


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    matches = deque(pattern.finditer(text), maxlen=1)
    return matches[0] if matches else None


# LaTeX that is only text or space.
_MARKUP = re.compile(
    r"\\(?:text(?:bf)?|math(?:rm|bf))\{([^{}]*+)\}|\\(?:[()\[\],;: ]|quad|left|right|(?=%))|\^\{?\\circ\}?"
)
# Numbers that are not the answer, as the text says, or that words or letters change: not 41, 3 million, x + 1, 2x.
_CHANGED = re.compile(
    r"(?:\b[Nn]ot |n't |\b[Nn]ever |[≠≤≥√] ?|[A-Za-z)](?: [+*\u00d7<>] |[+\u00d7]))(?:equal to )?[$€£]?\d[\w.,]*+"
    r"|(?<![\w.,])\d[\d.,]*+(?: [+*\u00d7<>] [A-Za-z(]|[+\u00d7][A-Za-z(]|[xyz]\b"
    r"| ?and (?:an? |one |two |three )| ?(?:hundred|thousand|[mbtr]{1,2}illion)\b)"
)


def _plain(text: str) -> str:
    r"""Rewrite LaTeX that is only text or space, such as \text{yes} and 1{,}000, and leave out changed numbers."""
    if "\\" in text or "{" in text:
        text = _MARKUP.sub(r" \1", text.replace(r"\$", "$").replace("{,}", ","))
    return _CHANGED.sub(" ", text)


# ----------------------------------------------------------------------------------------------------------------------
# Whether it is right


# A group's completions are often equal.
@lru_cache(maxsize=2048)
def answers_match(predicted: str | None, gold: str) -> bool:
    """Say whether an extracted answer equals the gold answer.

    The gold answer is the explicit form in `gold`, else all of it. If it begins with its only number, it is that number
    (30, $30, 30 apples), and `predicted` must hold exactly one number, of exactly the same value: 50% is 50, 3/4 is
    0.75, 00101 is 101. Any other gold answer is text, compared without case, surrounding space and one trailing period,
    or else LaTeX, compared by math-verify. None never matches. Raises ValueError if the gold answer is empty.
    """
    expected, value = _gold(gold)
    if predicted is None or value is not None:
        return predicted is not None and _only_number(predicted) == value
    return _text_key(predicted) == _text_key(expected) or bool(_limited(_equal, expected, predicted))


# A group's completions are often equal.
@lru_cache(maxsize=2048)
def is_parsed(text: str, gold: str) -> bool:
    """Say whether `text` gives an answer of the gold answer's kind, right or wrong.

    That is one number if the gold answer is a number, else text that is not empty. Raises ValueError if the gold answer
    is empty.
    """
    predicted = predicted_answer(text, gold)
    read = _text_key if _gold(gold)[1] is None else _only_number
    return predicted is not None and read(predicted) not in (None, "")


def check_gold(gold: str) -> None:
    """Raise ValueError if nothing could match this gold answer, not even the gold answer itself."""
    if not answers_match(predicted_answer(gold, gold), gold):
        raise ValueError(f"no completion can match the gold answer {gold[-80:]!r}: correct the row, or drop it")


@lru_cache(maxsize=2048)
def predicted_answer(text: str, gold: str) -> str | None:
    """Return the completion's answer, read as what the gold answer is: a number, LaTeX or text."""
    expected, value = _gold(gold)
    explicit = extract_answer(text) if value is not None else _explicit_form(text)
    if explicit is None and value is None:
        explicit = _outside_thought(text)
        spans = re.split(r"\$\$?|\\[()\[\]]", explicit)
        return spans[-2] if _MATHS.match(expected) and len(spans) > 2 else explicit
    return explicit


# What may be LaTeX: a backslash or ^ is in it, or it has signs and no word, such as (3, 4) and x + 1.
_MATHS = re.compile(r".*[\\^]|(?=.*[a-zA-Z(\[])(?!.*[A-Za-z]{2}).*[-+*/=<>(\[]")


@lru_cache(maxsize=2048)
def _gold(gold: str) -> tuple[str, Fraction | None]:
    """Return the text of the gold answer, and its value if it is one number or begins with it."""
    gold = str(gold) if isinstance(gold, int) else gold
    explicit = _explicit_form(gold)
    text = gold.strip() if explicit is None else explicit
    if not text:
        raise ValueError(f"empty gold answer in {gold[-80:]!r}: give the row an `answer`, or drop the row")
    begins = _NUMBER.match(_plain(text).rpartition("=")[2].strip()) or "\\" in text
    return text, _only_number(text) if begins else None


def _text_key(text: str) -> str:
    text = _MARKUP.sub(r" \1", text).strip().casefold()
    return text.removesuffix(".").rstrip() or text


# What may follow an answer: `42 (6 times 7)`, `18 eggs on day 2`.
_REMARK = re.compile(r"(?<=\w) (?:\([^()]*+\)|(?:on|in|at|by|after|before|for|during) [^\d,;]{0,40}+\d\w*+\D*+\Z)")


@lru_cache(maxsize=2048)
def _only_number(text: str) -> Fraction | None:
    """Return the value of the one number in `text`; None if it holds none, several, or a malformed one."""
    plain = _plain(text).strip()
    numbers = list(islice(_NUMBER.finditer(plain), 2))
    if len(numbers) == 2:
        numbers = list(islice(_NUMBER.finditer(_REMARK.sub("", plain)), 2))
    value = _value(numbers[0]) if len(numbers) == 1 and "\\" not in plain else None
    if value is None and len(plain) <= MAX_EQUATION_CHARS:
        equation = next((run for run in _EQUATION.finditer(plain) if "=" in run.group()), None)
        # Nothing else in the text is a number.
        if equation and not re.search(r"\d", plain[: equation.start()] + plain[equation.end() :]):
            steps = _calculation(equation.group())
            return Fraction(steps[-1]) if steps else None
    return _limited(_rational, plain.rpartition("=")[2]) if value is None else value


# LaTeX that could take long to compare: factorials and the like, powers of powers, and exponents that are not small.
_HARD = re.compile(
    r"!|\\(?:sum|prod|int|lim|\w?binom|\w?mod)|[)}\]] *\^.*[)}\]] *\^"
    r"|\^ *(?!(?:-?\d\d?|\\?[a-zA-Z]+|\{-?\d{0,2}(?:\\?[a-zA-Z]+)?(?:[-+/]\d\d?)?\})(?![\d^]))",
    re.DOTALL,
)
MAX_MATHS_CHARS = 200
MAX_MATHS_SECONDS = 3.0


def _limited(function: Callable[..., Any], *texts: str) -> Any:
    """Return what a function makes of short, simple LaTeX; None if it raises, or after `MAX_MATHS_SECONDS`.

    math-verify limits its time by a signal, which needs the main thread. This timer works in every thread.
    """
    if any(len(text) > MAX_MATHS_CHARS or _HARD.search(text) for text in texts) or not _MATHS.match(texts[0]):
        return None
    from math_verify.errors import TimeoutException

    read = _latex_reader()
    thread, raised = ctypes.c_ulong(threading.get_ident()), ctypes.py_object(TimeoutException)
    timer = threading.Timer(MAX_MATHS_SECONDS, ctypes.pythonapi.PyThreadState_SetAsyncExc, (thread, raised))
    try:
        timer.start()
        try:
            return function(*[read(text) for text in texts])
        finally:
            # If it goes off at this moment, it raises here and not later.
            timer.cancel()
            timer.join()
    except (Exception, TimeoutException):  # noqa: BLE001
        return None


@lru_cache(maxsize=1)
def _latex_reader() -> Callable[[str], Any]:
    """Return math-verify's parser without its timeout; imported when it is needed, as that takes half a second."""
    from math_verify import LatexExtractionConfig, parse

    def read(text: str) -> Any:
        latex = text.replace("$", "")
        return parse(f"${latex}$", [LatexExtractionConfig()], fallback_mode="no_fallback", parsing_timeout=None)

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    # The first call compiles a lot, for which there is no limit.
    _rational(read(r"\frac{1}{2}"))
    return read


def _equal(gold: Any, predicted: Any) -> bool:
    from math_verify import verify

    return verify(gold, predicted, timeout_seconds=None)


def _rational(parsed: Any) -> Fraction:
    from sympy import nsimplify

    value = nsimplify(parsed[0].doit(), rational=True)
    return Fraction(value.p, value.q)


# Reading a number of n digits takes more than n steps, so there is a limit; Python's own (4300) raises.
MAX_NUMBER_CHARS = 1000
_DIGITS = r"(?:(?:[1-9][0-9]{0,2}(?:,[0-9]{3})++|[0-9]++)(?:\.[0-9]++)?+|\.[0-9]++)"
_VALUE = re.compile(rf"(?:([0-9]++) )?({_DIGITS}(?:[eE][-+]?[0-9]{{1,3}}(?![0-9]))?+)(?:/({_DIGITS}))?+")


def _value(number: re.Match[str]) -> Fraction | None:
    body = number["body"] if "/" in number["body"] else re.sub(r"[ \xa0\u202f]", ",", number["body"])
    digits = _VALUE.match(body)
    if len(body) > MAX_NUMBER_CHARS or not digits:
        return None
    # What is attached to the number may be a unit, but not digits of any script and not an exponent.
    if any(char.isnumeric() or char in "^π" for char in body[digits.end() :]):
        return None
    numerator, denominator = (Fraction((part or "1").replace(",", "")) for part in digits.groups()[1:])
    whole = int(digits[1] or 0)
    return (-1 if number["sign"] else 1) * (whole + numerator / denominator) if denominator else None


# ----------------------------------------------------------------------------------------------------------------------
# Calculations

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


def count_steps(text: str) -> int:
    """Count the distinct calculations among the first `MAX_EQUATIONS` equations of `text`."""
    steps = set()
    for equation in islice((run for run in _EQUATION.finditer(text) if "=" in run.group()), MAX_EQUATIONS):
        before = text[max(0, equation.start() - 8) : equation.start()]
        is_cut = _CUT_BEFORE.search(before) or _CUT_BEHIND.match(text, equation.end())
        if len(equation.group()) <= MAX_EQUATION_CHARS and not is_cut:
            steps.add(_calculation(equation.group()))
    return len(steps - {None})


def _calculation(equation: str) -> tuple[Any, ...] | None:
    """Return what an equation calculates, the same however it is written; None if it is false or changes nothing.

    The last of its parts is the result.
    """
    # The backslash of an operator such as \times stays.
    sides = [_side(side) for side in re.sub(r"\\(?![a-z])|[$,]", "", equation).replace("\u2212", "-").split("=")]
    calculated = [(numbers, operators) for numbers, operators, _ in sides if operators]
    values = {value for _, _, value in sides}
    # At least one side calculates, and at least one other is a plain result.
    if not 0 < len(calculated) < len(sides) or None in values or len(values) > 1:
        return None
    numbers, operators = calculated[0]
    for operator, (left, right) in zip(operators, pairwise(numbers), strict=True):
        if 0 in (left, right) or (operator != "+" and right == 1) or (operator == "*" and left == 1):
            return None
    return (*(sorted(numbers) if len(set(operators)) == 1 and "/" not in operators else numbers), *operators, *values)


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
