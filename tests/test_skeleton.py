"""What holds for the repository as a whole: settings, secrets, data, size of the scripts, the checks of .ci/run."""

import ast
import io
import json
import os
import re
import shutil
import subprocess
import tokenize
from pathlib import Path

import pytest
from dotenv import dotenv_values

from tests.test_sync import PARENTS

ROOT = Path(__file__).resolve().parent.parent
# Lines and characters of code. A limit on lines alone is met by packing them.
LIMITS = {
    "grpo.py": (720, 36_300), "rewards.py": (260, 13_000), "report.py": (450, 23_000),
    "run_overfit_experiments.py": (115, 5_100),
}  # fmt: skip
VARIABLES = ["WANDB_ENTITY", "WANDB_PROJECT", "WANDB_API_KEY", "HF_HOME", "REMOTE_HOST", "REMOTE_DIR"]


def code_size(source: str) -> tuple[int, int]:
    """Lines that hold code and their characters, without indentation: blank lines, comments and docstrings (or other
    bare strings) are not counted."""
    strings: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            strings |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in layout:
            code |= set(range(token.start[0], token.end[0] + 1))
    lines = source.split("\n")
    return len(code - strings), sum(len(lines[number - 1].strip()) for number in code - strings)


def repository_files() -> list[Path]:
    """Every file that is tracked, or would be by `git add .`."""
    if not shutil.which("git") or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return [ROOT / name for name in listed if name and (ROOT / name).is_file()]


def test_env_example_names_each_variable_with_a_comment_and_no_value() -> None:
    text = (ROOT / ".env.example").read_text(encoding="utf-8")
    found = re.findall(r"^# \w.{10}.*\n(?:# )?([A-Z][A-Z_]*)=$", text, re.MULTILINE)
    assert found == VARIABLES == re.findall(r"^(?:# )?([A-Z][A-Z_]*)=", text, re.MULTILINE)
    # python-dotenv sets an empty line's variable to "", and HF_HOME="" puts cache and login in the current folder.
    assert "HF_HOME" not in dotenv_values(ROOT / ".env.example")
    assert {".env", "runs/", "wandb/"} <= set((ROOT / ".gitignore").read_text(encoding="utf-8").splitlines())


@pytest.mark.parametrize("failing", ["sync --locked", "run mypy", "run pytest", "nothing"])
def test_ci_runs_every_check_until_one_fails(tmp_path: Path, failing: str) -> None:
    """A copy of .ci/run beside shared/gsm8k, called from another folder, with a `uv` that only tells of its calls."""
    script, fake = tmp_path / "repo" / ".ci" / "run", tmp_path / "bin" / "uv"
    for folder in (script.parent, fake.parent, tmp_path / "shared" / "gsm8k"):
        folder.mkdir(parents=True)
    shutil.copy(ROOT / ".ci" / "run", script)
    (script.parents[1] / "models" / "SmolLM2-135M-Instruct").mkdir(parents=True)  # fetched already
    for tool in ("sshd", "tmux", "rsync", "shellcheck", "chromium"):  # there already: nothing is installed
        (fake.parent / tool).symlink_to("/bin/sh")
    told = f'#!/bin/sh\necho "$PWD|$GSM8K_DIR|uv $*" >> "{tmp_path}/calls"\n[ "$*" != "{failing}" ]\n'
    fake.write_text(told, encoding="utf-8")
    fake.chmod(0o755)
    environment = {key: value for key, value in os.environ.items() if key != "GSM8K_DIR"}
    environment["PATH"] = f"{fake.parent}{os.pathsep}{environment['PATH']}"
    done = subprocess.run([script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    checks = ["sync --locked", "run ruff check", "run ruff format --check", "run mypy", "run pytest"]
    expected = checks[: checks.index(failing) + 1] if failing in checks else checks
    calls = (tmp_path / "calls").read_text(encoding="utf-8").splitlines()
    assert calls == [f"{tmp_path / 'repo'}|{tmp_path / 'shared' / 'gsm8k'}|uv {check}" for check in expected]
    assert done.returncode == (failing in checks)
    assert f"==> uv {expected[-1]}\n" in done.stdout


def test_no_data_and_no_weights_but_the_embedded_policies() -> None:
    files = repository_files()
    assert ROOT / "grpo.py" in files
    weights = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".npz"}
    policies = [ROOT / "models" / name for name in ("tiny", "reasoning", "scheduler")]
    embedded = [path for path in files if path.parent in policies]
    assert sum(path.stat().st_size for path in embedded if path.suffix in weights) < 8e6
    elsewhere = [path for path in files if path not in embedded]
    assert [path for path in files if path.suffix in {".jsonl", ".parquet", ".arrow"}] == []
    assert [path for path in elsewhere if path.suffix in weights or path.stat().st_size > 1e6] == []


@pytest.mark.parametrize("name", [*LIMITS, *PARENTS])
def test_scripts_can_be_read(name: str) -> None:
    """A variant may have 60 lines and 3,500 characters more than its parent."""
    source = (ROOT / name).read_text(encoding="utf-8")
    lines, characters = code_size(source)
    limit = LIMITS.get(name, (0, 0))
    if name in PARENTS:
        parent = code_size((ROOT / PARENTS[name][0]).read_text(encoding="utf-8"))
        limit = parent[0] + 60, parent[1] + 3_500
    assert (lines <= limit[0], characters <= limit[1]) == (True, True), (lines, characters)
    assert name == "rewards.py" or not [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.NamedExpr)]


@pytest.mark.parametrize("name", ["grpo.py", *PARENTS])
def test_the_algorithm_comes_first(name: str) -> None:
    """Who stops at the end of the loop has read all that an experiment changes."""
    lines = (ROOT / name).read_text(encoding="utf-8").split("\n")
    starts = ("def main(", "        for step in ", "# Plumbing")
    main, loop, plumbing = ([i for i, line in enumerate(lines, 1) if line.startswith(start)] for start in starts)
    assert main < loop < plumbing
    assert [len(found) for found in (main, loop, plumbing)] == [1, 1, 1]
    assert name != "grpo.py" or (loop[0] < 640 and plumbing[0] < 760)


def test_what_else_is_read_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1500
    for name, most in (("CLAUDE.md", 90), ("remote_train.sh", 360), ("report.html.jinja", 250)):
        assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= most
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in ROOT.glob("tests/**/*.py")) <= 5500


def test_figures_that_stand_on_two_pages_are_those_of_the_runs() -> None:
    pages = [(ROOT / name).read_text() for name in ("README.md", "docs/real_model.md", "benchmarks/RESULTS.md")]
    assert all(ratio in page for ratio in ("7.2 (6.0 to 7.4)", "3.1 (1.6 to 4.9)") for page in pages)
    for task in ("simple_math", "arithmetic", "echo", "comparison", "counting", "pattern", "binary", "word_problem"):
        rows = [json.loads((ROOT / f"docs/real_model/{task}_{seed}.json").read_text())["rows"][-1] for seed in "123"]
        seeds = ", ".join(f"{row.get('eval/accuracy', row.get('eval/train_subset_accuracy')):.2f}" for row in rows)
        assert [f"| {seeds} |" in page for page in pages[:2]] == [task in ("simple_math", "arithmetic", "echo"), True]
