"""Four ways to overfit a small subset: runs grpo_overfit.py with each, one after another, and compares them.

    uv run run_overfit_experiments.py --dry-run         # prints the commands and stops
    uv run run_overfit_experiments.py                   # qwen preset if CUDA is available, else tiny (CPU)
    uv run run_overfit_experiments.py --only baseline ultra_small
    uv run run_overfit_experiments.py -- --seed 2 --track
                                                        # flags after -- go to every experiment and override its own

An experiment is a subprocess with its own folder, runs/{sweep}/{experiment}/: log.txt is what it printed, result.json
says how it ended, and its run folders are next to them. If one fails, the next one still starts. At the end report.py
prints a table of all experiments and writes table.md, curves.png and report.html into the sweep's folder.

Run the same command again to continue. With the same flags it skips experiments that are complete and resumes those
that were stopped, killed or failed; it starts the others again. It does not notice changed code or data: then give
another --sweep. Ctrl-C, SIGTERM and a closed terminal also stop the running experiment, which saves first. If this
script gets a SIGKILL, the experiment ends when it next prints. --preset must come before the --.

Exit codes: 0 every selected experiment reached its target, 1 one failed, 2 bad input, 6 none failed but one missed its
target, 128 + n after signal n.
"""

import json
import shlex
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE, STDOUT, Popen, call
from typing import Any, Literal, get_args

import tyro

Name = Literal["baseline", "aggressive", "memory_optimized", "ultra_small"]
Settings = dict[str, float | bool]
Row = dict[str, Any]

# ----------------------------------------------------------------------------------------------------------------------
# Config


@dataclass(frozen=True)
class Config:
    """What to run and where. Flags of grpo_overfit.py for every experiment come after --, as in -- --track."""

    preset: Literal["auto", "qwen", "tiny"] = "auto"
    """Which experiments, and the preset of grpo_overfit.py that they start from. auto: qwen if CUDA is available, else
    tiny."""
    only: tuple[Name, ...] = get_args(Name)
    """The experiments to run."""
    dry_run: bool = False
    """Print the commands and stop."""
    sweep: str = "overfit"
    """Name of the folder of these experiments. Use another name for another preset, seed or data set: in the same
    folder its results replace the old ones."""
    run_dir: str = "runs"
    """Folder in which the sweep's folder is made."""


# The settings in which the experiments differ. All are given as flags, so a command can be read without the presets.
QWEN: Settings = {"learning_rate": 5e-6, "num_samples": 100, "num_epochs": 30, "num_generations": 8,
                  "prompts_per_step": 25, "micro_batch_size": 32}  # fmt: skip
TINY: Settings = {"learning_rate": 1.5e-4, "num_samples": 100, "num_epochs": 150, "num_generations": 16,
                  "prompts_per_step": 50, "micro_batch_size": 1024}  # fmt: skip
EXPERIMENTS: dict[str, dict[str, Settings]] = {
    "qwen": {
        "baseline": QWEN,
        "aggressive": QWEN | {"learning_rate": 1e-4, "num_epochs": 60, "num_generations": 16},
        "memory_optimized": QWEN | {"micro_batch_size": 4, "gradient_checkpointing": True},
        "ultra_small": QWEN | {"num_samples": 10, "num_epochs": 120, "prompts_per_step": 10},
    },
    "tiny": {
        "baseline": TINY,
        "aggressive": TINY | {"learning_rate": 5e-4, "num_epochs": 200, "num_generations": 32},
        "memory_optimized": TINY | {"micro_batch_size": 64, "gradient_checkpointing": True},
        "ultra_small": TINY | {"num_samples": 10, "num_epochs": 200, "prompts_per_step": 10},
    },
}

STATUS = {0: "reached", 6: "missed"}  # grpo_overfit.py's exit codes for a run that is complete

# ----------------------------------------------------------------------------------------------------------------------
# Running


def make_command(preset: str, name: str, further: list[str], folder: Path) -> list[str]:
    """The experiment's command; `further` flags come after its own and override them."""
    script = Path(__file__).resolve().with_name("grpo_overfit.py")
    command = [sys.executable, str(script), "--preset", preset]
    for setting, value in EXPERIMENTS[preset][name].items():
        command.append("--" + setting.replace("_", "-"))
        if value is not True:
            command.append(str(value))
    # This comes last, so that `further` cannot change the folder.
    return [*command, *further, "--run-dir", str(folder)]


def read_json(path: Path) -> Row:
    """The object in a file; empty if there is no file."""
    if not path.exists():
        return {}
    return json.loads(path.read_text(encoding="utf-8"))


def outcome(folder: Path, command: list[str]) -> int:
    """The exit code of an experiment that is complete with this command, 0 or 6; 1 for any other."""
    result = read_json(folder / "result.json")
    # Interpreter and script may have moved since.
    if result.get("exit_code") in STATUS and result["command"][2:] == command[2:]:
        return result["exit_code"]
    return 1


def newest_run(folder: Path) -> Path:
    """The newest run folder in an experiment's folder; the experiment's folder itself if it has none."""
    return max(folder.glob("grpo_overfit__*"), default=folder, key=lambda path: path.name.rsplit("__", 1)[-1])


def run(folder: Path, command: list[str]) -> None:
    """Runs or resumes an experiment, shows and logs what it prints, and records its result unless it was stopped."""
    folder.mkdir(parents=True, exist_ok=True)
    newest = newest_run(folder)
    before = read_json(newest / "environment.json").get("command", [])
    # A run with the same flags that has metrics is resumed.
    resumed = before[1:] == command[2:] and (newest / "metrics.jsonl").exists()
    started = [*command, "--resume", str(newest)] if resumed else command
    start = time.perf_counter()
    signals = []

    def stop(number: int, _: Any) -> None:
        signals.append(number)
        child.terminate()

    with (folder / "log.txt").open("a", buffering=1) as log:
        print(shlex.join(started), file=log)
        # It has its own session, so Ctrl-C does not reach it: `stop` sends it one SIGTERM, and it can end cleanly.
        with Popen(started, stdout=PIPE, stderr=STDOUT, text=True, start_new_session=True) as child:
            for number in {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}:
                signal.signal(number, stop)
            assert child.stdout is not None
            for line in child.stdout:
                print(line, end="", flush=True)
                log.write(line)
    if signals:
        print("stopped; the same command continues", file=sys.stderr)
        raise SystemExit(128 + signals[0])
    code = child.returncode
    print(f"{folder.name}: {STATUS.get(code, f'failed with exit code {code}')}", flush=True)
    # The flags were refused, so an earlier result is kept.
    if code != 2:
        seconds = f"{time.perf_counter() - start:.0f}" + ("+" if resumed else "")
        result = {"name": folder.name, "command": command, "exit_code": code, "seconds": seconds}
        result["run_folder"] = newest_run(folder).name
        (folder / "result.json").write_text(json.dumps(result, indent=2), encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------------------
# Main


def main(config: Config, further: list[str]) -> int:
    """Prints the commands, runs what is not complete, reports the sweep, and returns the exit code."""
    preset: str = config.preset
    if preset == "auto":
        import torch  # here, so that --help and bad flags do not wait for it

        preset = "qwen" if torch.cuda.is_available() else "tiny"
    sweep = Path(config.run_dir, config.sweep)
    commands = {sweep / name: make_command(preset, name, further, sweep / name) for name in config.only}
    todo = [folder for folder, command in commands.items() if outcome(folder, command) == 1]
    for folder, command in commands.items():
        state = "to run" if folder in todo else "complete, skipped"
        print(f"# {folder.name}: {state}\n{shlex.join(command)}", flush=True)
    if config.dry_run:
        return 0
    for folder in todo:
        print(f"\n==> {folder.name}", flush=True)
        run(folder, commands[folder])
    # A report that fails does not fail the sweep.
    if any(sweep.glob("*/result.json")):
        call([sys.executable, Path(__file__).resolve().with_name("report.py"), sweep])
    codes = {outcome(folder, command) for folder, command in commands.items()}
    return 1 if 1 in codes else max(codes)


if __name__ == "__main__":
    arguments = sys.argv[1:]
    split = arguments.index("--") if "--" in arguments else len(arguments)
    config = tyro.cli(Config, args=arguments[:split], description=__doc__)
    raise SystemExit(main(config, arguments[split + 1 :]))
