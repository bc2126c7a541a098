"""A function that stands in several scripts is the same to the letter; the failure prints the difference."""

import ast
import difflib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PARENT = "grpo.py"
# Variant: what may differ from grpo.py, with the reason. All else that grpo.py defines must be there unchanged.
VARIANTS = {
    "grpo_ladder.py": {
        "Config": "no --dataset-path and --test-path: the tasks are generated",
        "arithmetic": "its own tasks",
        "simple_math": "its own tasks",
        "gsm8k": "its own tasks",
        "read_jsonl": "its own tasks",
        "TASKS": "its own tasks",
        "load_problems": "no files and no test split",
        "main": "--task all",
    }
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
    parent, variant = definitions(PARENT), definitions(script)
    report: list[str] = []
    for name in parent.keys() - VARIANTS[script].keys():
        lines = (parent[name].splitlines(keepends=True), variant.get(name, "").splitlines(keepends=True))
        report += difflib.unified_diff(*lines, f"{PARENT}: {name}", f"{script}: {name}")
    assert not report, "copies have drifted; change all of them in one commit:\n" + "".join(report)


@pytest.mark.parametrize("script", VARIANTS)
def test_no_exception_outlives_its_need(script: str) -> None:
    parent, variant = definitions(PARENT), definitions(script)
    unneeded = [name for name in VARIANTS[script] if parent.get(name) == variant.get(name)]
    assert not unneeded, (
        f"{script} has these as in {PARENT} (or neither has them): take them out of the table: {unneeded}"
    )
