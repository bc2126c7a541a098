"""report.py on a made-up run whose numbers can be checked by hand."""

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.lines import Line2D

import report

ROOT = Path(__file__).resolve().parent.parent
CONTROL = "\x1b[2J\x07\r" + "word " * 100 + "\u202e7"  # clears a screen, rings a bell, overwrites, reverses
REWARDS = {0: (0.0, 2.0, 2.0, 0.0), 4: (2.0, 2.0, 2.0, 0.0)}


def eval_rows(step: int, greedy: str, sampled: str, parsed: str, texts: tuple[str, ...]) -> list[dict[str, Any]]:
    """Four evaluated problems; `greedy`, `sampled` and `parsed` are four digits each, 1 for right or parsed."""
    rows = []
    for mode, right in (("greedy", greedy), ("sampled", sampled)):
        for i, text in enumerate(texts):
            row = {"step": step, "split": "eval", "mode": mode, "question": f"What is {i} + 4?", "answer": str(i + 4)}
            row |= {"completion": text, "right": right[i] == "1", "parsed": parsed[i] == "1"}
            rows.append(row | {"reward": REWARDS[step][i]})
    return rows


INTERVALS = {1 / 4: (0.0456, 0.6994), 3 / 4: (0.3006, 0.9544), 1 / 3: (0.0615, 0.7923), 2 / 3: (0.2077, 0.9385)}


def eval_metrics(key: str, accuracy: float, sampled: float, parsed: float, reward: float) -> dict[str, float]:
    """What a step's line holds of an evaluation of three or four problems, for the accuracies in INTERVALS."""
    low, high = INTERVALS[accuracy]
    metrics = {key: accuracy, f"{key}_low": low, f"{key}_high": high, f"{key}_sampled": sampled}
    return metrics | {"eval/parsed_ratio": parsed, "eval/reward": reward}


def train_metrics(step: int) -> dict[str, float]:
    """What a training step's line holds."""
    return {
        "train/reward": 0.5 * step, "train/entropy": 0.4 - 0.1 * step,
        "train/frac_all_right": 0.2 * step, "train/frac_all_wrong": 0.1,
        "train/frac_reward_zero_std": 0.2 * step + 0.1, "completions/mean_length": 6.0,
        "completions/clipped_ratio": 0.25, "time/rollout_s": 1.5, "time/reward_s": 0.25, "time/update_s": 2.0,
    }  # fmt: skip


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_run(folder: Path, key: str = "eval/accuracy") -> Path:
    """A run of four steps: problem 0 is lost; problems 1, 2 and 3 are gained."""
    folder.mkdir()
    config = {"task": "arithmetic", "model": "org/tiny_$\\x$", "seed": 7, "num_steps": 4}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    metrics = [{"step": 0, **eval_metrics(key, 0.25, 0.5, 0.5, 1.0)}]
    metrics += [{"step": step, **train_metrics(step)} for step in (1, 2, 3, 4)]
    metrics[-1] |= eval_metrics(key, 0.75, 0.75, 1.0, 1.5)
    metrics[-1] |= {"test/accuracy": 0.5, "test/accuracy_low": 0.4, "test/accuracy_high": 0.6}
    write_jsonl(folder / "metrics.jsonl", metrics)
    train = {"question": "q", "answer": "1", "completion": "never shown", "reward": 0.0, "advantage": 0.0}
    rows = eval_rows(0, "1000", "0110", "1100", ("4", CONTROL, "5", "secret-of-the-fourth"))
    rows += [{"step": 4, "split": "train", **train}]
    rows += eval_rows(4, "0111", "1110", "1111", ("9", "5", "6", "7"))
    rows = [
        row | {"split": key.removesuffix("accuracy").rstrip("/_")} if row["split"] == "eval" else row for row in rows
    ]
    rows += [{**rows[-1], "split": "test", "mode": "greedy", "right": False}]
    write_jsonl(folder / "completions.jsonl", rows)
    return folder


def make_overfit_run(folder: Path) -> Path:
    """A run that learns its four training problems, as above, and of three held-out ones gains one and loses two."""
    make_run(folder, key="eval/train_subset_accuracy")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"target_accuracy": 0.9}), encoding="utf-8")
    metrics = report.read_jsonl(folder / "metrics.jsonl")
    # Held-out problems are evaluated first: parsed and reward are in the end the training problems'.
    metrics[0] = eval_metrics("eval/accuracy", 2 / 3, 2 / 3, 1.0, 4 / 3) | metrics[0]
    metrics[-1] = eval_metrics("eval/accuracy", 1 / 3, 1 / 3, 2 / 3, 2.0) | metrics[-1]
    write_jsonl(folder / "metrics.jsonl", metrics)
    rows = report.read_jsonl(folder / "completions.jsonl")
    rows += eval_rows(0, "011", "110", "111", ("held-out text",) * 3)
    rows += eval_rows(4, "100", "010", "110", ("held-out text",) * 3)
    write_jsonl(folder / "completions.jsonl", rows)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


@pytest.fixture
def overfit_folder(tmp_path: Path) -> Path:
    return make_overfit_run(tmp_path / "overfit")


def output(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    report.main([str(folder)])
    return capsys.readouterr().out


def cells(text: str, label: str) -> list[str]:
    """The cells of the table's row `label`."""
    line = next(line for line in text.splitlines() if line.startswith(label))
    return [cell.strip() for cell in line.removeprefix(label).split("  ") if cell.strip()]


def heights(line: Line2D) -> list[float]:
    """The y values of a drawn line."""
    return np.asarray(line.get_ydata(), dtype=float).tolist()


def error_of(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr of a call that must end with exit code 2."""
    with pytest.raises(SystemExit) as ended:
        report.main([str(folder)])
    assert ended.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert not (folder / "curve.png").exists()
    return captured.err


def test_table_holds_the_hand_computed_numbers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = output(folder, capsys)
    assert text.startswith("arithmetic, tiny_$\\x$, seed 7: 4 steps\n")
    assert cells(text, "4 held-out problems") == ["before (step 0)", "after (step 4)"]
    # Wilson with z = 1.96: for 1 of 4 the centre is (0.25 + z2/8) / (1 + z2/4) = 0.3725, the half width 0.3269
    assert cells(text, "accuracy, greedy") == ["0.250 [0.046, 0.699]", "0.750 [0.301, 0.954]"]
    assert cells(text, "accuracy, sampled") == ["0.500 [0.150, 0.850]", "0.750 [0.301, 0.954]"]
    assert cells(text, "answers parsed") == ["0.500 [0.150, 0.850]", "1.000 [0.510, 1.000]"]
    # Rewards 0 2 2 0: std sqrt(4/3), 1.96 * std / sqrt(4) = 1.1316. Rewards 2 2 2 0: std 1, 0.98.
    assert cells(text, "reward") == ["1.000 [-0.132, 2.132]", "1.500 [0.520, 2.480]"]
    assert "greedy: 3 problems gained, 1 lost\n" in text
    assert "test accuracy, greedy (step 4): 0.500 [0.400, 0.600]\n" in text
    last = f"curve: {folder}/curve.png\nrun folder: {folder}\npage: uv run report.py {folder} -o report.html\n"
    assert text.endswith(f"seconds: rollout 6.0, reward 1.0, update 8.0\n\n{last}")


def test_three_samples_before_and_after_are_safe_to_print(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = output(folder, capsys)
    assert all(character == "\n" or character.isprintable() for character in text)
    lines = text.splitlines()
    at = lines.index("'What is 1 + 4?', answer '5'")
    assert lines[at + 1].startswith("  before  wrong  '\\x1b[2J\\x07\\rword word ")
    assert lines[at + 1].endswith("word \\u202e7'")
    assert len(lines[at + 1]) < 250
    assert lines[at + 2] == "  after   right  '5'"
    assert text.count("  before  ") == text.count("  after   ") == 3
    assert "secret-of-the-fourth" not in text
    assert "never shown" not in text


def test_training_problems_are_labelled_as_such(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path / "run", key="eval/train_subset_accuracy")
    text = output(folder, capsys)
    assert cells(text, "4 training problems (none held out)") == ["before (step 0)", "after (step 4)"]
    assert cells(text, "training accuracy, greedy")[0] == "0.250 [0.046, 0.699]"
    assert "held-out" not in text
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"target_accuracy": 1.0}), encoding="utf-8")
    axes = report.draw(report.load(folder)).axes[0]
    assert axes.get_title("left") == "Training accuracy (no problems held out)"
    labels = ["greedy, 95 % interval", "sampled", "answers parsed", "target 1"]
    assert [line.get_label() for line in axes.lines] == labels
    assert heights(axes.lines[-1]) == [1.0, 1.0]


def test_both_accuracies_are_in_the_table_the_target_first(
    overfit_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = output(overfit_folder, capsys)
    training, held_out = text.split("3 held-out problems")
    assert cells(training, "4 training problems") == ["before (step 0)", "after (step 4)"]
    assert cells(training, "training accuracy, greedy") == ["0.250 [0.046, 0.699]", "0.750 [0.301, 0.954]"]
    assert cells(training, "training accuracy, sampled") == ["0.500 [0.150, 0.850]", "0.750 [0.301, 0.954]"]
    assert cells(training, "answers parsed") == ["0.500 [0.150, 0.850]", "1.000 [0.510, 1.000]"]
    assert cells(training, "reward") == ["1.000 [-0.132, 2.132]", "1.500 [0.520, 2.480]"]
    assert cells(text, "3 held-out problems") == ["before (step 0)", "after (step 4)"]
    assert cells(held_out, "held-out accuracy, greedy") == ["0.667 [0.208, 0.939]", "0.333 [0.061, 0.792]"]
    assert cells(held_out, "held-out accuracy, sampled") == ["0.667 [0.208, 0.939]", "0.333 [0.061, 0.792]"]
    assert cells(held_out, "answers parsed") == ["1.000 [0.438, 1.000]", "0.667 [0.208, 0.939]"]
    # Rewards 0 2 2: std sqrt(4/3), 1.96 * std / sqrt(3) = 1.3067. Rewards 2 2 2: std 0.
    assert cells(held_out, "reward") == ["1.333 [0.027, 2.640]", "2.000 [2.000, 2.000]"]
    changes = "greedy: 3 training problems gained, 1 lost\ngreedy: 1 held-out problems gained, 2 lost\n"
    assert f"\n[low, high]: 95 % interval\n{changes}" in text
    assert "none held out" not in text
    assert text.count("  before  ") == text.count("  after   ") == 3  # examples, of the target's problems
    assert "  after   right  '5'" in text.splitlines()
    assert "held-out text" not in text


def test_both_accuracies_from_metrics_alone(overfit_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Parsed and reward in the metrics are the training problems'; they must not pass for the held-out ones'."""
    (overfit_folder / "completions.jsonl").unlink()
    text = output(overfit_folder, capsys)
    training, held_out = text.split("\nheld-out problems")
    assert cells(training, "training accuracy, greedy") == ["0.250 [0.046, 0.699]", "0.750 [0.301, 0.954]"]
    assert cells(training, "training accuracy, sampled") == ["0.500", "0.750"]
    assert cells(held_out, "answers parsed") == cells(held_out, "reward") == ["-", "-"]
    assert cells(held_out, "held-out accuracy, greedy") == ["0.667 [0.208, 0.939]", "0.333 [0.061, 0.792]"]
    assert cells(training, "answers parsed") == ["0.500", "1.000"]
    assert cells(training, "reward") == ["1.000", "1.500"]
    assert "gained" not in text
    write_jsonl(overfit_folder / "metrics.jsonl", report.read_jsonl(overfit_folder / "metrics.jsonl")[:1])
    text = output(overfit_folder, capsys)  # killed in the first step
    assert cells(text, "training accuracy, greedy") == ["0.250 [0.046, 0.699]"]
    assert cells(text, "held-out accuracy, greedy") == ["0.667 [0.208, 0.939]"]


def test_both_accuracies_and_the_target_are_in_the_picture(overfit_folder: Path) -> None:
    axes = report.draw(report.load(overfit_folder)).axes[0]
    assert axes.get_title("left") == "Accuracy on the training subset and on held-out problems"
    lines = {str(line.get_label()): line for line in axes.lines}
    assert {label: heights(line) for label, line in lines.items()} == {
        "training, greedy, 95 % interval": [0.25, 0.75],
        "held-out, greedy, 95 % interval": [2 / 3, 1 / 3],
        "training, sampled": [0.5, 0.75],
        "target 0.9": [0.9, 0.9],
    }
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == list(lines)
    training, held_out, sampled, target = lines.values()
    assert training.get_color() == sampled.get_color() != held_out.get_color()
    assert target.is_dashed()
    extents = [band.get_paths()[0].get_extents() for band in axes.collections]
    assert [(extent.y0, extent.y1) for extent in extents] == [(0.0456, 0.9544), (0.0615, 0.9385)]
    for band, line in zip(axes.collections, (training, held_out), strict=True):
        assert np.asarray(band.get_facecolor())[0, :3].tolist() == list(to_rgb(line.get_color()))


def test_picture_has_the_size_and_lines_of_the_metrics(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output(folder, capsys)
    png = (folder / "curve.png").read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", png[16:24]) == (1200, 700)
    assert len(set(png)) > 100  # not one flat colour
    figure = report.draw(report.load(folder))
    assert figure.get_suptitle() == "arithmetic, tiny_$\\x$, seed 7"
    accuracy, reward, length, groups, entropy, clipped = figure.axes
    assert accuracy.get_ylim()[0] == 0
    assert accuracy.get_ylim()[1] == pytest.approx(1, abs=0.05)
    assert [heights(line) for line in accuracy.lines] == [[0.25, 0.75], [0.5, 0.75], [0.5, 1.0]]
    assert heights(reward.lines[0]) == [0.5, 1.0, 1.5, 2.0]
    assert heights(length.lines[0]) == [6.0] * 4
    assert heights(clipped.lines[0]) == [0.25] * 4
    tops = [area.get_paths()[0].get_extents().y1 for area in groups.collections]  # right, signal, wrong at step 4
    assert tops == pytest.approx([0.8, 0.9, 1.0])
    assert heights(entropy.lines[0]) == pytest.approx([0.3, 0.2, 0.1, 0.0])


def test_only_what_the_metrics_hold_is_drawn(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(folder / "metrics.jsonl", [{"step": 0, **eval_metrics("eval/accuracy", 0.25, 0.5, 0.5, 1.0)}])
    text = output(folder, capsys)
    assert cells(text, "accuracy, greedy") == ["0.250 [0.046, 0.699]"]  # no second column
    assert len(report.draw(report.load(folder)).axes) == 1
    write_jsonl(folder / "metrics.jsonl", [{"step": 1, "train/reward": 1.0}])
    assert "accuracy" not in output(folder, capsys)
    assert len(report.draw(report.load(folder)).axes) == 1


def test_a_truncated_last_line_is_ignored(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = output(folder, capsys)
    for name in ("metrics.jsonl", "completions.jsonl"):
        with (folder / name).open("a", encoding="utf-8") as file:
            file.write('{"step": 5, "train/rew')
    assert output(folder, capsys) == whole


def test_bad_folders_are_one_line_and_exit_code_2(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "there is no folder" in error_of(folder / "no_such", capsys)
    (folder / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1, "tr\n{"step": 2}\n', encoding="utf-8")
    assert "line 2" in error_of(folder, capsys)
    for empty in ("", "\n", '{"step": 0, "eval/acc'):
        (folder / "metrics.jsonl").write_text(empty, encoding="utf-8")
        assert "holds no line" in error_of(folder, capsys)
    (folder / "metrics.jsonl").unlink()
    assert "has no metrics.jsonl" in error_of(folder, capsys)


def test_a_picture_that_cannot_be_written_does_not_cost_the_table(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "curve.png").mkdir()
    with pytest.raises(SystemExit, match="1"):
        report.main([str(folder)])
    captured = capsys.readouterr()
    assert captured.err.startswith("error: cannot write ")
    assert "greedy: 3 problems gained, 1 lost\n" in captured.out
    assert "curve: " not in captured.out


def test_command_line_without_torch(folder: Path, tmp_path: Path) -> None:
    """As grpo.py calls it; a torch that cannot be imported shows that none is needed."""
    (tmp_path / "torch.py").write_text("raise ImportError('report.py must start fast')", encoding="utf-8")
    environment = {"PYTHONPATH": str(tmp_path), "MPLCONFIGDIR": str(tmp_path), "LC_ALL": "C", "PYTHONUTF8": "0"}
    command = [sys.executable, str(ROOT / "report.py")]
    done = subprocess.run([*command, str(folder)], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "greedy: 3 problems gained, 1 lost\n" in done.stdout
    missing = subprocess.run([*command, str(tmp_path)], env=environment, capture_output=True, text=True)
    assert missing.returncode == 2
    assert (
        missing.stderr
        == f"error: {tmp_path} has no metrics.jsonl: give the folder of one run, not the folder above it\n"
    )
