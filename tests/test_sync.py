"""A function that stands in several scripts is the same to the letter; the failure prints the difference."""

import ast
import difflib
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Variant: its parent, and the most lines that `diff parent variant` may mark with < or >.
PARENTS = {
    "grpo_ablations.py": ("grpo.py", 90),
    "grpo_ladder.py": ("grpo.py", 156),
    "grpo_scheduler.py": ("grpo.py", 130),
    "grpo_reasoning.py": ("grpo_ablations.py", 92),
    "grpo_overfit.py": ("grpo.py", 129),
    "grpo_overfit_max_gpu.py": ("grpo_overfit.py", 119),
}
# What may differ, with the reason. All else that the parent defines must be there unchanged.
EXCEPTIONS = {
    "grpo_ablations.py": {
        "Config": "--loss-type, --scale-rewards, --beta",
        "group_advantages": "--scale-rewards",
        "dr_grpo_loss": "--loss-type, --beta",
        "micro_batches": "a KL term has a gradient where the advantage is zero",
        "score": "length of right and of wrong completions",
        "main start": "the log-probs of a reference policy, the step's number of tokens, train/kl",
    },
    "grpo_ladder.py": {
        "Config PRESETS": "its own sizes; no --dataset-path and --test-path, as the tasks are generated",
        "arithmetic simple_math gsm8k read_jsonl TASKS": "its own tasks",
        "load_problems": "no files and no test split",
        "main": "--task all",
    },
    "grpo_scheduler.py": {
        "Config PRESETS TAG_PROMPT SMOLLM": "its own task, policy, rewards and sizes; no other model",
        "arithmetic simple_math TASKS": "its own task",
        "finish_step": "prints the mean score",
    },
    "grpo_reasoning.py": {
        "Config PRESETS SMOLLM": "its own task, policy and sizes; accuracy alone is rewarded, no prompt asks for tags",
        "arithmetic simple_math TASKS": "its own task",
        "score finish_step": "metrics of thought",
    },
    "grpo_overfit.py": {
        "Config PRESETS": "--num-samples, --target-accuracy, --gradient-checkpointing, its own sizes; no --test-path",
        "check_config": "--target-accuracy is at most 1",
        "arithmetic simple_math TASKS": "its own task",
        "load_problems KEPT": "a subset of --num-samples problems, no test split",
        "completion_hidden_states load_policy": "--gradient-checkpointing",
        "start": "evaluates both the subset and held-out problems",
        "main": "stops at the target, and says whether it was reached",
    },
    "grpo_overfit_max_gpu.py": {
        "Config PRESETS SMOLLM": "--micro-batch-size auto, its own sizes, for one large GPU",
        "main": "micro-batches that halve when memory ends, metrics of the hardware",
    },
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


@pytest.mark.parametrize("script", PARENTS)
def test_shared_definitions_are_the_same_to_the_letter(script: str) -> None:
    original, _ = PARENTS[script]
    parent, variant = definitions(original), definitions(script)
    excepted = " ".join(EXCEPTIONS[script]).split()
    report: list[str] = []
    for name in parent.keys() - set(excepted):
        lines = (parent[name].splitlines(keepends=True), variant.get(name, "").splitlines(keepends=True))
        report += difflib.unified_diff(*lines, f"{original}: {name}", f"{script}: {name}")
    assert not report, "copies have drifted; change all of them in one commit:\n" + "".join(report)
    unneeded = [name for name in excepted if parent.get(name) == variant.get(name)]
    assert not unneeded, f"{script} has these as in {original}, or neither has them: take them out of the table"


@pytest.mark.parametrize("script", PARENTS)
def test_the_difference_to_the_parent_is_short(script: str) -> None:
    """It is the variant's documentation."""
    original, most = PARENTS[script]
    done = subprocess.run(["diff", ROOT / original, ROOT / script], capture_output=True, text=True)
    assert len([line for line in done.stdout.splitlines() if line[0] in "<>"]) <= most
