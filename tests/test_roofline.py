"""benchmarks/roofline.py: its floors by hand, and the program on a CPU."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import grpo

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import roofline

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["--prompts", "2", "--generations", "2", "--prompt-length", "4", "--completion-length", "4", "--steps", "1"]


def test_the_floors_of_a_toy_by_hand() -> None:
    shape = roofline.Shape(numbers=150, body=100, head=40, vocab=10, attention=6, kv=8, item=2)
    machine = roofline.Machine(bandwidth=10.0, rate=1000.0)
    floor = roofline.decode_floor(shape, machine, prompts=2, rows=4, width=3, length=6)
    assert floor == pytest.approx({
        "layers": 20.0,  # 100 * 2 bytes; 800 FLOPs would take 0.8 s
        "head": 16.0,  # (40 + 4 * 10) * 2 bytes
        "sampling": 8.0,  # 4 * 10 * 2 bytes
        "KV": 38.4,  # 4 rows at 3 + 6 / 2 tokens of 8 * 2 bytes
        "prefill": 20.0,  # 200 bytes; 2 * 2 * 3 * (100 + 6 * 3) = 1416 FLOPs would take 1.4 s
        "all": 20.0 + 5 * (20.0 + 38.4) + 6 * (16.0 + 8.0),
    })  # fmt: skip
    slow = roofline.Machine(bandwidth=1e9, rate=2.0)  # here the multiplications decide
    floor = roofline.decode_floor(shape, slow, prompts=2, rows=4, width=3, length=6)
    assert floor["layers"] == pytest.approx(400.0)  # 2 * 100 * 4 FLOPs
    assert floor["head"] == pytest.approx(160.0)
    assert floor["KV"] == pytest.approx(288.0)  # 4 * 4 * 6 * 6: each of 6 products and sums, of scores and of values
    assert floor["prefill"] == pytest.approx(708.0)
    assert roofline.adam_floor(shape, machine) == pytest.approx(450.0)  # 30 bytes a parameter, 28 in float32
    # Weights 300 bytes, KV 5 * 16; masters, two states and gradients 150 * 16.
    expected = {"decode": 380e-9, "update": 2700e-9, "step": 2780e-9}
    assert roofline.memory_floor(shape, tokens=5) == pytest.approx(expected)


def test_the_default_shape_is_qwens_and_its_floors_are_the_known_ones() -> None:
    policy = roofline.make_policy(roofline.Options(), grpo.Config(), torch.device("meta")).to(torch.bfloat16)
    shape = roofline.shape_of(policy)
    assert shape.numbers == 494_032_768  # of Qwen/Qwen2-0.5B
    assert shape.head == 151_936 * 896
    assert shape.body == shape.numbers - shape.head
    assert shape.kv * shape.item == 12_288
    floor = roofline.decode_floor(shape, roofline.Machine(4.3e12, 790e12), 64, 512, 128, 256)
    known = {"layers": 0.464, "head": 0.176, "sampling": 0.036, "KV": 0.375}  # ms on an H200
    assert {name: 1000 * floor[name] for name in known} == pytest.approx(known, abs=1e-3)


def test_the_work_of_an_update_counts_signal_and_equal_completions_once(make_model: Any) -> None:
    policy, prompts = make_model("Qwen2"), [[3, 4], [5, 6]]
    ids = torch.tensor([[7, 8, 9], [7, 8, 9], [7, 8, 9], [9, 8, 7]])
    batch = grpo.Rollout(ids, ids > 0, torch.zeros(4, 3), torch.zeros(4, 3))

    def work(*advantages: float) -> float:
        return roofline.work_of(policy, prompts, batch, torch.tensor(advantages), 2)

    assert work(0.0, 0.0, 0.0, 0.0) == 0
    assert work(1.0, -1.0, 0.0, 0.0) == work(1.0, 0.0, 0.0, 0.0) > 0
    # By hand. 2 layers of 8,768 parameters, a head of 96 * 32: 2 prompt tokens and 2 read ones go through the body,
    # 3 through the head; pairs of tokens, half of the square for each part: 2 * (2 + 1) of the row, 2 of the prompt.
    shape = roofline.shape_of(policy)
    assert work(1.0, 0.0, 0.0, 0.0) == 6 * (4 * shape.body + 3 * 96 * 32 + 2 * 2 * 32 * (2 * 3 + 2))
    both = work(0.0, 0.0, 1.0, -1.0)
    assert work(0.0, 0.0, 1.0, 0.0) < both < 2 * work(0.0, 0.0, 1.0, 0.0)  # their prompt is shared


def test_goals_are_reached_or_missed(capsys: pytest.CaptureFixture[str]) -> None:
    roofline.print_goals(
        {"decode, share of the floor": 0.51, "update, MFU": 0.44, "step, s": 2.2, "peak memory, GB": 9}
    )
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[-1].rstrip(" |") for row in rows] == ["reached", "missed", "missed", "reached", "missed"]
    assert rows[-1][2] == "nan"  # not measured


def run(*arguments: str) -> str:
    command = [sys.executable, str(ROOT / "benchmarks/roofline.py"), "--device", "cpu", *SMALL, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return done.stdout


def rows_of(output: str, section: str) -> list[list[str]]:
    """The cells of the table in a section, without its head."""
    lines = output.split(f"## {section}\n")[1].split("\n## ")[0].splitlines()
    return [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")][1:]


def test_the_program_on_a_cpu() -> None:
    output = run("--model", "tiny_policy", "--micro-batch-sizes", "1", "4", "--logits-at-once", "9", "20")
    sections = re.findall(r"^## (.*)", output, re.MULTILINE)
    assert sections == ["Machine, measured", "Decode", "Update", "Whole step", "Goals"]
    assert "failed" not in output
    decode, update, (step,) = (rows_of(output, section) for section in sections[1:4])
    assert [row[0] for row in decode] == ["plain", "static", "generate-dynamic"]
    for _, seconds, rate, share, peak, _ in decode:
        assert float(rate.replace(",", "")) == pytest.approx(16 / float(seconds), rel=0.01)
        assert float(share.rstrip("%")) > 0
        assert peak == "-"
    assert [row[:3] for row in update] == [["no", size, log2] for size in ("1", "4") for log2 in ("9", "20")]
    for row in update:
        assert float(row[3]) > 0
        assert 0 < float(row[5].rstrip("%")) < 100
        assert 0 <= float(row[6]) <= float(row[7]) < 1e-3  # float32
    assert float(step[0]) >= float(step[1]) + float(step[2])
    assert float(step[4].rstrip("%")) == pytest.approx(100 * float(step[3]) / float(step[0]), rel=0.01)
    assert "None: they are set for the default shape" in output


def test_what_fails_is_a_row_that_says_why() -> None:
    output = run("--model", "tiny_policy", "--decode-variants", "captured", "plain")
    captured, plain = rows_of(output, "Decode")
    assert captured[0] == "captured"
    assert captured[-1].startswith("failed: ")
    assert len(captured) == len(plain) == 6
    assert float(plain[1]) > 0
    assert "failed" not in output.split("## Update")[1]
