"""run_overfit_experiments.py as a user calls it, most of the time with a stand-in for grpo_overfit.py beside it."""

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import grpo_overfit
import run_overfit_experiments as runner

ROOT = Path(__file__).resolve().parents[1]
NAMES = ["baseline", "aggressive", "memory_optimized", "ultra_small"]
# Exits with EXIT_{experiment}; if WAIT names it, after half a minute of ticks.
STAND_IN = """
import json, os, pathlib, signal, sys, time

flags = dict(zip(sys.argv, sys.argv[1:]))  # the last of a kind holds
experiment = pathlib.Path(flags["--run-dir"]).name
with open("started", "a") as file:
    file.write(experiment + "\\n")
print(experiment, "starts", flush=True)
time.sleep(0.1)
code = int(os.environ.get("EXIT_" + experiment, "0"))
if code in (1, 2):
    sys.exit(code)
run = pathlib.Path(flags["--run-dir"], f"grpo_overfit__mixed__tiny__1__{time.time_ns()}")
if "--resume" in flags:
    run = pathlib.Path(flags["--resume"])
    print("resumed", run.name)
else:
    run.mkdir()
    (run / "environment.json").write_text(json.dumps({"command": sys.argv}))
config = {"gradient_checkpointing": "--gradient-checkpointing" in sys.argv, "task": "mixed", "model": "models/tiny"}
config["seed"] = 1
for name in ("learning_rate", "num_samples", "num_generations", "num_epochs", "micro_batch_size"):
    config[name] = float(flags["--" + name.replace("_", "-")])
(run / "config.json").write_text(json.dumps(config))
subset, held_out = "eval/train_subset_accuracy", "eval/accuracy"
rows = [{"step": 0, subset: 0.25, held_out: 0.5}]
rows += [{"step": 1, "train/reward": 1.0, "perf/peak_memory_gb": 1.257}]
rows += [{"step": 2, "train/reward": 1.5, "perf/peak_memory_gb": 0.5, subset: 0.875, held_out: 0.625}]
text = "".join(json.dumps(row) + "\\n" for row in rows)
(run / "metrics.jsonl").write_text(text[:-20] if experiment == os.environ.get("CUT") else text)
signals = []
signal.signal(signal.SIGINT, lambda *_: signals.append("INT"))
signal.signal(signal.SIGTERM, lambda *_: signals.append("TERM"))
for _ in range(300 if experiment == os.environ.get("WAIT") else 0):
    print("tick", os.getpid(), flush=True)
    time.sleep(0.1)
    if signals:
        time.sleep(0.3)  # a second signal would come now
        print("stopped by", *signals)
        sys.exit(143)
if code < 0:
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the runner, report.py and the stand-in, in which they are called."""
    for name in ("run_overfit_experiments.py", "report.py", "report.html.jinja", "rewards.py"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "grpo_overfit.py").write_text(STAND_IN, encoding="utf-8")
    return tmp_path


def start(folder: Path, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    command = [sys.executable, "run_overfit_experiments.py", *arguments]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    return subprocess.Popen(command, cwd=folder, env=os.environ | variables, **pipes)


def call(folder: Path, *arguments: str, preset: str = "tiny", **variables: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    process = start(folder, "--preset", preset, *arguments, **variables)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def started(folder: Path) -> list[str]:
    """The experiments started since the last call of this function."""
    path = folder / "started"
    names = path.read_text(encoding="utf-8").split() if path.exists() else []
    path.unlink(missing_ok=True)
    return names


def table_rows(text: str) -> dict[str, list[str]]:
    """The cells of the Markdown table in `text`, by their row's first one."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {row[0]: row[1:] for row in rows}


@pytest.fixture
def waiting(folder: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A runner whose second experiment runs until it is stopped: (its process, the pid of the experiment)."""
    process = start(folder, "--preset", "tiny", WAIT="aggressive")
    assert process.stdout is not None
    tick = next(line for line in process.stdout if line.startswith("tick "))  # seen while it still runs
    pid = int(tick.split()[1])
    yield process, pid
    process.kill()
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    process.communicate()


@pytest.mark.parametrize("preset", ["qwen", "tiny"])
def test_commands_are_understood_by_grpo_overfit(preset: Any) -> None:
    for name, settings in runner.EXPERIMENTS[preset].items():
        command = runner.make_command(preset, name, ["--eval-every", "7", "--run-dir", "x"], Path("r/s"))
        parsed = grpo_overfit.parse_config(command[2:])
        assert {setting: getattr(parsed, setting) for setting in settings} == settings
        assert (parsed.preset, parsed.eval_every, parsed.run_dir) == (preset, 7, "r/s")
        grpo_overfit.check_config(parsed)
        assert parsed.prompts_per_step <= parsed.num_samples  # a step without a repeated problem


def test_a_dry_run_prints_four_commands_and_an_unknown_name_is_refused(folder: Path) -> None:
    """Neither starts anything."""
    before = sorted(folder.iterdir())
    code, out, err = call(folder, "--only", "baseline", "basline")
    assert (code, out, "basline" in err) == (2, "", True)
    code, out, err = call(folder, "--dry-run", "--", "--rewards", "accuracy=1", "x y", preset="qwen")
    assert (code, err) == (0, "")
    assert sorted(folder.iterdir()) == before
    assert out.splitlines()[0::2] == [f"# {name}: to run" for name in NAMES]
    commands = [shlex.split(line) for line in out.splitlines()[1::2]]
    for name, command in zip(NAMES, commands, strict=True):
        assert command[:2] == [sys.executable, str(folder / "grpo_overfit.py")]
        assert command[2:4] == ["--preset", "qwen"]
        assert command[-5:] == ["--rewards", "accuracy=1", "x y", "--run-dir", f"runs/overfit/{name}"]


def test_goes_on_after_a_failure_and_tells_it_in_the_table(folder: Path) -> None:
    codes = {"EXIT_aggressive": "1", "EXIT_memory_optimized": "6", "EXIT_ultra_small": "-9"}
    code, out, err = call(folder, CUT="ultra_small", **codes)
    assert (code, err, started(folder)) == (1, "", NAMES)
    sweep = folder / "runs" / "overfit"
    text = (sweep / "table.md").read_text(encoding="utf-8")
    assert text in out
    assert len({len(line) for line in text.splitlines()}) == 1  # aligned
    rows = table_rows(text)
    seconds = json.loads((sweep / "baseline" / "result.json").read_text())["seconds"]
    measured = ["0.250 -> 0.875", "0.500 -> 0.625", "1.257"]
    assert rows["baseline"] == ["0.00015", "100", "16", "150", "1024", "0", "2", seconds, *measured, "reached"]
    assert rows["aggressive"][:7] == ["-"] * 7
    assert rows["aggressive"][8:] == ["-", "-", "-", "failed, exit 1"]
    assert rows["memory_optimized"][4:6] == ["64", "1"]  # with gradient checkpointing
    assert rows["memory_optimized"][8:] == [*measured, "missed"]
    cut = ["0.250", "0.500", "1.257", "failed, exit -9"]  # its last line is not whole
    assert [rows["ultra_small"][6], *rows["ultra_small"][8:]] == ["1", *cut]
    assert (sweep / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    html = (sweep / "report.html").read_text(encoding="utf-8").replace("\u00a0", " ")
    assert all(text in html for text in ("failed, exit 1", "baseline (reached)", "ultra_small (failed, exit -9)"))
    # Again: what is complete is skipped, its exit code still counts; what failed is run anew. One log cannot be read.
    (log,) = sweep.glob("baseline/grpo*/metrics.jsonl")
    log.write_text("{\n" + log.read_text())
    code, out, err = call(folder)
    assert (code, started(folder)) == (6, ["aggressive", "ultra_small"])
    assert "# memory_optimized: complete, skipped\n" in out
    assert err.count("\n") == 1
    assert "metrics.jsonl: line 1 is not JSON" in err
    rows = table_rows(out)
    assert [rows[name][8] for name in NAMES] == ["-", *measured[:1] * 3]
    # A report that fails does not fail the sweep.
    (folder / "report.py").write_text("raise SystemExit(3)")
    assert call(folder)[0] == 6


def test_commands_come_first_and_a_second_call_skips_what_is_complete_with_the_same_settings(folder: Path) -> None:
    further = ["--", "--eval-every", "7"]
    code, out, err = call(folder, *further, EXIT_baseline="6")
    assert (code, err, started(folder)) == (6, "", NAMES)
    lines = out.splitlines()
    commands = [line for line in lines if line.startswith(sys.executable)]
    assert lines.index(commands[3]) < lines.index("baseline starts")
    for name, command in zip(NAMES, commands, strict=True):
        own = folder / "runs" / "overfit" / name
        assert (own / "log.txt").read_text() == f"{command}\n{name} starts\n"
        result = json.loads((own / "result.json").read_text())
        assert 0 <= float(result.pop("seconds")) < 60
        (run,) = own.glob("grpo_overfit__*")
        end = {"exit_code": 6 if name == "baseline" else 0, "run_folder": run.name}
        assert result == {"name": name, "command": shlex.split(command), **end}
    (folder / "runs/overfit/memory_optimized/result.json").unlink()
    code, out, _ = call(folder, "--only", "aggressive", "memory_optimized", *further)
    assert (code, started(folder)) == (0, ["memory_optimized"])  # the exit code is that of the selected ones
    assert list(table_rows(out))[2:] == NAMES
    code, out, _ = call(folder, "--only", "ultra_small", "--", "--eval-every", "8", EXIT_ultra_small="2")
    assert (code, started(folder)) == (1, ["ultra_small"])
    assert "# ultra_small: to run\n" in out
    assert table_rows(out)["ultra_small"][-1] == "reached"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_experiment_and_the_same_call_continues(
    folder: Path, waiting: tuple[subprocess.Popen[str], int], number: int
) -> None:
    process, pid = waiting
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as the terminal does on Ctrl-C
    else:
        process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert started(folder) == ["baseline", "aggressive"]
    assert not (folder / "runs/overfit/aggressive/result.json").exists()
    assert process.returncode == 128 + number
    assert not psutil.pid_exists(pid)
    assert out.splitlines()[-1] == "stopped by TERM"  # one signal, in its own time, and its last words are shown
    assert err == "stopped; the same command continues\n"
    code, out, _ = call(folder)
    assert (code, started(folder)) == (0, NAMES[1:])
    assert "# baseline: complete, skipped\n" in out
    assert "# aggressive: to run\n" in out
    (run,) = (folder / "runs/overfit/aggressive").glob("grpo_overfit__*")
    assert out.count("resumed") == out.count(f"resumed {run.name}\n") == 1
    seconds = {name: row[7] for name, row in table_rows(out).items()}
    assert seconds["aggressive"].endswith("+")  # those of the last part
    assert not seconds["baseline"].endswith("+")


@pytest.mark.slow
def test_a_real_experiment(tmp_path: Path) -> None:
    """Few steps from start to table."""
    flags = ["--num-samples", "8", "--prompts-per-step", "8", "--num-epochs", "2", "--num-generations", "4"]
    flags += ["--eval-samples", "8", "--target-accuracy", "1.0"]
    only = ["--only", "memory_optimized", "--run-dir", str(tmp_path)]
    code, out, err = call(ROOT, *only, "--", *flags, OMP_NUM_THREADS="1")
    assert code in (0, 6), out + err
    (cells,) = list(table_rows(out).values())[2:]
    assert cells[:7] == ["0.00015", "8", "4", "2", "64", "1", "2"]
    assert all(" -> " in cell for cell in cells[8:10])
