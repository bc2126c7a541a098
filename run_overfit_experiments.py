"""Four ways to overfit a small subset: runs grpo_overfit.py with each, one after another, and compares them.

    uv run run_overfit_experiments.py --dry-run         # prints the commands and stops
    uv run run_overfit_experiments.py                   # qwen preset where CUDA is there, else the tiny preset (CPU)
    uv run run_overfit_experiments.py --only baseline ultra_small
    uv run run_overfit_experiments.py -- --task gsm8k --dataset-path train.jsonl --track
                                                        # what follows -- goes to every experiment, and wins

An experiment is a subprocess with its own folder, runs/{sweep}/{experiment}/: log.txt is what it printed, result.json
is written when it has ended, beside it lie its run folders. One that fails does not keep the next from starting. At the
end stand a table of all experiments that have ended, also in table.md, and their curves, in curves.png.

The same call again continues: it skips what is complete with the same flags, resumes what was stopped, killed or failed
with the same flags, and starts the others anew. It does not see that code or data changed: after that, name another
--sweep. Ctrl-C, SIGTERM and a closed terminal stop the running experiment too, which saves first. After a SIGKILL it
may go on alone until the next line that it prints, and holds its run folder so long.

Exit codes: 0 every selected experiment reached its target, 1 one failed, 2 bad input, 6 none failed but one missed its
target, 128 + n after signal n.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import matplotlib
import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

Settings = dict[str, float | bool]
Row = dict[str, Any]

# ----------------------------------------------------------------------------------------------------------------------
# Config


@dataclass(frozen=True)
class Config:
    """What to run and where. Flags of grpo_overfit.py for every experiment follow after --, as in -- --track."""

    preset: Literal["auto", "qwen", "tiny"] = "auto"
    """Which experiments, and the preset of grpo_overfit.py that they start from. auto: qwen where CUDA is there, tiny
    where it is not."""
    only: tuple[str, ...] = ()
    """Names of the experiments to run; none: all."""
    dry_run: bool = False
    """Print the commands and stop."""
    sweep: str = "overfit"
    """Name of the folder of these experiments. Another preset, seed or data set wants another name: in the same folder
    its results take the place of the old ones."""
    run_dir: str = "runs"
    """Folder in which the sweep's folder is made."""
    seed: int = 1
    """Of every experiment."""


# What sets the experiments apart, all of it given as flags, so that a command can be read without knowing the presets.
QWEN: Settings = {"learning_rate": 5e-6, "num_samples": 100, "num_epochs": 30, "num_generations": 8,
                  "prompts_per_step": 25, "micro_batch_size": 32, "gradient_checkpointing": False}  # fmt: skip
TINY: Settings = {"learning_rate": 1.5e-4, "num_samples": 100, "num_epochs": 150, "num_generations": 16,
                  "prompts_per_step": 50, "micro_batch_size": 1024, "gradient_checkpointing": False}  # fmt: skip
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


def fail(exit_code: int, message: str) -> NoReturn:
    """Ends the program with one line on stderr that names the cause and the cure."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(exit_code)


# ----------------------------------------------------------------------------------------------------------------------
# Running


def make_command(config: Config, preset: str, name: str, further: list[str]) -> list[str]:
    """The experiment's command; `further` flags come after its own, and the last one of a kind holds."""
    command = [sys.executable, str(Path(__file__).resolve().with_name("grpo_overfit.py"))]
    command += ["--preset", preset, "--seed", str(config.seed)]
    command += ["--run-dir", str(Path(config.run_dir, config.sweep, name))]
    for setting, value in EXPERIMENTS[preset][name].items():
        flag = setting.replace("_", "-")
        command += [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return command + further


def read_result(folder: Path) -> Row | None:
    """The result.json of an experiment that has ended, else None."""
    path = folder / "result.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def why_run(folder: Path, command: list[str]) -> str:
    """Why an experiment is to be run, "" if it is complete. Interpreter and script may have moved since."""
    result = read_result(folder)
    if result is None:
        return "never finished"
    if result["exit_code"] not in STATUS:
        return f"failed with exit code {result['exit_code']}"
    return "" if result["command"][2:] == command[2:] else "its settings differ from those of the finished run"


def unfinished(folder: Path, command: list[str]) -> Path | None:
    """The newest run folder, if it is of this very command, which has not ended well, and can be resumed."""
    path = max(folder.glob("grpo_overfit__*"), default=None, key=lambda path: path.name.rsplit("__", 1)[-1])
    if path is None or not (path / "metrics.jsonl").exists():
        return None
    environment = json.loads((path / "environment.json").read_text(encoding="utf-8"))
    return path if environment["command"][1:] == command[2:] else None


def run(folder: Path, command: list[str], children: list[subprocess.Popen[str]], signals: list[int]) -> int:
    """Runs or resumes an experiment, shows and logs what it prints, records its result unless it was stopped: its exit
    code.
    """
    folder.mkdir(parents=True, exist_ok=True)
    left = unfinished(folder, command)
    started = command + (["--resume", str(left)] if left else [])
    earlier, start = set(folder.glob("grpo_overfit__*")) - {left}, time.perf_counter()
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}  # else its lines would wait in a buffer
    # In a session of its own, Ctrl-C does not reach it: `stop` passes it one SIGTERM, and it may end in good order.
    with (
        (folder / "log.txt").open("a", encoding="utf-8", buffering=1) as log,
        subprocess.Popen(
            started, env=environment, start_new_session=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, encoding="utf-8", errors="replace",
        ) as child,
    ):  # fmt: skip
        children[:] = [child]
        if signals:  # came before `stop` could know this child
            child.terminate()
        print(shlex.join(started), file=log)
        assert child.stdout is not None
        for line in child.stdout:
            print(line, end="", flush=True)
            log.write(line)
    code = child.returncode if child.returncode >= 0 else 128 - child.returncode  # as a shell has it
    if signals and code not in STATUS:
        return code
    if code == 2 and read_result(folder):  # a mistyped flag takes no earlier result away
        print(f"{folder.name}: refused (exit 2), its earlier result stays\n", flush=True)
        return code
    made = sorted(path.name for path in set(folder.glob("grpo_overfit__*")) - earlier)
    result = {"command": command, "exit_code": code, "seconds": round(time.perf_counter() - start, 1)}
    result["resumed"] = left is not None
    result["run_folder"] = made[-1] if made else None  # None: it failed before it made one
    partial = folder / "result.json.partial"  # renamed when whole, so that there is never half a result.json
    partial.write_text(json.dumps(result, indent=2), encoding="utf-8")
    partial.replace(folder / "result.json")
    status = STATUS.get(code, f"failed with exit code {code}, see {folder / 'log.txt'}")
    print(f"{folder.name}: {status}, {result['seconds']:.0f} s\n", flush=True)
    return code


# ----------------------------------------------------------------------------------------------------------------------
# Comparing


@dataclass(frozen=True)
class Ended:
    """An experiment that has ended, well or not."""

    name: str
    result: Row  # result.json
    config: Row  # as the run recorded it; empty if it failed before
    metrics: list[Row]  # one a step

    @property
    def status(self) -> str:
        return STATUS.get(self.result["exit_code"], f"failed (exit {self.result['exit_code']})")

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """(steps, values) of a metric, from the steps that have it."""
        rows = [row for row in self.metrics if key in row]
        return [row["step"] for row in rows], [row[key] for row in rows]


def read_metrics(path: Path) -> list[Row]:
    """The rows of metrics.jsonl; a last line that is cut off, as a killed run leaves it, is left out."""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")  # what follows the last \n is not whole
    return [json.loads(line) for line in lines[:-1]]


def load(folder: Path) -> Ended | None:
    """An experiment's folder, if it has ended."""
    if (result := read_result(folder)) is None:
        return None
    run = folder / (result["run_folder"] or "none")
    config, metrics = run / "config.json", run / "metrics.jsonl"
    settings = json.loads(config.read_text(encoding="utf-8")) if config.exists() else {}
    return Ended(folder.name, result, settings, read_metrics(metrics) if metrics.exists() else [])


HELD_OUT, SUBSET = "eval/accuracy", "eval/train_subset_accuracy"
SETTINGS = ("learning_rate", "num_samples", "num_generations", "num_epochs", "micro_batch_size")
HEADER = ("experiment", "lr", "problems", "generations", "epochs", "micro-batch", "steps", "seconds", "subset accuracy",
          "held-out accuracy", "peak GB", "status")  # fmt: skip


def cells(ended: Ended) -> list[str]:
    """The experiment's row of the table; "-" stands for what is not known."""
    settings = [f"{ended.config[name]:g}" if name in ended.config else "-" for name in SETTINGS]
    settings[-1] += " gc" if ended.config.get("gradient_checkpointing") else ""
    cells = [ended.name, *settings, str(ended.metrics[-1]["step"]) if ended.metrics else "-"]
    cells += [f"{ended.result['seconds']:.0f}{'+' if ended.result.get('resumed') else ''}"]
    for key in (SUBSET, HELD_OUT):
        values = [f"{value:.3f}" for value in ended.series(key)[1]]
        cells += [f"{values[0]} -> {values[-1] if len(values) > 1 else '-'}" if values else "-"]
    memory = ended.series("perf/peak_memory_gb")[1]
    return [*cells, f"{max(memory):.2f}" if memory else "-", ended.status]


def table(experiments: list[Ended]) -> str:
    """A Markdown table, padded so that it is also one on a terminal. Accuracies are greedy, before and after; seconds
    with a + are those of a resumed run's last part.
    """
    rows = [list(HEADER), *map(cells, experiments)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    return "".join(f"| {' | '.join(map(str.ljust, row, widths))} |\n" for row in rows)


# Okabe and Ito's colours, told apart with any colour vision. memory_optimized learns what baseline learns: dashed and
# thinner, it lets that line be seen below.
LOOKS = (("#0072B2", "-", "o"), ("#E69F00", "-", "s"), ("#009E73", "--", "^"), ("#D55E00", "-", "D"))
STYLE: Any = {"font.size": 12, "axes.titlesize": 13, "axes.titlelocation": "left", "text.parse_math": False}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "legend.fontsize": 12}
STYLE |= {"axes.grid": True, "axes.axisbelow": True, "grid.color": "#E5E5E5"}


def draw(experiments: list[Ended], names: list[str]) -> Figure:
    """Accuracy on the subset and on held-out problems; `names`, all that there are, gives each its colour."""
    looks = dict(zip(names, LOOKS, strict=True))
    configs = [ended.config for ended in experiments if ended.config]
    trained = {f"{config['task']}, {Path(config['model']).name}, seed {config['seed']}" for config in configs}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(13, 6), dpi=100, layout="constrained")
        figure.suptitle("Overfitting a small subset: " + "; ".join(sorted(trained)), fontsize=15)
        for axes, key, panel in zip(
            figure.subplots(1, 2, sharey=True), (SUBSET, HELD_OUT), ("the subset", "held-out problems"), strict=True
        ):
            axes.set_title(f"Greedy accuracy on {panel}")
            for place, ended in enumerate(experiments):
                (steps, values), (color, line, marker) = ended.series(key), looks[ended.name]
                style: Any = {"color": color, "marker": marker, "markeredgecolor": "white"}
                style |= {"linewidth": 3.5 - 0.6 * place, "markersize": 8 - place}
                style["clip_on"] = not steps  # a line without points, in the legend alone, upsets the layout unclipped
                axes.plot(steps, values, line, label=f"{ended.name}: {ended.status}", **style)
            axes.set_xlabel("step")
            axes.set_xlim(left=0)
            axes.set_ylim(0, 1.02)
            axes.xaxis.set_major_locator(MaxNLocator(nbins="auto", steps=[1, 2, 5, 10], integer=True))
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


# ----------------------------------------------------------------------------------------------------------------------
# Main


def main(config: Config, further: list[str]) -> int:
    """Prints the commands, runs what is not complete yet, compares all that have ended; returns the exit code."""
    if "RANK" in os.environ:
        fail(2, "each process of accelerate launch would run all experiments: start this without it")
    preset: str = config.preset
    if preset == "auto":
        import torch  # here, so that --help and bad flags do not wait for it

        preset = "qwen" if torch.cuda.is_available() else "tiny"
    names = list(EXPERIMENTS[preset])
    if unknown := [name for name in config.only if name not in names]:
        fail(2, f"unknown experiment '{unknown[0]}': --only takes any of {', '.join(names)}")
    for flag in further:
        if (own := flag.split("=")[0].replace("_", "-")) in ("--preset", "--seed", "--run-dir"):
            fail(2, f"{own} after --: it is a flag of this script too, give it before --")

    sweep = Path(config.run_dir, config.sweep)
    commands = {name: make_command(config, preset, name, further) for name in names if name in (config.only or names)}
    reasons = {name: why_run(sweep / name, command) for name, command in commands.items()}
    for name, command in commands.items():
        print(f"# {name}: {reasons[name] or 'complete, skipped'}\n{shlex.join(command)}", flush=True)
    if config.dry_run:
        return 0

    children: list[subprocess.Popen[str]] = []  # the running one
    signals: list[int] = []

    def stop(number: int, _: Any) -> None:
        signals.append(number)
        for child in children:
            child.terminate()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    codes = set()
    for name, command in commands.items():
        if reasons[name]:
            print(f"\n==> {name}", flush=True)
            codes.add(run(sweep / name, command, children, signals))
        elif result := read_result(sweep / name):
            codes.add(result["exit_code"])
        if signals:
            print(f"stopped; to continue: {shlex.join(['uv', 'run', *sys.argv])}", file=sys.stderr)
            return 128 + signals[0]

    experiments = [ended for name in names if (ended := load(sweep / name)) is not None]
    (sweep / "table.md").write_text(text := table(experiments), encoding="utf-8")
    print(text, end="")
    if any(ended.metrics for ended in experiments):
        draw(experiments, names).savefig(sweep / "curves.png")
    print(f"written: {sweep / 'table.md'}, {sweep / 'curves.png'}", flush=True)
    return 0 if codes == {0} else 6 if codes <= set(STATUS) else 1


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # a terminal without UTF-8
    arguments = sys.argv[1:]
    split = arguments.index("--") if "--" in arguments else len(arguments)
    config = tyro.cli(Config, args=arguments[:split], description=__doc__)
    raise SystemExit(main(config, arguments[split + 1 :]))
