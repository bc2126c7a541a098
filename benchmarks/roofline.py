"""How far decoding, the update and the whole step of grpo.py are from what the device can do.

    uv run benchmarks/roofline.py                                       # Qwen2-0.5B's shape with random weights
    uv run benchmarks/roofline.py --model models/tiny --prompts 8 --generations 4 --completion-length 16    # on a CPU

A floor is the time that the unavoidable reads, writes and multiplications take at the copy bandwidth and the matrix
rate measured here, not at the data sheet's: max(bytes / bandwidth, FLOPs / rate) of each component, summed. Prompts are
random tokens, nothing ends a completion before its full length, and every completion carries signal. Steps are those of
grpo.main, their seconds those that it logs. bfloat16 on a GPU, float32 on a CPU. Prints Markdown for RESULTS.md:
medians over the timed steps.
"""

import contextlib
import dataclasses
import json
import sys
import tempfile
import time
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any
from unittest import mock

import torch
import tyro
from accelerate import PartialState
from vs_trl import Ended, forced_reward, grpo, patched, print_header

WARMUP = 2  # steps of each row before those that are timed


@dataclass(frozen=True)
class Options:
    """What to measure."""

    model: str = ""
    """Hugging Face id or folder; empty: Qwen2-0.5B's shape with random weights."""
    prompts: int = 64
    generations: int = 8
    prompt_length: int = 128
    completion_length: int = 256
    micro_batch_sizes: tuple[int, ...] = (64,)
    """Completions a forward pass of the update, one row of the table each."""
    steps: int = 5
    """Timed, of each row, after two of warmup."""


@dataclass(frozen=True)
class Machine:
    """What the device was measured to do."""

    bandwidth: float  # bytes a second, read and written
    rate: float  # FLOPs a second, 2 for a multiplication and addition

    def seconds(self, num_bytes: float, flops: float) -> float:
        """Of a component that does both at a time."""
        return max(num_bytes / self.bandwidth, flops / self.rate)


# Of a policy: its parameters, those without embedding and head, and the head's; the vocabulary; query heads * head size
# and numbers of keys and values of a token, both of all layers; bytes of a number.
Shape = namedtuple("Shape", "numbers body head vocab attention kv item")


def shape_of(policy: Any) -> Shape:
    """From its parameters and its config."""
    config, head = policy.config, policy.get_output_embeddings().weight
    numbers = sum(p.numel() for p in policy.parameters())
    body = sum(p.numel() for p in policy.base_model.parameters()) - policy.get_input_embeddings().weight.numel()
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv = 2 * layers * (getattr(config, "num_key_value_heads", None) or heads) * size
    return Shape(numbers, body, head.numel(), head.shape[0], layers * heads * size, kv, head.element_size())


def decode_floor(shape: Shape, machine: Machine, prompts: int, rows: int, width: int, length: int) -> dict[str, float]:
    """Seconds: the components of a decode step at mean context, "prefill" of each prompt once, and "all" of a rollout.

    The first token of a completion comes from the prefill: length - 1 steps read a token, the head works length times.
    """
    context, logits = width + length / 2, rows * shape.vocab  # of a step's rows, averaged over the steps
    parts = {
        "layers": machine.seconds(shape.body * shape.item, 2 * shape.body * rows),
        "head": machine.seconds((shape.head + logits) * shape.item, 2 * shape.head * rows),
        "sampling": machine.seconds(logits * shape.item, 0),
        "KV": machine.seconds(rows * context * shape.kv * shape.item, 4 * rows * context * shape.attention),
    }
    flops = 2 * prompts * width * (shape.body + shape.attention * width)  # half of the pairs are masked
    prefill = machine.seconds(shape.body * shape.item, flops)
    steps = (length - 1) * (parts["layers"] + parts["KV"]) + length * (parts["head"] + parts["sampling"])
    return parts | {"prefill": prefill, "all": prefill + steps}


def sampling_bytes(item: int) -> int:
    """Bytes that `rollout` moves for each logit of a step, as it is written: its passes over (B, V), read and written.

    item: bytes of a number of the policy. After the head everything is float32, but for the sum of the inverse CDF.
    Counted are PyTorch's kernels for a vocabulary whose rows do not fit into a GPU's shared memory, without its cache.
    Drawing a token and its log-prob read a few numbers of a row, which is no pass.
    """
    passes = {
        "head": item,  # written
        "to float32": item + 4 if item < 4 else 0,
        "scale": 4 + 4,  # by the temperature
        "softmax": 3 * 4 + 4,  # read for the largest, for the sum and for the quotient, which is written
        "to float64": 4 + 8,  # cumsum converts before it adds
        "cumsum": 8 + 8,
        "product": 4 + 4 + 4,  # probs * logits, for the entropy
        "sum": 4,
    }
    return sum(passes.values())


def gradient_flops(shape: Shape, prompts: int, rows: int, width: int, length: int) -> float:
    """Of the exact gradient, forward and twice that backward: prompts once for their group, without recomputation."""
    tokens = prompts * width + rows * (length - 1)  # the last token of a completion is not read
    pairs = prompts * width**2 / 2 + rows * (length - 1) * (width + (length - 1) / 2)  # half of the squares are masked
    return 6 * (shape.body * tokens + shape.head * rows * length + 2 * shape.attention * pairs)


def adam_floor(shape: Shape, machine: Machine) -> float:
    """Seconds: weight and two states read and written, the gradient read; then the weight in bf16, if so, written."""
    return machine.seconds(shape.numbers * (7 * 4 + 2 * (shape.item < 4)), 0)


def memory_floor(shape: Shape, tokens: int) -> dict[str, float]:
    """GB. Decode: weights and KV of so many tokens; step: also float32 masters where the weights are not float32,
    AdamW's two states, and gradients in float32.
    """
    decode = (shape.numbers + tokens * shape.kv) * shape.item / 1e9
    return {"decode": decode, "step": decode + shape.numbers * (4 * (shape.item < 4) + 8 + 4) / 1e9}


def reset_memory(device: torch.device) -> None:
    """Of what rows before have used."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def measure(work: Callable[[], Any], steps: int, device: torch.device) -> list[float]:
    """Seconds of each timed step."""
    seconds = []
    for _ in range(WARMUP + steps):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return seconds[WARMUP:]


def measure_machine(device: torch.device) -> Machine:
    """By copies within its memory and by products of square matrices, of random numbers as these draw most power."""
    cuda = device.type == "cuda"
    source = torch.ones(2 * 10**9 if cuda else 2 * 10**8, dtype=torch.uint8, device=device)
    target, repeats = torch.zeros_like(source), 10 if cuda else 1
    copies = measure(lambda: [target.copy_(source) for _ in range(repeats)], 5, device)
    size, dtype = (8192, torch.bfloat16) if cuda else (1024, torch.float32)
    a, b, out = (torch.randn(size, size, device=device).to(dtype) for _ in range(3))
    products = measure(lambda: [torch.mm(a, b, out=out) for _ in range(repeats)], 5, device)
    return Machine(2 * source.numel() * repeats / fmean(copies), 2 * size**3 * repeats / fmean(products))


def make_model(device: torch.device) -> Any:
    """Qwen2-0.5B's shape with random weights."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    shape = Qwen2Config(vocab_size=151_936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
                        num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True)  # fmt: skip
    with device:
        return AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)


def print_row(*cells: str, header: bool = False) -> None:
    """Of a Markdown table."""
    print(f"| {' | '.join(cells)} |" + f"\n|{'---|' * len(cells)}" * header, flush=True)


def print_decode(options: Options, config: grpo.Config, prompts: list[list[int]], device: torch.device,
                 machine: Machine) -> dict[str, float]:  # fmt: skip
    """Seconds of a rollout, as the scripts do it and without CUDA graphs; returns its floors."""
    policy = grpo.load_policy(config, device)
    shape, rows = shape_of(policy), len(prompts) * options.generations
    noise = grpo.uniform_noise(1, "sampling", 0, rows, options.completion_length)
    floor = decode_floor(shape, machine, len(prompts), rows, options.prompt_length, options.completion_length)
    memory = memory_floor(shape, rows * (options.prompt_length + options.completion_length))["decode"]
    parts = ", ".join(f"{name} {1000 * floor[name]:.3g}" for name in ("layers", "head", "sampling", "KV"))
    print(f"\n## Decode\n\nFloor of a step of {rows} rows at mean context, ms: {parts}.")
    print(f"Of the prefill, each prompt once: {1000 * floor['prefill']:.3g}. Of the rollout: {floor['all']:.4g} s.\n")
    print_row("way", "graphs captured", "s", "tokens/s", "of the floor", "peak GB", "its floor", header=True)
    how: dict[str, Any] = {"num_generations": options.generations, "max_completion_length": options.completion_length}
    how |= {"eos_ids": [], "noise": noise, "temperature": 1.0}
    graphs = torch.cuda.CUDAGraph if device.type == "cuda" else None
    for way in ("captured", "eager") if graphs else ("eager",):
        reset_memory(device)
        policy._can_compile_fullgraph &= way == "captured"  # which the rollout asks before it captures
        with mock.patch("torch.cuda.CUDAGraph", side_effect=graphs) as made:
            s = median(measure(lambda: grpo.rollout(policy, prompts, **how), options.steps, device))
        cells = [way, f"{made.call_count / (options.steps + WARMUP):g}", f"{s:.4g}", f"{noise.numel() / s:,.0f}"]
        peak = f"{torch.cuda.max_memory_allocated(device) / 1e9:.2f}" if graphs else "-"
        print_row(*cells, f"{floor['all'] / s:.1%}", peak, f"{memory:.2f}")
    size, weights = sampling_bytes(shape.item), (shape.body + shape.head) * shape.item
    moved = rows * shape.vocab * size
    print(f"\nSampling as written moves {size} bytes a logit, {moved / 1e9:.3g} GB a step of {rows} rows: ", end="")
    print(f"{1000 * moved / machine.bandwidth:.3g} ms at the measured bandwidth. Weights read: ", end="")
    print(f"{weights / 1e9:.3g} GB, {1000 * weights / machine.bandwidth:.3g} ms.")
    return floor


def print_step(options: Options, config: grpo.Config, prompts: list[list[int]], device: torch.device,
               machine: Machine, shape: Shape, decode_s: float) -> None:  # fmt: skip
    """Rollout, update and step of grpo.main, by micro-batch size."""
    rows = len(prompts) * options.generations
    flops = gradient_flops(shape, len(prompts), rows, options.prompt_length, options.completion_length)
    update_s = flops / machine.rate + adam_floor(shape, machine)
    memory = memory_floor(shape, rows * (options.prompt_length + options.completion_length))["step"]
    print(f"""
## Step

Floors, s: rollout {decode_s:.4g}, update {update_s:.4g}, of which AdamW {adam_floor(shape, machine):.2g}. MFU: FLOPs of
the exact gradient, without recomputation, a second of update, of the measured matrix rate; equal completions, which
random weights do not make, count twice. Peak memory: on a GPU. Log-prob gap: of sampler and trainer.
""")
    print_row("micro-batch", "step s", "of the floor", "rollout s", "update s", "of the floor", "MFU", "tokens/s",
              "gap, most", "peak GB", "its floor", header=True)  # fmt: skip
    rollout, problems = grpo.rollout, [{"question": "", "answer": "0"}] * len(prompts)

    def begin_step(train: Any, step: int, config: grpo.Config) -> Any:
        if step == config.num_steps:  # after it there would be an evaluation and a checkpoint
            raise Ended
        return train

    stubs = {
        "load_problems": lambda _: (problems, [], []),
        "problems_of_step": begin_step,
        "tokenize_prompts": lambda tokenizer, problems, config: prompts[: len(problems)],
        "load_rewards": lambda *_: {"signal": (forced_reward, 1.0)},
        "rollout": lambda *args, **how: rollout(*args, **how | {"eos_ids": []}),
    }
    for size in options.micro_batch_sizes:
        with tempfile.TemporaryDirectory() as folder:
            reset_memory(device)
            run = dataclasses.replace(config, run_dir=folder, micro_batch_size=size)
            with patched(grpo, **stubs), contextlib.redirect_stdout(sys.stderr), contextlib.suppress(Ended):
                grpo.main(run)
            (path,) = Path(folder).glob("*/metrics.jsonl")
            steps = [json.loads(line) for line in path.read_text().splitlines()][1 + WARMUP :]
            rollout_s, reward_s, s = (median(m[f"time/{k}_s"] for m in steps) for k in ("rollout", "reward", "update"))
            total, tokens = rollout_s + reward_s + s, rows * options.completion_length
            cells = [f"{size}", f"{total:.4g}", f"{(decode_s + update_s) / total:.1%}", f"{rollout_s:.4g}", f"{s:.4g}"]
            cells += [f"{update_s / s:.1%}", f"{flops / s / machine.rate:.1%}", f"{tokens / total:,.0f}"]
            gap = max(m["train/logprob_gap_max"] for m in steps)
            # Only a GPU's memory is reported.
            peak = f"{steps[-1]['perf/peak_memory_gb']:.2f}" if "perf/peak_memory_gb" in steps[-1] else "-"
            print_row(*cells, f"{gap:.2g}", peak, f"{memory:.2f}")


def main(options: Options) -> None:
    """Prints all sections."""
    torch.manual_seed(0)
    from transformers import AutoTokenizer

    device = PartialState(cpu=not torch.cuda.is_available()).device
    print_header(device)
    with tempfile.TemporaryDirectory() as folder:
        if not options.model:  # nothing is read: any tokenizer will do
            make_model(device).save_pretrained(folder)
            AutoTokenizer.from_pretrained(Path(grpo.__file__).parent / "models" / "tiny").save_pretrained(folder)
        config = grpo.Config(
            model=options.model or folder, num_steps=WARMUP + options.steps + 1, learning_rate=1e-6,
            prompts_per_step=options.prompts, num_generations=options.generations, eval_every=0, save_every=0,
            max_prompt_length=options.prompt_length, max_completion_length=options.completion_length,
        )  # fmt: skip
        shape = shape_of(grpo.load_policy(config, device))
        print(f"- {shape.numbers:,} parameters of {shape.item} bytes; {options}; {WARMUP} steps of warmup")
        machine = measure_machine(device)
        print("\n## Machine, measured\n")
        print_row("copy bandwidth, read and written", "matrix rate", header=True)
        print_row(f"{machine.bandwidth / 1e9:,.1f} GB/s", f"{machine.rate / 1e12:.4g} TFLOP/s")
        prompts = torch.randint(shape.vocab, (options.prompts, options.prompt_length)).tolist()
        floor = print_decode(options, config, prompts, device, machine)
        print_step(options, config, prompts, device, machine, shape, floor["all"])


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
