"""--track with the real wandb, offline: what it would tell the server, over an interruption too."""

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
SIZES = ["--num-steps", "4", "--prompts-per-step", "2", "--num-generations", "4", "--save-every", "0"]
CALLS = itertools.count(1)


def alternate(completions: list[Any], **_: Any) -> list[float]:
    """A signal in the evaluation of step 2, or never: rewards are asked once in a step, and twice in an evaluation."""
    if next(CALLS) == 5 and os.environ.get("STRIKE"):
        os.kill(os.getpid(), signal.SIGTERM)
    return [float(i % 2) for i in range(len(completions))]


def records(store: Path) -> list[Any]:
    """Those of an offline run: protocol buffers in a LevelDB log, blocks of 32 KiB after a 7-byte header."""
    from wandb.proto import wandb_internal_pb2

    data, place, parts, found = store.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:  # what is left of a block is padding
            place += 32768 - place % 32768
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            record: Any = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
            record.ParseFromString(parts)
            parts = b""
            found.append(record)
    return found


def history(store: Path) -> list[dict[str, Any]]:
    rows = [record.history.item for record in records(store) if record.WhichOneof("record_type") == "history"]
    return [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row} for row in rows]


def track(folder: Path, *flags: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment |= {"WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"} | variables
    command = [sys.executable, f"{ROOT}/grpo.py", "--run-dir", str(folder / "runs"), *flags]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A run stopped in step 2 and resumed: its folder, and what W&B kept of each of its two lives."""
    folder = tmp_path_factory.mktemp("wandb")
    problem = {"question": "\x1b[2J\x00\u2028<script>alert(1)</script> \\boxed{", "answer": "1"}
    (folder / "problems.jsonl").write_text(json.dumps(problem) + "\n")
    task = ["--preset", "tiny", "--task", "gsm8k", "--dataset-path", str(folder / "problems.jsonl"), *SIZES]
    task += ["--prompt-format", "plain", "--rewards", "tests.test_wandb:alternate", "accuracy", "--eval-every", "2"]
    stopped = track(folder, *task, "--track", "--log-completions", STRIKE="1", WANDB_PROJECT="ours")
    assert stopped.returncode == 143, stopped.stderr
    resumed = track(folder, "--resume", "latest", WANDB_PROJECT="ours")
    assert resumed.returncode == 0, resumed.stderr
    (run,) = (folder / "runs").iterdir()
    return run, sorted(run.glob("wandb/offline-run-*/run-*.wandb"))


def test_every_step_is_told_to_the_same_run(tracked: tuple[Path, list[Path]]) -> None:
    run, stores = tracked
    told = [history(store) for store in stores]
    assert [row["_step"] for row in told[0]] == [0, 1, 2]
    assert [row["_step"] for row in told[1]] in ([3, 4], [2, 3, 4])  # the step it had reached may be told again
    rows = {row["_step"]: row for rows in told for row in rows}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        metrics = json.loads(line)
        row = rows[metrics.pop("step")]
        assert {key: row[key] for key in metrics} == pytest.approx(metrics)
    first, second = (next(r.run for r in records(store) if r.WhichOneof("record_type") == "run") for store in stores)
    assert first.run_id == second.run_id == first.display_name == run.name
    assert (first.project, second.project, first.run_group) == ("ours", "ours", "grpo__gsm8k__tiny")
    config = {update.key: json.loads(update.value_json) for update in first.config.update}
    recorded = json.loads((run / "config.json").read_text())
    assert all(config[key] == recorded[key] for key in ("task", "seed", "learning_rate"))


def test_completions_are_tables_at_evaluations(tracked: tuple[Path, list[Path]]) -> None:
    run, stores = tracked
    rows = [row for store in stores for row in history(store)]
    with_table = {row["_step"] for row in rows if any(key.startswith("completions/table") for key in row)}
    assert {2, 4} <= with_table <= {0, 2, 4}
    tables = [json.loads(path.read_text()) for path in run.glob("wandb/*/files/media/table/completions/*.json")]
    assert len(tables) >= 2
    shown = [dict(zip(tables[-1]["columns"], row, strict=True)) for row in tables[-1]["data"]]
    assert len(shown) == 8
    assert all(row["question"].endswith("\\boxed{") and "completion" in row for row in shown)
