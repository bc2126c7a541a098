"""run_overfit_experiments.py as a user calls it, most of the time with a stand-in for grpo_overfit.py beside it."""

import json
import os
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

import run_overfit_experiments as runner

ROOT = Path(__file__).resolve().parents[1]
NAMES = ["baseline", "aggressive", "memory_optimized", "ultra_small"]
# Exits with EXIT_{experiment}; if WAIT names it, after half a minute of ticks, which together would fit in a buffer.
STAND_IN = """
import json, os, pathlib, signal, sys, time

flags = dict(zip(sys.argv, sys.argv[1:]))  # the last of a kind holds
experiment = pathlib.Path(flags["--run-dir"]).name
with open("started", "a") as file:
    file.write(experiment + "\\n")
print(experiment, "starts")
time.sleep(0.2)
code = int(os.environ.get("EXIT_" + experiment, "0"))
if code == 2:
    print("error: bad input", file=sys.stderr)
    sys.exit(2)
run = pathlib.Path(flags["--run-dir"], f"grpo_overfit__mixed__tiny_policy__1__{time.time_ns()}")
if "--resume" in flags:
    run = pathlib.Path(flags["--resume"])
    print("resumed", run.name)
else:
    run.mkdir()
    (run / "environment.json").write_text(json.dumps({"command": sys.argv}))
names = {"learning_rate": float, "num_samples": int, "num_generations": int, "num_epochs": int, "micro_batch_size": int}
config = {name: convert(flags["--" + name.replace("_", "-")]) for name, convert in names.items()}
config |= {"gradient_checkpointing": "--gradient-checkpointing" in sys.argv, "task": "mixed", "model": "a/tiny_policy"}
(run / "config.json").write_text(json.dumps(config | {"seed": int(flags["--seed"])}))
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
    print("tick", os.getpid())
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
    """A folder with the runner and the stand-in, in which they are called."""
    shutil.copy(ROOT / "run_overfit_experiments.py", tmp_path)
    (tmp_path / "grpo_overfit.py").write_text(STAND_IN, encoding="utf-8")
    return tmp_path


def start(folder: Path, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    command = [sys.executable, "run_overfit_experiments.py", *arguments]
    variables["PYTHONUNBUFFERED"] = ""  # not set
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    return subprocess.Popen(command, cwd=folder, env=os.environ | variables, **pipes)


def call(folder: Path, *arguments: str, preset: str = "tiny", **variables: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    process = start(folder, "--preset", preset, *arguments, **variables)
    out, err = process.communicate(timeout=120)
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


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_for_tick(process: subprocess.Popen[str]) -> tuple[str, int]:
    """(what the runner has shown so far, pid of the experiment that waits): a tick is seen while it still runs."""
    seen = ""
    assert process.stdout is not None
    for line in process.stdout:
        seen += line
        if line.startswith("tick "):
            return seen, int(line.split()[1])
    raise AssertionError(seen)


@pytest.fixture
def waiting(folder: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A runner whose second experiment runs until it is stopped: (its process, the pid of the experiment)."""
    process = start(folder, "--preset", "tiny", WAIT="aggressive")
    seen, pid = wait_for_tick(process)
    assert "==> aggressive" in seen
    yield process, pid
    for each in (process.pid, pid):
        if alive(each):
            os.kill(each, signal.SIGKILL)
    process.communicate()


# What is run


def test_qwen_experiments_are_what_they_are_named_after() -> None:
    baseline, aggressive, memory, small = (runner.EXPERIMENTS["qwen"][name] for name in NAMES)
    assert baseline["learning_rate"] == 5e-6
    assert aggressive["learning_rate"] == 1e-4
    assert aggressive["num_generations"] > baseline["num_generations"]
    assert aggressive["num_epochs"] > baseline["num_epochs"]
    assert memory["gradient_checkpointing"] is True
    assert memory["micro_batch_size"] < baseline["micro_batch_size"]
    speed = {"micro_batch_size", "gradient_checkpointing"}  # all else is the baseline's
    assert {name for name in baseline if memory[name] != baseline[name]} == speed
    assert small["num_samples"] == 10
    assert [baseline[name] for name in ("num_samples", "gradient_checkpointing")] == [100, False]


@pytest.mark.parametrize("preset", ["qwen", "tiny"])
@pytest.mark.parametrize("name", NAMES)
def test_commands_are_understood_by_grpo_overfit(preset: Any, name: str) -> None:
    import grpo_overfit

    settings = runner.EXPERIMENTS[preset][name]
    assert settings.keys() == runner.EXPERIMENTS["qwen"]["baseline"].keys()
    config = runner.Config(preset=preset, sweep="s", run_dir="r", seed=3)
    command = runner.make_command(config, preset, name, ["--eval-every", "7"])
    parsed = grpo_overfit.parse_config(command[2:])
    assert {setting: getattr(parsed, setting) for setting in settings} == settings
    assert (parsed.preset, parsed.seed, parsed.eval_every) == (preset, 3, 7)
    assert Path(parsed.run_dir) == Path("r", "s", name)
    grpo_overfit.check_config(parsed)
    assert parsed.prompts_per_step <= parsed.num_samples  # a step without a repeated problem


def test_dry_run_prints_four_commands_and_starts_nothing(folder: Path) -> None:
    before = sorted(folder.iterdir())
    code, out, err = call(folder, "--dry-run", "--seed", "2", "--", "--rewards", "accuracy=1", "x y", preset="qwen")
    assert (code, err) == (0, "")
    assert sorted(folder.iterdir()) == before
    assert out.splitlines()[0::2] == [f"# {name}: never finished" for name in NAMES]
    commands = [shlex.split(line) for line in out.splitlines()[1::2]]
    assert commands[0] == [
        sys.executable, str(folder / "grpo_overfit.py"), "--preset", "qwen", "--seed", "2",
        "--run-dir", "runs/overfit/baseline", "--learning-rate", "5e-06", "--num-samples", "100",
        "--num-epochs", "30", "--num-generations", "8", "--prompts-per-step", "25", "--micro-batch-size", "32",
        "--no-gradient-checkpointing", "--rewards", "accuracy=1", "x y"]  # fmt: skip
    assert [command[7] for command in commands] == [f"runs/overfit/{name}" for name in NAMES]
    assert "--gradient-checkpointing" in commands[2]


@pytest.mark.parametrize(("cuda", "preset"), [(True, "qwen"), (False, "tiny")])
def test_auto_takes_qwen_where_cuda_is(folder: Path, cuda: bool, preset: str) -> None:
    stand_in = f"class cuda:\n    is_available = staticmethod(lambda: {cuda})\n"
    (folder / "torch.py").write_text(stand_in, encoding="utf-8")
    code, out, _ = call(folder, "--dry-run", preset="auto")
    assert code == 0
    assert out.count(f"--preset {preset} ") == 4


def test_only_some(folder: Path) -> None:
    code, out, _ = call(folder, "--only", "ultra_small", "baseline", "--sweep", "two", "--run-dir", "elsewhere")
    assert code == 0
    assert started(folder) == ["baseline", "ultra_small"]
    assert sorted(path.name for path in (folder / "elsewhere" / "two").iterdir()) == [
        "baseline", "curves.png", "table.md", "ultra_small"]  # fmt: skip
    assert list(table_rows(out))[2:] == ["baseline", "ultra_small"]


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (["--only", "baseline", "basline"], f"'basline': --only takes any of {', '.join(NAMES)}"),
        (["--", "--track", "--run_dir=x"], "--run-dir after --"),
    ],
)
def test_bad_input_is_one_line(folder: Path, arguments: list[str], cause: str) -> None:
    code, out, err = call(folder, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert cause in err
    assert err.count("\n") == 1
    assert started(folder) == []


def test_importing_does_nothing(folder: Path) -> None:
    command = [sys.executable, "-B", "-c", "import run_overfit_experiments", "--no-such-flag"]
    before = sorted(folder.iterdir())
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert sorted(folder.iterdir()) == before


# Running, failing, going on


def test_all_commands_come_first_then_output_live_and_in_the_log(folder: Path) -> None:
    code, out, err = call(folder, "--", "--eval-every", "7")
    assert (code, err) == (0, "")
    assert started(folder) == NAMES
    lines = out.splitlines()
    commands = [i for i, line in enumerate(lines) if line.startswith(sys.executable)]
    assert len(commands) == 4
    assert max(commands) < lines.index("baseline starts")
    for i, name in enumerate(NAMES):
        sweep = folder / "runs" / "overfit"
        assert (sweep / name / "log.txt").read_text() == f"{lines[commands[i]]}\n{name} starts\n"
        result = json.loads((sweep / name / "result.json").read_text())
        assert shlex.join(result.pop("command")) == lines[commands[i]]
        assert 0.2 <= result.pop("seconds") < 60
        (run,) = (sweep / name).glob("grpo_overfit__*")
        assert result == {"exit_code": 0, "run_folder": run.name, "resumed": False}


@pytest.mark.parametrize(
    ("codes", "expected"),
    [({"aggressive": 6}, 6), ({"baseline": 2, "aggressive": 3, "memory_optimized": -9, "ultra_small": 6}, 1)],
)
def test_goes_on_after_a_failure_and_tells_it_at_the_end(folder: Path, codes: dict[str, int], expected: int) -> None:
    variables = {f"EXIT_{name}": str(code) for name, code in codes.items()}
    code, out, _ = call(folder, **variables)
    assert code == expected
    assert started(folder) == NAMES
    words = {0: "reached", 6: "missed", -9: "failed (exit 137)"}
    expected_words = [words.get(codes.get(name, 0), f"failed (exit {codes.get(name)})") for name in NAMES]
    assert [table_rows(out)[name][-1] for name in NAMES] == expected_words
    # Again: what is complete is skipped, its exit code still counts; what failed is run anew.
    failed = [name for name in NAMES if codes.get(name, 0) not in (0, 6)]
    code, out, _ = call(folder)
    assert code == (6 if 6 in codes.values() else 0)
    assert started(folder) == failed
    for name in failed:
        assert f"# {name}: failed with exit code {abs(codes[name]) + 128 * (codes[name] < 0)}\n" in out


def test_second_call_skips_what_is_complete_with_the_same_settings(folder: Path) -> None:
    further = ["--", "--eval-every", "7"]
    assert call(folder, *further, EXIT_baseline="6")[0] == 6
    assert started(folder) == NAMES
    result = folder / "runs/overfit/memory_optimized/result.json"
    result.rename(result.with_name("result.json.partial"))  # as a kill between writing and renaming leaves it
    moved = folder / "runs/overfit/aggressive/result.json"
    moved.write_text(moved.read_text().replace(sys.executable, "/another/python").replace(str(folder), "/another"))
    code, out, _ = call(folder, "--only", "aggressive", "memory_optimized", *further)
    assert (code, started(folder)) == (0, ["memory_optimized"])  # the exit code is that of the selected ones
    assert list(table_rows(out))[2:] == NAMES
    code, out, _ = call(folder, "--only", "ultra_small", "--", "--eval-every", "8", EXIT_ultra_small="2")
    assert (code, started(folder)) == (1, ["ultra_small"])
    assert "# ultra_small: its settings differ from those of the finished run\n" in out
    assert "ultra_small: refused (exit 2), its earlier result stays\n" in out
    assert table_rows(out)["ultra_small"][-1] == "reached"
    code, out, _ = call(folder, "--only", "ultra_small", "--", "--eval-every", "9", EXIT_ultra_small="4")
    assert (code, started(folder)) == (1, ["ultra_small"])
    assert table_rows(out)["ultra_small"][-1] == "failed (exit 4)"  # not the old run's, which is kept
    assert len(list((folder / "runs/overfit/ultra_small").glob("grpo_overfit__*"))) == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_experiment_and_the_line_printed_continues(
    folder: Path, waiting: tuple[subprocess.Popen[str], int], number: int
) -> None:
    process, pid = waiting
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as the terminal does on Ctrl-C
    else:
        process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert not alive(pid)
    assert out.splitlines()[-1] == "stopped by TERM"  # one signal, in its own time, and its last words are shown
    assert started(folder) == ["baseline", "aggressive"]
    assert not (folder / "runs/overfit/aggressive/result.json").exists()
    assert err == "stopped; to continue: uv run run_overfit_experiments.py --preset tiny\n"
    process = start(folder, *shlex.split(err.split(": ")[1])[3:])
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "# baseline: complete, skipped\n" in out
    assert "# aggressive: never finished\n" in out
    assert started(folder) == NAMES[1:]
    (run,) = (folder / "runs/overfit/aggressive").glob("grpo_overfit__*")
    assert out.count("resumed") == out.count(f"resumed {run.name}\n") == 1
    assert table_rows(out)["aggressive"][6].endswith("+")  # the seconds are those of the last part
    assert not table_rows(out)["baseline"][6].endswith("+")


def test_after_a_kill_the_second_call_continues(folder: Path, waiting: tuple[subprocess.Popen[str], int]) -> None:
    process, pid = waiting
    process.kill()
    process.communicate()
    assert started(folder) == ["baseline", "aggressive"]
    assert call(folder)[0] == 0
    assert started(folder) == NAMES[1:]
    (run,) = (folder / "runs/overfit/aggressive").glob("grpo_overfit__*")
    result = json.loads((folder / "runs/overfit/aggressive/result.json").read_text())
    assert (result["run_folder"], result["resumed"]) == (run.name, True)
    assert "--resume" not in result["command"]
    deadline = time.monotonic() + 30
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(pid)  # the line that nobody reads any more ended it


# The comparison


def test_table_and_picture(folder: Path) -> None:
    code, out, err = call(
        folder, EXIT_aggressive="2", EXIT_memory_optimized="6", EXIT_ultra_small="4", CUT="ultra_small"
    )
    assert (code, err) == (1, "")
    sweep = folder / "runs" / "overfit"
    text = (sweep / "table.md").read_text(encoding="utf-8")
    assert text in out
    assert len({len(line) for line in text.splitlines()}) == 1  # aligned
    rows = table_rows(text)
    for name in NAMES:
        seconds = json.loads((sweep / name / "result.json").read_text())["seconds"]
        assert rows[name][6] == f"{seconds:.0f}"
        rows[name][6] = ""
    assert rows["experiment"] == ["lr", "problems", "generations", "epochs", "micro-batch", "steps", "seconds",
                                  "subset accuracy", "held-out accuracy", "peak GB", "status"]  # fmt: skip
    flags = runner.EXPERIMENTS["tiny"]

    def settings(name: str, more: str) -> list[str]:
        keys = ("learning_rate", "num_samples", "num_generations", "num_epochs", "micro_batch_size")
        values = [f"{flags[name][key]:g}" for key in keys]
        return [*values[:-1], values[-1] + more]

    measured = ["2", "", "0.250 -> 0.875", "0.500 -> 0.625", "1.26"]
    assert rows["baseline"] == [*settings("baseline", ""), *measured, "reached"]
    assert rows["aggressive"] == [*["-"] * 6, "", "-", "-", "-", "failed (exit 2)"]  # it has made no run folder
    assert rows["memory_optimized"] == [*settings("memory_optimized", " gc"), *measured, "missed"]
    cut = ["1", "", "0.250 -> -", "0.500 -> -", "1.26", "failed (exit 4)"]  # its last line is not whole
    assert rows["ultra_small"] == [*settings("ultra_small", ""), *cut]
    png = (sweep / "curves.png").read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", png[16:24]) == (1300, 600)
    assert len(png) > 20_000


def ended(name: str, code: int, steps: list[int], subset: list[float], held_out: list[float]) -> runner.Ended:
    rows: list[dict[str, Any]] = [
        {"step": step, runner.SUBSET: a, runner.HELD_OUT: b} for step, a, b in zip(steps, subset, held_out, strict=True)
    ]
    config = {"task": "mixed", "model": "org/tiny_$\\x$", "seed": 3}
    return runner.Ended(name, {"exit_code": code}, config, [*rows, {"step": 9, "train/reward": 1.0}])


def test_every_experiment_is_a_line_of_its_own_in_both_panels() -> None:
    """The second stands still, the third coincides with the first, the fourth measured nothing."""
    first = ([0, 4, 8], [0.25, 0.5, 1.0], [0.5, 0.5, 0.25])
    experiments = [
        ended("a", 0, *first),
        ended("b", 6, [0], [0.0], [0.0]),
        ended("c", 0, *first),
        ended("d", 4, [], [], []),
    ]
    figure = runner.draw(experiments, ["a", "b", "c", "d"])
    assert figure.get_suptitle().endswith("mixed, tiny_$\\x$, seed 3")
    for axes, expected in zip(figure.axes, first[1:], strict=True):
        lines = axes.lines
        assert [np.asarray(line.get_xdata()).tolist() for line in lines] == [[0, 4, 8], [0], [0, 4, 8], []]
        assert np.asarray(lines[0].get_ydata()).tolist() == np.asarray(lines[2].get_ydata()).tolist() == expected
        widths = [line.get_linewidth() for line in lines]
        assert widths == sorted(widths, reverse=True)
        assert (
            len(set(widths))
            == len({line.get_color() for line in lines})
            == len({line.get_marker() for line in lines})
            == 4
        )
        assert axes.get_ylim() == (0, 1.02)
        assert axes.get_xlim()[0] == 0
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "a: reached",
        "b: missed",
        "c: reached",
        "d: failed (exit 4)",
    ]
    colors = [line.get_color() for line in runner.draw(experiments[1:], ["a", "b", "c", "d"]).axes[0].lines]
    assert colors == [line.get_color() for line in figure.axes[0].lines[1:]]  # a colour does not depend on --only


# The real script


@pytest.mark.slow
def test_two_real_experiments(tmp_path: Path) -> None:
    """Few steps from start to table; the second call finds both complete."""
    command = [sys.executable, str(ROOT / "run_overfit_experiments.py"), "--preset", "tiny"]
    command += ["--only", "memory_optimized", "ultra_small", "--run-dir", str(tmp_path)]
    further = ["--num-samples", "8", "--prompts-per-step", "8", "--num-epochs", "2", "--num-generations", "4"]
    further += ["--eval-samples", "8", "--target-accuracy", "1.0", "--micro-batch-size", "16"]
    done = subprocess.run([*command, "--", *further], capture_output=True, text=True)
    assert done.returncode in (0, 6), done.stdout + done.stderr
    rows = table_rows(done.stdout)
    for name, micro_batch in (("memory_optimized", "16 gc"), ("ultra_small", "16")):
        rate = f"{runner.EXPERIMENTS['tiny'][name]['learning_rate']:g}"
        assert rows[name][:6] == [rate, "8", "4", "2", micro_batch, "2"]
        assert float(rows[name][9]) > 0.1
        (run,) = (tmp_path / "overfit" / name).glob("grpo_overfit__*")
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for cell, key in zip(rows[name][7:9], (runner.SUBSET, runner.HELD_OUT), strict=True):
            assert cell == f"{lines[0][key]:.3f} -> {lines[-1][key]:.3f}"
    again = subprocess.run([*command, "--", *further], capture_output=True, text=True)
    assert again.returncode == done.returncode
    assert again.stdout.count(": complete, skipped\n") == 2
    assert table_rows(again.stdout) == rows
