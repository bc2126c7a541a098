"""How far decoding, the update and the whole step are from what the device can do.

    uv run benchmarks/roofline.py                                       # Qwen2-0.5B's shape with random weights
    uv run benchmarks/roofline.py --micro-batch-sizes 32 64 128 --logits-at-once 27 28 29
    uv run benchmarks/roofline.py --model tiny_policy --prompts 8 --generations 4 --completion-length 16    # on a CPU

A floor is the time that the unavoidable reads, writes and multiplications take at the copy bandwidth and the matrix
rate measured here, not at the data sheet's: max(bytes / bandwidth, FLOPs / rate) of each component, summed. Prompts are
random tokens, and nothing ends a completion before its full length. bfloat16 on a GPU, float32 on a CPU.
Prints Markdown for RESULTS.md: medians over the timed steps; what fails is a row that says why.
"""

import contextlib
import dataclasses
import datetime
import gc
import hashlib
import importlib.metadata
import io
import itertools
import math
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any, Literal

import torch
import tyro
from accelerate import PartialState
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import grpo
import grpo_overfit_max_gpu

VARIANTS = {
    "plain": "grpo.rollout without a decoder",
    "static": "Decoder(static=True), not captured",
    "captured": "CUDA graphs by hand, not compiled",
    "compiled": "captured and compiled, as the scripts do on a GPU",
    "reduce-overhead": 'torch.compile(mode="reduce-overhead") in place of our graphs',
    "generate-static": "transformers' generate(), prompts once a completion, no log-probs",
    "generate-dynamic": "the same with its dynamic cache",
}
GOALS: dict[str, tuple[Literal["at least", "at most"], float]] = {  # of the default settings on an H100 or H200
    "decode, share of the floor": ("at least", 0.5), "update, MFU": ("at least", 0.45), "step, s": ("at most", 2.1),
    "peak memory, GB": ("at most", 80), "log-prob gap, mean": ("at most", 0.005),
}  # fmt: skip
GAPS = "train/logprob_gap_mean", "train/logprob_gap_max"
Variant = Literal[
    "plain", "static", "captured", "compiled", "reduce-overhead", "generate-static", "generate-dynamic"
]  # fmt: skip


@dataclass(frozen=True)
class Options:
    """What to measure."""

    model: str = ""
    """Hugging Face id or folder; empty: Qwen2-0.5B's shape with random weights."""
    layers: int = 24
    """Of the random weights."""
    prompts: int = 64
    """Prompts a step."""
    generations: int = 8
    """Completions a prompt."""
    prompt_length: int = 128
    """Tokens of every prompt."""
    completion_length: int = 256
    """Tokens of every completion."""
    decode_variants: tuple[Variant, ...] = ()
    """Ways to decode; empty: all on a GPU, on a CPU those that need none."""
    micro_batch_sizes: tuple[int, ...] = (64,)
    """Completions a forward pass of the update, one row each."""
    logits_at_once: tuple[int, ...] = (27,)
    """log2 of the logits in a chunk of the update, one row each."""
    steps: int = 5
    """Timed steps of each row."""
    warmup: int = 2
    """Steps of each row before these: the first compiles, the first two capture."""
    compile: bool = True
    """On a GPU: also the update with torch.compile."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where it is."""


# ----------------------------------------------------------------------------------------------------------------------
# Floors


@dataclass(frozen=True)
class Machine:
    """What the device was measured to do."""

    bandwidth: float  # bytes a second, read and written
    rate: float  # FLOPs a second, 2 for a multiplication and addition

    def seconds(self, num_bytes: float, flops: float) -> float:
        """Of a component that does both at a time."""
        return max(num_bytes / self.bandwidth, flops / self.rate)


@dataclass(frozen=True)
class Shape:
    """What the floors need to know of a policy."""

    numbers: int  # parameters
    body: int  # those without embedding and head
    head: int
    vocab: int
    attention: int  # query heads * head size, of all layers
    kv: int  # keys and values of a token, of all layers
    item: int  # bytes of a number


def shape_of(policy: Any) -> Shape:
    """From its parameters and its config."""
    config, head = policy.config, policy.get_output_embeddings().weight
    body = sum(p.numel() for p in policy.base_model.parameters()) - policy.get_input_embeddings().weight.numel()
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    kv, item = 2 * layers * key_heads * size, head.element_size()
    return Shape(
        sum(p.numel() for p in policy.parameters()), body, head.numel(), head.shape[0], layers * heads * size, kv, item
    )


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


def adam_floor(shape: Shape, machine: Machine) -> float:
    """Seconds: weight and two states read and written, the gradient read; then the weight in bf16, if so, written."""
    return machine.seconds(shape.numbers * (7 * 4 + 2 * (shape.item < 4)), 0)


def memory_floor(shape: Shape, tokens: int) -> dict[str, float]:
    """GB of each phase. Decode: weights and KV of so many tokens; update: weights, float32 masters where the weights
    are not float32, AdamW's two states, gradients in float32; step: all of these.
    """
    weights, kv = shape.numbers * shape.item / 1e9, tokens * shape.kv * shape.item / 1e9
    trained = weights + shape.numbers * (4 * (shape.item < 4) + 8 + 4) / 1e9
    return {"decode": weights + kv, "update": trained, "step": trained + kv}


# ----------------------------------------------------------------------------------------------------------------------
# What is measured, and with what


def clock(device: torch.device) -> float:
    """Seconds, once the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def measure(work: Callable[[], Any], options: Options, device: torch.device) -> tuple[list[float], float | None, list]:
    """(seconds of the timed steps, their peak memory in GB if on a GPU, the results of all steps)."""
    results, seconds = [work() for _ in range(options.warmup)], []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(options.steps):
        start = clock(device)
        results.append(work())
        seconds.append(clock(device) - start)
    return seconds, torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None, results


def measure_machine(device: torch.device) -> Machine:
    """By copies within its memory and by products of square matrices, of random numbers as these draw most power."""
    cuda, options = device.type == "cuda", Options(warmup=3, steps=5)
    source = torch.ones(2 * 10**9 if cuda else 2 * 10**8, dtype=torch.uint8, device=device)
    target, repeats = torch.zeros_like(source), 10 if cuda else 1
    copies, _, _ = measure(lambda: [target.copy_(source) for _ in range(repeats)][:0], options, device)
    size, dtype = (8192, torch.bfloat16) if cuda else (1024, torch.float32)
    a, b, out = (torch.randn(size, size, device=device).to(dtype) for _ in range(3))
    products, _, _ = measure(lambda: [torch.mm(a, b, out=out) for _ in range(repeats)][:0], options, device)
    return Machine(2 * source.numel() * repeats / fmean(copies), 2 * size**3 * repeats / fmean(products))


def make_policy(options: Options, config: grpo.Config, device: torch.device) -> Any:
    """As the scripts load it, or with random weights."""
    if options.model:
        if options.layers != Options.layers:
            grpo.fail(2, "--layers is of the random weights: leave out --model, or --layers")
        return grpo.load_policy(config, device)
    from transformers import AutoModelForCausalLM, Qwen2Config

    shape = Qwen2Config(
        vocab_size=151_936, hidden_size=896, intermediate_size=4864, num_hidden_layers=options.layers,
        num_attention_heads=14, num_key_value_heads=2, max_position_embeddings=32_768, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )  # fmt: skip
    torch.manual_seed(0)
    with device:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        return AutoModelForCausalLM.from_config(shape, dtype=dtype).eval()


def make_learner(policy: Any, config: grpo.Config) -> grpo.Learner:
    """As grpo.make_learner does, without tokenizer and rewards."""
    masters = [p.detach().float() if p.dtype == torch.bfloat16 else p for p in policy.parameters()]
    optimizer = torch.optim.AdamW(masters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)
    decoder = grpo.Decoder(policy, static=True) if policy.device.type == "cuda" else None
    return grpo.Learner(config, {}, policy, None, [], masters, optimizer, None, decoder)


def sample(policy: Any, prompts: grpo.Prompts, config: grpo.Config, noise: Tensor, decoder: Any) -> grpo.Rollout:
    """Completions of full length."""
    batch = grpo.rollout(
        policy, prompts, num_generations=config.num_generations, max_completion_length=config.max_completion_length,
        temperature=config.temperature, eos_ids=[], noise=noise, decoder=decoder,
    )  # fmt: skip
    assert batch.completion_mask.shape == noise.shape, "a completion is missing, or too short"
    return batch


def draw_noise(config: grpo.Config, step: int) -> Tensor:
    """As a training step draws it."""
    groups, length = config.num_generations, config.max_completion_length
    noise = grpo.uniform_noise(config.seed, "sampling", step, config.prompts_per_step, groups * length)
    return noise.view(-1, length)


@contextlib.contextmanager
def row(*cells: str, width: int) -> Iterator[list[str]]:
    """Prints a row of the table, to whose list the caller adds the further cells; or, if it raises, the reason."""
    further: list[str] = []
    gc.collect()  # of the row before, also if it failed
    torch.cuda.empty_cache()
    try:
        yield further
    except Exception as error:  # noqa: BLE001  # whatever a compiler may raise: the benchmark goes on
        reason = " ".join(str(error).split()).replace("|", "/")
        further = ["-"] * (width - len(cells) - 1) + [f"failed: {type(error).__name__}: {reason:.160}"]
    print(f"| {' | '.join([*cells, *further])} |", flush=True)


def table(*header: str) -> int:
    """Prints its head; returns its width."""
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}", flush=True)
    return len(header)


def gigabytes(peak: float | None) -> str:
    return "-" if peak is None else f"{peak:.2f}"


# ----------------------------------------------------------------------------------------------------------------------
# The phases. Each prints its section and returns what the next ones and the goals need.


def sampler(variant: str, policy: Any, prompts: grpo.Prompts, config: grpo.Config, noise: Tensor) -> Callable[[], Any]:
    """A rollout in one of the VARIANTS; raises if it came out otherwise."""
    policy.fuse, length = variant == "compiled", config.max_completion_length
    if variant.startswith("generate"):
        policy.set_attn_implementation("sdpa")  # transformers' own; grpo.forward takes it back
        ids = torch.tensor(prompts, device=policy.device).repeat_interleave(config.num_generations, 0)
        how: dict[str, Any] = {"cache_implementation": "static"} if variant == "generate-static" else {}
        how |= {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": config.temperature}
        how |= {"repetition_penalty": 1.0, "min_new_tokens": length, "max_new_tokens": length, "pad_token_id": 0}

        def run_generate() -> None:
            out = policy.generate(ids, attention_mask=torch.ones_like(ids), **how)
            assert out.shape == (len(ids), ids.shape[1] + length), "a completion is missing, or too short"

        return run_generate
    decoder = None if variant == "plain" else grpo.Decoder(policy, static=True)
    if decoder:
        decoder.capture = variant in ("captured", "compiled")
        if variant == "reduce-overhead":
            decoder.step = torch.compile(decoder.decode, mode="reduce-overhead", dynamic=False)

    def run_rollout() -> None:
        with contextlib.redirect_stdout(said := io.StringIO()):
            sample(policy, prompts, config, noise, decoder)
        if said.getvalue():  # the decoder could not capture, and went on without
            raise RuntimeError(said.getvalue())
        if decoder and decoder.most:
            raise RuntimeError(f"only {min(decoder.most.values())} rows at a time fit into memory")

    return run_rollout


def print_decode(options: Options, policy: Any, prompts: grpo.Prompts, config: grpo.Config,
                 floor: dict[str, float], memory: float | None) -> dict[str, float]:  # fmt: skip
    """Seconds of each way to decode."""
    import torch._inductor.config as inductor

    device, noise, found = policy.device, draw_noise(config, 0), {}
    parts = ", ".join(f"{name} {1000 * floor[name]:.3g}" for name in ("layers", "head", "sampling", "KV"))
    print(f"""
## Decode

Floor of a step of {len(noise)} rows at mean context, ms: {parts}.
Of the prefill, each prompt once: {1000 * floor["prefill"]:.3g}. Of the rollout: {floor["all"]:.4g} s.
Memory, weights and KV: {gigabytes(memory)} GB.
""")
    width = table("way", "s", "tokens/s", "of the floor", "peak GB", "note")
    on_cpu = "plain", "static", "generate-dynamic"
    for variant in options.decode_variants or (VARIANTS if device.type == "cuda" else on_cpu):
        torch.compiler.reset()
        torch._dynamo.config.suppress_errors = False  # with it the scripts go on, uncompiled: here it is an error
        strict = {"triton.cudagraph_or_error": True} if hasattr(inductor.triton, "cudagraph_or_error") else {}
        with row(variant, width=width) as cells, inductor.patch(strict):  # strict: else it leaves its graphs out
            seconds, peak, _ = measure(sampler(variant, policy, prompts, config, noise), options, device)
            found[variant] = median(seconds)
            rate, share = noise.numel() / found[variant], floor["all"] / found[variant]
            cells += [f"{found[variant]:.4g}", f"{rate:,.0f}", f"{share:.1%}", gigabytes(peak), VARIANTS[variant]]
    return found


def work_of(policy: Any, prompts: grpo.Prompts, batch: grpo.Rollout, advantages: Tensor, groups: int) -> float:
    """FLOPs of the exact gradient: completions with signal, a prompt's equal ones once, as `update` does."""
    rows = advantages.nonzero()[:, 0]
    if not len(rows):
        return 0.0
    index = (rows // groups)[:, None]
    index = torch.unique(torch.cat([index, batch.completion_ids[rows]], 1), dim=0)[:, 0]
    return grpo_overfit_max_gpu.gradient_flops(policy, prompts, torch.full_like(index, batch.logprobs.shape[1]), index)


def measure_update(options: Options, learner: grpo.Learner, prompts: grpo.Prompts,
                   machine: Machine) -> tuple[float, list[str]]:  # fmt: skip
    """(MFU, the cells of its row)."""
    config, policy, noise = learner.config, learner.policy, draw_noise(learner.config, 1)
    policy.zero_grad()  # what a row that failed has left
    batch = sample(policy, prompts, config, noise, learner.decoder)
    advantages = ((noise[:, 0] - 0.5).sign() * (0.5 + noise[:, -1])).float().to(policy.device)  # none of them zero
    flops = work_of(policy, prompts, batch, advantages, config.num_generations)
    seconds, peak, metrics = measure(
        lambda: grpo.update(learner, prompts, batch, advantages, batch.completion_mask), options, policy.device
    )
    assert all("train/grad_norm" in m for m in metrics), "the loss or its gradient is not finite"
    s, floor = median(seconds), flops / machine.rate + adam_floor(shape_of(policy), machine)
    gaps = [f"{metrics[0][key]:.2g}" for key in GAPS]  # later the weights have moved
    mfu = flops / s / machine.rate
    return mfu, [f"{s:.4g}", f"{floor:.4g}", f"{mfu:.1%}", *gaps, gigabytes(peak)]


def print_update(options: Options, policy: Any, prompts: grpo.Prompts, config: grpo.Config, machine: Machine,
                 memory: float | None) -> tuple[float, int, int]:  # fmt: skip
    """As the scripts are compiled: the best MFU, its micro-batch size and log2 of logits at once."""
    best, compiles = (0.0, 0, 0), (False, True) if options.compile and policy.device.type == "cuda" else (False,)
    print(f"""
## Update

Every completion carries signal. MFU: FLOPs of the exact gradient, without recomputation, a second, of the measured
matrix rate. The seconds include AdamW (floor {adam_floor(shape_of(policy), machine):.2g} s). The log-prob gap, of
sampler and trainer, is the one just after the rollout; random weights may make it smaller than a trained policy's.
Floor of the memory, weights, masters, AdamW's state and gradients: {gigabytes(memory)} GB; the peak has the rollout's
buffers too.
""")
    header = "compiled", "micro-batch", "log2 logits at once", "s", "floor s", "MFU", "gap mean", "gap max", "peak GB"
    width = table(*header)
    for compiled in compiles:
        torch.compiler.reset()  # never under a decoder whose graphs are still in use
        policy.fuse, torch._dynamo.config.suppress_errors = compiled, False
        learner = make_learner(policy, config)
        for size, log2 in itertools.product(options.micro_batch_sizes, options.logits_at_once):
            grpo.LOGITS_AT_ONCE = 2**log2
            learner.config = dataclasses.replace(config, micro_batch_size=size)
            with row("yes" if compiled else "no", str(size), str(log2), width=width) as cells:
                mfu, further = measure_update(options, learner, prompts, machine)
                cells += further
                best = max(best, (mfu, size, log2)) if compiled == compiles[-1] else best
        del learner  # before the next
    return best


def print_step(options: Options, policy: Any, prompts: grpo.Prompts, config: grpo.Config, machine: Machine,
               decode_s: float, memory: float | None, size: int, log2: int) -> dict[str, float]:  # fmt: skip
    """The figures of the whole step that have goals."""
    torch.compiler.reset()
    device, compiled = policy.device, options.compile and policy.device.type == "cuda"
    policy.fuse = torch._dynamo.config.suppress_errors = compiled
    grpo.LOGITS_AT_ONCE, config = 2**log2, dataclasses.replace(config, micro_batch_size=size)
    learner, numbered, figures = make_learner(policy, config), itertools.count(2), dict[str, float]()

    def step() -> dict[str, Any]:
        start = time.perf_counter()
        batch = sample(policy, prompts, config, draw_noise(config, next(numbered)), learner.decoder)
        ids = batch.completion_ids.tolist()
        rollout_s = time.perf_counter() - start
        coins = torch.tensor([float(hashlib.sha256(str(tokens).encode()).digest()[0] % 2) for tokens in ids])
        advantages = grpo.group_advantages(coins, config.num_generations).to(device)
        metrics = grpo.update(learner, prompts, batch, advantages, batch.completion_mask)
        assert "train/grad_norm" in metrics, "the loss or its gradient is not finite"
        return metrics | {"time/rollout_s": rollout_s, "batch": batch, "advantages": advantages}

    print(f"""
## Whole step

A rollout and the update on it, {"compiled" if compiled else "not compiled"}, micro-batches of {size}, 2^{log2} logits
at once. Rewards are coins that a hash of the ids decides; reward functions and tokenizer are left out.
Floor of the memory, that of the update and the rollout's KV: {gigabytes(memory)} GB.
""")
    width = table("s", "rollout s", "update s", "floor s", "of the floor", "tokens/s", "gap mean", "gap max", "peak GB")
    with row(width=width) as cells:
        seconds, peak, steps = measure(step, options, device)
        steps, groups = steps[options.warmup :], config.num_generations
        flops = fmean(work_of(policy, prompts, m["batch"], m["advantages"], groups) for m in steps)
        floor = decode_s + flops / machine.rate + adam_floor(shape_of(policy), machine)
        s = median(seconds)
        phases = [f"{median(m[f'time/{name}_s'] for m in steps):.4g}" for name in ("rollout", "update")]
        told = [m for m in steps if GAPS[0] in m] or [dict.fromkeys(GAPS, math.nan)]  # had signal
        mean, largest = fmean(m[GAPS[0]] for m in told), max(m[GAPS[1]] for m in told)
        figures = {"step, s": s, "log-prob gap, mean": mean} | ({"peak memory, GB": peak} if peak else {})
        cells += [f"{s:.4g}", *phases, f"{floor:.4g}", f"{floor / s:.1%}"]
        cells += [f"{steps[0]['batch'].logprobs.numel() / s:,.0f}", f"{mean:.2g}", f"{largest:.2g}", gigabytes(peak)]
    return figures


def print_goals(figures: dict[str, float]) -> None:
    """Each goal, what was measured, and whether that reaches it."""
    table("goal", "", "measured", "")
    for name, (sense, goal) in GOALS.items():
        value = figures.get(name, math.nan)  # nan, what was not measured, reaches nothing
        reached = value >= goal if sense == "at least" else value <= goal
        print(f"| {name} | {sense} {goal:g} | {value:.3g} | {'reached' if reached else 'missed'} |")


def print_header(device: torch.device, policy: Any) -> None:
    """Command, commit, versions and machine."""
    git = ["git", "-C", str(Path(grpo.__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else f"{platform.machine()}, {torch.get_num_threads()} threads"
    versions = (f"{package} {importlib.metadata.version(package)}" for package in ("torch", "transformers"))
    print("# Roofline\n")
    print(f"- Command: `uv run benchmarks/{shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}`")
    print(f"- Commit {subprocess.run(git, capture_output=True, text=True).stdout.strip()}, {datetime.date.today()}")
    print(f"- Python {platform.python_version()}, {', '.join(versions)}")
    print(f"- Device {device.type}: {name}")
    print(f"- Policy: {type(policy).__name__}, {shape_of(policy).numbers:,} parameters, {policy.dtype}")


def main(options: Options) -> None:
    """Prints all sections."""
    from transformers import logging

    logging.set_verbosity_error()
    cuda = options.device == "cuda" or (options.device == "auto" and torch.cuda.is_available())
    device = PartialState(cpu=not cuda).device
    config = dataclasses.replace(
        grpo.Config(), model=options.model, prompts_per_step=options.prompts, num_generations=options.generations,
        max_prompt_length=options.prompt_length, max_completion_length=options.completion_length, learning_rate=1e-6,
    )  # fmt: skip
    policy = make_policy(options, config, device)
    print_header(device, policy)
    shape, rows = shape_of(policy), options.prompts * options.generations
    lengths = f"{options.prompt_length} + {options.completion_length} tokens"
    print(f"- {options.prompts} prompts x {options.generations} generations = {rows} completions, {lengths};", end="")
    print(f" medians of {options.steps} steps after {options.warmup} of warmup", flush=True)
    machine = measure_machine(device)
    print("\n## Machine, measured\n\nAll floors below use these two figures.\n")
    table("copy bandwidth, read and written", "matrix rate")
    print(f"| {machine.bandwidth / 1e9:,.1f} GB/s | {machine.rate / 1e12:.4g} TFLOP/s |", flush=True)

    chance = torch.Generator().manual_seed(0)
    prompts = torch.randint(shape.vocab, (options.prompts, options.prompt_length), generator=chance).tolist()
    floor = decode_floor(shape, machine, options.prompts, rows, options.prompt_length, options.completion_length)
    tokens = rows * (options.prompt_length + options.completion_length)
    memory: dict[str, Any] = {k: v if cuda else None for k, v in memory_floor(shape, tokens).items()}
    found = print_decode(options, policy, prompts, config, floor, memory["decode"])
    mfu, *how = print_update(options, policy, prompts, config, machine, memory["update"])
    size, log2 = how if mfu else (options.micro_batch_sizes[0], options.logits_at_once[0])
    figures = print_step(options, policy, prompts, config, machine, floor["all"], memory["step"], size, log2)
    figures |= {"update, MFU": mfu} if mfu else {}
    figures |= {"decode, share of the floor": floor["all"] / found["compiled"]} if "compiled" in found else {}
    free = "decode_variants", "micro_batch_sizes", "logits_at_once", "steps", "warmup", "device"
    default = options == Options(**{name: getattr(options, name) for name in free})
    print("\n## Goals\n")
    name = torch.cuda.get_device_name(device) if cuda else ""
    if default and ("H100" in name or "H200" in name):
        print_goals(figures)
    else:
        print("None: they are set for the default shape on an H100 or H200.")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
