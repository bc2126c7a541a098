"""benchmarks/roofline.py: its floors by hand."""

import pytest
import roofline


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
    assert [floor[name] for name in ("layers", "head", "KV", "prefill")] == pytest.approx([400, 160, 288, 708])
    assert roofline.adam_floor(shape, machine) == pytest.approx(450.0)  # 30 bytes a parameter, 28 in float32
    # Weights 300 bytes, KV 5 * 16; masters, two states and gradients 150 * 16.
    assert roofline.memory_floor(shape, tokens=5) == pytest.approx({"decode": 380e-9, "step": 2780e-9})
    # 2 prompts and 2 read tokens of 4 rows go through the body, 12 tokens through the head; pairs, half of each square:
    # 2 * 2 of a prompt, 2 * (2 + 1) of a row.
    flops = (2 * 2 + 4 * 2) * 100 + 4 * 3 * 40 + 2 * 6 * (2 * 2 + 4 * 6)
    assert roofline.gradient_flops(shape, prompts=2, rows=4, width=2, length=3) == 6 * flops
