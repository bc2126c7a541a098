r"""How long the functions of rewards.py take on the worst texts that a policy could write, by the length of the text.

    uv run benchmarks/reward_time.py                            # five minutes on one core
    uv run benchmarks/reward_time.py --lengths 1000 10000 --repeats 1         # smoke run

A text is one piece, repeated, alone or within an answer form. The pieces are what a pattern has to look at longest, by
thought and by a random search. Every function reads every text once, with empty caches; the slowest texts and those
that grow most are then measured again, each repeat at all lengths in turn, so that a machine whose speed drifts slows
all lengths alike. Medians of CPU time, which waits for no other process. Prints Markdown for RESULTS.md.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import rewards

FUNCTIONS: dict[str, Callable[[str], object]] = {
    "accuracy_reward, gold a number": lambda text: rewards.accuracy_reward([text], ["18"]),
    "accuracy_reward, gold a word": lambda text: rewards.accuracy_reward([text], ["yes"]),
    "format_reward": lambda text: rewards.format_reward([text]),
    "reasoning_reward": lambda text: rewards.reasoning_reward([text]),
    "extract_answer": rewards.extract_answer,
    "answers_match": lambda text: rewards.answers_match(text, "18"),
    "is_parsed": lambda text: rewards.is_parsed(text, "18"),
}
# Equations as long and as many as are read, less one, and false, so that reading goes on through what follows.
EQUATIONS = {
    f"equations of {term}": (f"{term * (194 // len(term))}{term[:-1]}=9\n" * (rewards.MAX_EQUATIONS - 1), "0} ", "")
    for term in ("7+", "7/", ".7+", ".7/", "97/", "7=")
}
PIECES = [
    # tags and braces
    *["<answer>", "</answer>", "<answer></answer>", "<answer>1</answer>", "<think>", "<<think>", "<think></think>"],
    *["<", "{", "}", "{}", "}{", "{a}", "}0", "0}", "-{}", "{,}", r"\{", r"\boxed", r"\boxed{", r"\boxed{}"],
    # LaTeX
    *[r"\frac{", r"\frac{1}{", r"\frac{1}{2}", r"}\frac{1}{2}", r"\frac{1}{2}€", r"\text{", r"\text{}", r"\text{a}"],
    *[r"€}\text{a}", r"\text{a}\frac{1}{2}", "\\", r"\$", r"-\$"],
    # numbers, and what looks like the beginning of one
    *["9", "1,", "1,000", ",000", "1.", "1/", "1^", "1 ", "0(", "1(", "-1 ", "(0*", "1e5 ", "$", "-", "-$", "."],
    # equations, phrases, white space, any other text
    *["=", "1=", "1 = ", "1+", "1 + ", "1+1=3 ", "2*3=6", "7=7 ", "the ", "the final ", "the answer is ", "#", "####"],
    *[" ", "\n", "\t", "\u3000", "a", "a ", "é ", "İ", "٣", "²", "\0"],
]  # fmt: skip
AROUND = [("", ""), (r"\boxed", ""), (r"\boxed{", "}"), ("<answer>", "</answer>"), ("the answer is ", "")]
TEXTS = {f"{head}{piece}...{tail}": (head, piece, tail) for piece in PIECES for head, tail in AROUND} | EQUATIONS


@dataclass(frozen=True)
class Options:
    """What to measure."""

    lengths: tuple[int, ...] = (1_000, 10_000, 100_000, 1_000_000)
    """Characters of the texts, rising."""
    at: int = 100_000
    """The length whose slowest text is named, with its growth from the length before."""
    repeats: int = 9
    """Of the second measurement."""
    candidates: int = 4
    """Texts measured again: as many slowest of each length, and as many of the largest growth."""


def make_text(name: str, length: int) -> str:
    """The text of this name, exactly so long."""
    head, piece, tail = TEXTS[name]
    room = max(length - len(head) - len(tail), 0)
    return (head + (piece * (room // len(piece) + 1))[:room] + tail)[:length]


def measure(function: Callable[[str], object], name: str, lengths: Sequence[int], repeats: int) -> list[float]:
    """Median milliseconds at each length."""
    texts = [make_text(name, length) for length in lengths]
    times = []
    for _ in range(repeats):
        for text in texts:
            for cached in vars(rewards).values():
                if hasattr(cached, "cache_clear"):
                    cached.cache_clear()
            start = time.process_time()
            function(text)
            times.append(1000 * (time.process_time() - start))
    return [median(times[i :: len(texts)]) for i in range(len(texts))]


def main(options: Options) -> None:
    """Measures function by function and prints the rows as they come."""
    lengths = sorted(options.lengths)
    at = lengths.index(options.at) if options.at in lengths else len(lengths) - 1
    before = max(at - 1, 0)

    def growth(times: list[float]) -> float:
        return times[at] / times[before] if times[at] >= 1 else 0.0  # below a millisecond it is noise

    sizes = [f"{length // 1000:,} kB" for length in lengths]
    print(f"{len(TEXTS)} texts; the slowest's milliseconds. The slowest text is that of {sizes[at]}; growth is from")
    print(f"{sizes[before]} to {sizes[at]}, of this text and the largest of any.\n")
    print(f"| function | {' | '.join(sizes)} | slowest text | its growth | largest growth |")
    print(f"|{'---|' * (len(sizes) + 4)}", flush=True)
    for name, function in FUNCTIONS.items():
        once = {}
        for text in TEXTS:
            if text not in EQUATIONS or name == "reasoning_reward":  # for the others of no interest
                times = measure(function, text, lengths, 1)
                once[text] = [*times, growth(times)]
        columns = [sorted((times[i], text) for text, times in once.items()) for i in range(len(lengths) + 1)]
        chosen = {text for column in columns for _, text in column[-options.candidates :]}
        again = {text: measure(function, text, lengths, options.repeats) for text in sorted(chosen)}
        _, slowest = max((times[at], text) for text, times in again.items())
        cells = [f"{max(times[i] for times in again.values()):.3g}" for i in range(len(lengths))]
        cells += [f"`{slowest}`", f"{growth(again[slowest]):.1f}", f"{max(map(growth, again.values())):.1f}"]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
