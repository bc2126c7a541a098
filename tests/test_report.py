"""report.py on a made-up run whose numbers can be checked by hand."""

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.lines import Line2D

import report

ROOT = Path(__file__).resolve().parent.parent
CONTROL = "\x1b[2J\x07\r" + "word " * 100 + "\u202e7"  # clears a screen, rings a bell, overwrites, reverses
INTERVALS = {1 / 4: (0.0456, 0.6994), 3 / 4: (0.3006, 0.9544), 1 / 3: (0.0615, 0.7923), 2 / 3: (0.2077, 0.9385)}
REWARDS = {0: (0.0, 2.0, 2.0, 0.0), 4: (2.0, 2.0, 2.0, 0.0)}


def eval_rows(step: int, results: str, texts: tuple[str, ...], split: str = "eval") -> list[dict[str, Any]]:
    """Evaluated problems; `results` are greedy and sampled, a digit a problem, 1 for right."""
    rows = []
    for mode, right in zip(("greedy", "sampled"), results.split(), strict=True):
        for i, text in enumerate(texts):
            row = {"step": step, "split": split, "mode": mode, "question": f"What is {i} + 4?", "answer": str(i + 4)}
            rows.append(row | {"completion": text, "right": right[i] == "1", "reward": REWARDS[step][i]})
    return rows


def eval_metrics(key: str, accuracy: float, sampled: float, parsed: float, reward: float) -> dict[str, float]:
    """What a step's line holds of an evaluation of three or four problems, for the accuracies in INTERVALS."""
    low, high = INTERVALS[accuracy]
    metrics = {key: accuracy, f"{key}_low": low, f"{key}_high": high, f"{key}_sampled": sampled}
    return metrics | {f"{report.SPLITS[key]}/completions/parsed_ratio": parsed, f"{report.SPLITS[key]}/reward": reward}


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
    rows = eval_rows(0, "1000 0110", ("4", CONTROL, "5", "secret-of-the-fourth"), report.SPLITS[key])
    rows += [{"step": 4, "split": "train", "question": "q", "answer": "1", "completion": "never shown"}]
    rows += eval_rows(4, "0111 1110", ("9", "5", "6", "7"), report.SPLITS[key])
    rows += [{**rows[-1], "split": "test", "mode": "greedy", "right": False}]
    write_jsonl(folder / "completions.jsonl", rows)
    return folder


def change(folder: Path, **settings: Any) -> Path:
    """Other settings for a run."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | settings), encoding="utf-8")
    return folder


def make_overfit_run(folder: Path) -> Path:
    """A run that learns its four training problems, as above, and of three held-out ones gains one and loses two."""
    change(make_run(folder, key="eval/train_subset_accuracy"), target_accuracy=0.9)
    metrics = report.read_jsonl(folder / "metrics.jsonl")
    metrics[0] |= eval_metrics("eval/accuracy", 2 / 3, 2 / 3, 1.0, 1.0)
    metrics[-1] |= eval_metrics("eval/accuracy", 1 / 3, 1 / 3, 2 / 3, 0.5)
    write_jsonl(folder / "metrics.jsonl", metrics)
    rows = report.read_jsonl(folder / "completions.jsonl")
    for step, results in ((0, "011 110"), (4, "100 010")):
        rows += eval_rows(step, results, ("held-out text",) * 3)
    write_jsonl(folder / "completions.jsonl", rows)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


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


def error_of(capsys: pytest.CaptureFixture[str], *arguments: Path | str) -> str:
    """The one line on stderr of a call that must end with exit code 2."""
    with pytest.raises(SystemExit, match="2"):
        report.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert captured.err.startswith("error: ")
    return captured.err


def test_table_holds_the_hand_computed_numbers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("metrics.jsonl", "completions.jsonl"):
        with (folder / name).open("a", encoding="utf-8") as file:
            file.write('{"step": 5, "train/rew')  # as a killed run leaves it
    text = output(folder, capsys)
    assert text.startswith("arithmetic, tiny_$\\x$, seed 7: 4 steps; [low, high] is a 95 % interval\n")
    assert cells(text, "4 held-out problems") == ["before (step 0)", "after (step 4)"]
    # Wilson with z = 1.96: for 1 of 4 the centre is (0.25 + z2/8) / (1 + z2/4) = 0.3725, the half width 0.3269
    assert cells(text, "accuracy, greedy") == ["0.250 [0.046, 0.699]", "0.750 [0.301, 0.954]"]
    assert cells(text, "accuracy, sampled") == ["0.500 [0.150, 0.850]", "0.750 [0.301, 0.954]"]
    assert cells(text, "answers parsed") == ["0.500 [0.150, 0.850]", "1.000 [0.510, 1.000]"]
    assert cells(text, "reward") == ["1.000", "1.500"]
    assert "greedy: 3 held-out problems gained, 1 lost\n" in text
    assert "test accuracy, greedy (step 4): 0.500 [0.400, 0.600]\n" in text
    last = f"curve: {folder}/curve.png\nrun folder: {folder}\npage: uv run report.py {folder} -o report.html\n"
    assert text.endswith(f"seconds: rollout 6.0, reward 1.0, update 8.0\n\n{last}")
    # Samples before and after are safe to print.
    assert all(character == "\n" or character.isprintable() for character in text)
    lines = text.splitlines()
    assert sum(line.startswith("  before  ") for line in lines) == 2  # a gained one and a lost one; there is no other
    at = lines.index("'What is 1 + 4?', answer '5'")
    assert lines[at + 1].startswith("  before  wrong  '\\x1b[2J\\x07\\rword word ")
    assert (lines[at + 1][-13:], len(lines[at + 1]) < 250) == ("word \\u202e7'", True)
    assert lines[at + 2] == "  after   right  '5'"
    assert [text.count(other) for other in ("secret-of-the-fourth", "never shown")] == [0, 0]


def test_both_accuracies_are_in_the_table_the_target_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_overfit_run(tmp_path / "overfit")
    text = output(folder, capsys)
    training, held_out = text.split("3 held-out problems")
    assert cells(training, "4 training problems") == ["before (step 0)", "after (step 4)"]
    assert cells(training, "answers parsed") == ["0.500 [0.150, 0.850]", "1.000 [0.510, 1.000]"]
    assert cells(held_out, "answers parsed") == ["1.000 [0.438, 1.000]", "0.667 [0.208, 0.939]"]
    assert "\ngreedy: 3 training problems gained, 1 lost\ngreedy: 1 held-out problems gained, 2 lost\n" in text
    assert "  after   right  '5'" in text.splitlines()  # examples, of the target's problems
    assert "held-out text" not in text
    (folder / "completions.jsonl").unlink()
    text = output(folder, capsys)  # from metrics alone
    training, held_out = text.split("\nheld-out problems")
    assert cells(training, "accuracy, sampled") == ["0.500", "0.750"]
    assert cells(held_out, "accuracy, greedy") == ["0.667 [0.208, 0.939]", "0.333 [0.061, 0.792]"]
    assert (cells(held_out, "answers parsed"), cells(held_out, "reward")) == (["1.000", "0.667"], ["1.000", "0.500"])
    assert "gained" not in text


def test_picture_has_the_size_and_lines_of_the_metrics(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output(folder, capsys)
    assert struct.unpack(">II", (folder / "curve.png").read_bytes()[16:24]) == (1200, 700)
    figure = report.draw(report.load(folder))
    assert figure.get_suptitle() == "arithmetic, tiny_$\\x$, seed 7"
    accuracy, reward, _, groups, entropy, shares = figure.axes
    assert accuracy.get_ylim() == shares.get_ylim() == groups.get_ylim() == (0, 1.02)
    assert [heights(line) for line in accuracy.lines[::2]] == [[0.25, 0.75], [0.5, 0.75]]
    assert heights(reward.lines[0]) == [0.5, 1.0, 1.5, 2.0]
    assert heights(shares.lines[0]) == [0.25] * 4
    assert [heights(line) for line in groups.lines[::2]] == [pytest.approx([0.2, 0.4, 0.6, 0.8]), [0.1] * 4]
    assert heights(entropy.lines[0]) == pytest.approx([0.3, 0.2, 0.1, 0.0])


def test_a_metric_has_one_colour_in_every_run(folder: Path, tmp_path: Path) -> None:
    colours: dict[Any, set[Any]] = {}
    for run, added in ((folder, "thinking z"), (make_overfit_run(tmp_path / "other"), "a z")):
        more = {"completions/clipped_ratio": 0.0} | {f"train/frac_{name}": 0.5 for name in added.split()}
        write_jsonl(run / "metrics.jsonl", [row | more for row in report.read_jsonl(run / "metrics.jsonl")])
        panels = report.draw(report.load(run)).axes
        for line in [line for axes in panels for line in axes.lines if not str(line.get_label()).startswith("_")]:
            colours.setdefault(line.get_label(), set()).add(line.get_color())
    assert {"accuracy", "train_subset_accuracy_sampled", "frac_thinking", "frac_z"} < colours.keys()
    assert [name for name, found in colours.items() if len(found) > 1] == []
    # Of the overfit run: both accuracies, each followed by the sampled one, and the target.
    assert [heights(line) for line in panels[0].lines[::4]] == [[0.25, 0.75], [2 / 3, 1 / 3], [0.9, 0.9]]
    extents = [band.get_paths()[0].get_extents() for band in panels[0].collections]
    assert [(extent.y0, extent.y1) for extent in extents] == [(0.0456, 0.9544), (0.0615, 0.9385)]


def test_only_what_the_metrics_hold_is_drawn(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = report.read_jsonl(folder / "metrics.jsonl")
    write_jsonl(folder / "metrics.jsonl", [row | {"completions/clipped_ratio": 0.0} for row in rows])
    assert len(report.draw(report.load(folder)).axes) == 5  # a share that is 0 throughout has no panel
    write_jsonl(folder / "metrics.jsonl", rows[:1])
    assert cells(output(folder, capsys), "accuracy, greedy") == ["0.250 [0.046, 0.699]"]  # no second column
    assert len(report.draw(report.load(folder)).axes) == 1
    write_jsonl(folder / "metrics.jsonl", [{"step": 1, "train/reward": 1.0}])
    assert "accuracy" not in output(folder, capsys)
    assert len(report.draw(report.load(folder)).axes) == 1


def test_bad_folders_are_one_line_and_exit_code_2(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "there is no " in error_of(capsys, folder / "no_such")
    page = folder / "no" / "page.html"
    assert "cannot write" in error_of(capsys, folder, "-o", page)
    (folder / "config.json").write_text("[1")
    assert "config.json is no JSON object" in error_of(capsys, folder)
    (folder / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1, "tr\n{"step": 2}\n', encoding="utf-8")
    assert "line 2" in error_of(capsys, folder)
    for empty in ("", "\n", '{"step": 0, "eval/acc'):
        (folder / "metrics.jsonl").write_text(empty, encoding="utf-8")
        assert "holds no line" in error_of(capsys, folder)
    (folder / "metrics.jsonl").unlink()
    assert "there is no " in error_of(capsys, folder, "-o", page)
    assert not (folder / "curve.png").exists()


def test_command_line_without_torch(folder: Path, tmp_path: Path) -> None:
    """As grpo.py calls it; a torch that cannot be imported shows that none is needed."""
    (tmp_path / "torch.py").write_text("raise ImportError('report.py must start fast')", encoding="utf-8")
    environment = {"PYTHONPATH": str(tmp_path), "MPLCONFIGDIR": str(tmp_path), "LC_ALL": "C", "PYTHONUTF8": "0"}
    command = [sys.executable, str(ROOT / "report.py"), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\ncurve: " in done.stdout
    (folder / "curve.png").unlink()
    (folder / "curve.png").mkdir()
    failed = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert failed.returncode == 1
    assert failed.stderr.startswith("error: cannot write ")
    assert failed.stdout == done.stdout.split("\n\ncurve: ")[0] + "\n"  # the table is not lost
