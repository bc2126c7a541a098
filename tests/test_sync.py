"""A function that stands in several scripts is the same to the letter; the failure prints the difference."""

import ast
import difflib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Variant: its parent, and what may differ from that, with the reason. All else that the parent defines must be there
# unchanged.
VARIANTS: dict[str, tuple[str, dict[str, str]]] = {
    "grpo_ladder.py": (
        "grpo.py",
        {
            "Config": "no --dataset-path and --test-path: the tasks are generated",
            "arithmetic": "its own tasks",
            "simple_math": "its own tasks",
            "gsm8k": "its own tasks",
            "read_jsonl": "its own tasks",
            "TASKS": "its own tasks",
            "load_problems": "no files and no test split",
            "main": "--task all",
        },
    ),
    "grpo_scheduler.py": (
        "grpo.py",
        {
            "Config": "its own task, policy and rewards; --dataset-path for these",
            "PRESETS": "its own rewards",
            "TAG_PROMPT": "says what its task is",
            "arithmetic": "its own task",
            "simple_math": "its own task",
            "gsm8k": "its own task",
            "TASKS": "its own task",
            "load_problems": "its own task, no test split but a file",
            "load_rewards": "rewards of the script itself",
            "evaluate": "the mean of each reward",
            "main": "prints the mean score",
        },
    ),
    "grpo_overfit.py": (
        "grpo.py",
        {
            "Config": "--num-samples, --target-accuracy, --gradient-checkpointing; no --test-path",
            "PRESETS": "GSM8K, its own sizes",
            "SPEED": "--gradient-checkpointing",
            "check_config": "--target-accuracy is at most 1",
            "arithmetic": "its own task",
            "simple_math": "its own task",
            "TASKS": "its own task",
            "load_problems": "a subset, no test split",
            "make_learner": "--gradient-checkpointing",
            "update": "--gradient-checkpointing",
            "main": "evaluates subset and held-out problems, stops at the target",
        },
    ),
    "grpo_overfit_max_gpu.py": (
        "grpo_overfit.py",
        {
            "Config": "--micro-batch-size auto",
            "PRESETS": "its own sizes",
            "Learner": "the micro-batch size in force",
            "update": "halves the micro-batch when memory ends",
            "save_checkpoint": "the micro-batch size in force",
            "restore_checkpoint": "the micro-batch size in force",
            "train_step": "metrics of the hardware",
            "main": "says what is left out without a GPU",
        },
    ),
}


def definitions(script: str) -> dict[str, str]:
    """Source of each function, class and constant at the top level, comments inside and decorators included."""
    source = (ROOT / script).read_text()
    lines = source.splitlines(keepends=True)
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            found[node.name] = "".join(lines[first - 1 : node.end_lineno])
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if isinstance(target, ast.Name):
                found[target.id] = "".join(lines[node.lineno - 1 : node.end_lineno])
    return found


@pytest.mark.parametrize("script", VARIANTS)
def test_shared_definitions_are_the_same_to_the_letter(script: str) -> None:
    original, exceptions = VARIANTS[script]
    parent, variant = definitions(original), definitions(script)
    report: list[str] = []
    for name in parent.keys() - exceptions.keys():
        lines = (parent[name].splitlines(keepends=True), variant.get(name, "").splitlines(keepends=True))
        report += difflib.unified_diff(*lines, f"{original}: {name}", f"{script}: {name}")
    assert not report, "copies have drifted; change all of them in one commit:\n" + "".join(report)


@pytest.mark.parametrize("script", VARIANTS)
def test_no_exception_outlives_its_need(script: str) -> None:
    original, exceptions = VARIANTS[script]
    parent, variant = definitions(original), definitions(script)
    unneeded = [name for name in exceptions if parent.get(name) == variant.get(name)]
    assert not unneeded, (
        f"{script} has these as in {original} (or neither has them): take them out of the table: {unneeded}"
    )


@pytest.mark.parametrize(("script", "most"), [("grpo_overfit.py", 120), ("grpo_overfit_max_gpu.py", 130)])
def test_the_difference_to_the_parent_is_short(script: str, most: int) -> None:
    """In changed lines as `diff` counts them: the difference is the variant's documentation."""
    original, _ = VARIANTS[script]
    before, after = ((ROOT / name).read_text().splitlines() for name in (original, script))
    changed = [line for line in difflib.unified_diff(before, after, n=0, lineterm="") if line[0] in "+-"]
    assert len(changed) - 2 <= most  # the first two name the files
