"""Decoding in static buffers and as CUDA graphs, in parts, compiled: the same tokens as the plain path; the preflight.

No GPU is needed: a CUDA graph is played by `Graph`, which records the operations of a step, with the tensors they read
and write, and repeats these on replay, as a GPU would. What depends on anything else than the device's own memory, a
Python number or a tensor made anew, comes out wrong.
"""

import contextlib
import copy
import dataclasses
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import grpo

LENGTH = 24
SYNCHRONIZING = {"_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "item"}


class Graph(TorchDispatchMode):
    """torch.cuda.CUDAGraph and torch.cuda.graph in one, on a CPU."""

    captured: ClassVar[list["Graph"]] = []  # all of a test

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.replays = 0
        Graph.captured.append(self)

    def pool(self) -> str:
        return "pool"

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.overloadpacket.__name__ in SYNCHRONIZING:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        self.replays += 1
        for function, args, kwargs, result in self.calls:
            again = function(*args, **kwargs)
            for old, new in zip(*(x if isinstance(x, tuple | list) else [x] for x in (result, again)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@contextlib.contextmanager
def capturing(graph: Graph, pool: Any, decoder: grpo.Decoder) -> Iterator[None]:
    """A capture runs nothing: what the recording changed is put back."""
    assert pool in (None, "pool")
    before = {name: buffer.clone() for name, buffer in decoder.buffers.items()}
    try:
        with graph:
            yield
    finally:
        for name, buffer in decoder.buffers.items():
            buffer.copy_(before[name])


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a decoder that captures."""
    Graph.captured = []

    def make(policy: Any) -> grpo.Decoder:
        decoder = grpo.Decoder(policy, static=True)
        decoder.capture = True
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph", lambda graph, pool, **how: capturing(graph, pool, decoder))
        return decoder

    return make


def prompts_of(*lengths: int) -> grpo.Prompts:
    generator = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(3, 90, (length,), generator=generator).tolist() for length in lengths]


def sample(policy: Any, prompts: grpo.Prompts, decoder: Any = None, *, length: int = LENGTH, groups: int = 24,
           eos_ids: tuple[int, ...] = (1, 2), greedy: bool = False, seed: int = 1) -> grpo.Rollout:  # fmt: skip
    noise = None if greedy else grpo.uniform_noise(seed, "test", 0, len(prompts) * groups, length)
    return grpo.rollout(policy, prompts, num_generations=groups, max_completion_length=length, temperature=0.8,
                        eos_ids=list(eos_ids), noise=noise, decoder=decoder)  # fmt: skip


def assert_equal(a: grpo.Rollout, b: grpo.Rollout, error: float = 1e-9) -> None:
    assert torch.equal(a.completion_mask, b.completion_mask)
    assert torch.equal(a.completion_ids, b.completion_ids)
    for x, y in ((a.logprobs, b.logprobs), (a.entropy, b.entropy)):
        assert (x - y).abs().max() <= error


# Rollouts one after another: what the second finds in the buffers is the first one's.
SERIES: list[dict[str, Any]] = [
    {"prompts": prompts_of(5, 9, 7, 3)},
    {"prompts": prompts_of(5, 9, 7, 3), "seed": 2},
    {"prompts": prompts_of(11, 2), "greedy": True},
    {"prompts": prompts_of(110, 8, 9, 6), "length": 40, "eos_ids": tuple(range(20))},  # from 128 keys to 256
    {"prompts": prompts_of(4, 4, 4, 4), "eos_ids": ()},
    {"prompts": prompts_of(6), "groups": 5, "length": 1},
    {"prompts": prompts_of(9, 5, 3, 7), "eos_ids": tuple(range(30))},
]


# ----------------------------------------------------------------------------------------------------------------------
# Equality with the plain path


def test_static_buffers_change_no_token(make_model: Any) -> None:
    policy = make_model("Qwen2").double()
    decoder = grpo.Decoder(policy, static=True)
    for settings in SERIES:
        assert_equal(sample(policy, decoder=decoder, **settings), sample(policy, **settings))


@pytest.mark.parametrize("family", ["Qwen2", "Llama", "GPTNeoX"])
def test_cuda_graphs_change_no_token_and_see_new_weights(family: str, make_model: Any, graphs: Any) -> None:
    policy = make_model(family).double()
    decoder = graphs(policy)
    for settings in SERIES + SERIES[:2]:
        assert_equal(sample(policy, decoder=decoder, **settings), sample(policy, **settings))
        with torch.no_grad():
            for weight in policy.parameters():  # as the optimizer does: in place
                weight.add_(0.03 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel())))
    assert sum(graph.replays for graph in Graph.captured) > 100
    assert decoder.capture


def test_a_graph_is_captured_once_for_each_shape(make_model: Any, graphs: Any) -> None:
    policy = make_model("Qwen2").double()
    decoder, prompts = graphs(policy), prompts_of(5, 9, 7, 3)
    for seed in range(4):
        sample(policy, prompts, decoder, eos_ids=(), seed=seed)
    assert len(Graph.captured) == 1
    assert Graph.captured[0].replays == 4 * (LENGTH - 1) - 1  # all steps but the first


def test_a_graph_of_a_small_rollout_is_not_one_of_a_large_one(make_model: Any, graphs: Any) -> None:
    """Both come to the same number of rows and keys, but not the same records."""
    policy = make_model("Qwen2").double()
    decoder, ends = graphs(policy), tuple(range(12))
    sample(policy, prompts_of(5, 9), decoder, groups=100, eos_ids=())  # so that no buffer will grow
    for groups in (32, 100, 32, 100):
        settings: dict[str, Any] = {"prompts": prompts_of(5, 9), "groups": groups, "eos_ids": ends, "length": 40}
        assert_equal(sample(policy, decoder=decoder, **settings), sample(policy, **settings))
    sizes = [key[0] for key in decoder.graphs]
    assert len(sizes) > len(set(sizes))


def test_buffers_have_their_full_size_from_the_first_step(make_model: Any, graphs: Any) -> None:
    """A buffer that grows takes the graphs with it."""
    policy = make_model("Qwen2").double()
    decoder = graphs(policy)
    sample(policy, prompts_of(100, 9), decoder, groups=2, length=200, eos_ids=())
    assert len([key for key, graph in decoder.graphs.items() if graph]) == 3  # of 128, 256 and 384 keys
    assert decoder.buffers["mask"].shape == (4, 384)


def test_a_model_that_cannot_be_captured_runs_as_it_is(
    make_model: Any, graphs: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = make_model("Qwen2").double()
    layer = policy.model.layers[1].mlp
    plain, layer.forward = layer.forward, lambda x: plain(x) if x.max().item() < 1e9 else x  # reads a number
    decoder, prompts = graphs(policy), prompts_of(5, 9)
    for seed in (1, 2):
        assert_equal(sample(policy, prompts, decoder, seed=seed), sample(policy, prompts, seed=seed))
    assert capsys.readouterr().out.count("no CUDA graphs, so decoding is slower: operation not permitted") == 1


def test_the_emulated_graph_finds_what_is_baked_in(make_model: Any, graphs: Any, monkeypatch: Any) -> None:
    """Else the tests above would prove nothing: a Python number that changes with every step."""
    policy = make_model("Qwen2").double()
    plain, steps = grpo.Decoder.decode, iter(range(10**6))

    def decode(decoder: grpo.Decoder) -> None:
        plain(decoder)
        decoder.tokens.copy_((decoder.tokens + next(steps)) % 90)

    monkeypatch.setattr(grpo.Decoder, "decode", decode)
    captured = sample(policy, prompts_of(5, 9), graphs(policy), eos_ids=())
    steps = iter(range(10**6))
    assert not torch.equal(captured.completion_ids, sample(policy, prompts_of(5, 9), eos_ids=()).completion_ids)


def test_finished_rows_leave_a_static_batch(make_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, sizes, advance = make_model("Qwen2").double(), list[int](), grpo.Decoder.advance

    def watched(decoder: grpo.Decoder) -> None:
        sizes.append(len(decoder.rows))
        advance(decoder)

    monkeypatch.setattr(grpo.Decoder, "advance", watched)
    # One token in nine ends a completion, so that of 256 rows a few dozen are left after 16 tokens.
    batch = sample(
        policy, prompts_of(5, 9), grpo.Decoder(policy, static=True), groups=128, length=64, eos_ids=tuple(range(10))
    )
    assert sizes[:16] == [256] * 16
    assert set(sizes[16:]) == {64}
    assert len(sizes) < 63  # nor does it go on when none is left
    assert (batch.completion_mask.sum(-1) > 17).any()


# ----------------------------------------------------------------------------------------------------------------------
# Parts


def small_card(monkeypatch: pytest.MonkeyPatch, most: int) -> list[int]:
    """Memory for so many rows of a decode step; the list of the sizes of those that fit."""
    sizes: list[int] = []
    forward = grpo.forward

    def limited(policy: Any, ids: Tensor, *args: Any, **how: Any) -> Tensor:
        if ids.shape[1] == 1 and len(ids) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes.extend([len(ids)] * (ids.shape[1] == 1))
        return forward(policy, ids, *args, **how)

    monkeypatch.setattr(grpo, "forward", limited)
    return sizes


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("most", [1, 10, 47])
def test_a_rollout_too_large_is_split_without_changing_a_token(
    static: bool, most: int, make_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, prompts = make_model("Qwen2").double(), prompts_of(5, 9, 7)
    expected = sample(policy, prompts, groups=16)
    decoder = grpo.Decoder(policy, static)
    sizes = small_card(monkeypatch, most)
    assert_equal(sample(policy, prompts, decoder, groups=16), expected)
    assert max(sizes) <= most
    assert decoder.most[16] <= most < 2 * decoder.most[16] + 2
    remembered = dict(decoder.most)
    assert_equal(sample(policy, prompts, decoder, groups=16), expected)
    assert decoder.most == remembered


def test_one_row_that_does_not_fit_is_an_error(make_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    small_card(monkeypatch, 0)
    with pytest.raises(torch.OutOfMemoryError):
        sample(make_model("Qwen2"), prompts_of(5, 9))


def test_memory_that_ends_leaves_no_buffer_behind(make_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the whole rollout had taken must not stand beside what its parts take."""
    policy = make_model("Qwen2").double()
    decoder = grpo.Decoder(policy, static=True)
    small_card(monkeypatch, 30)
    sample(policy, prompts_of(5, 9), decoder, groups=30)
    assert decoder.buffers["0/0"].shape[0] == decoder.most[30] == 30


def test_an_evaluation_that_does_not_fit_leaves_training_whole(
    make_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """512 different prompts need more memory than 64 in groups."""
    policy = make_model("Qwen2").double()
    decoder = grpo.Decoder(policy, static=True)
    with monkeypatch.context() as patch:
        small_card(patch, 10)
        sample(policy, prompts_of(*[5] * 20), decoder, groups=1)
    assert decoder.most == {1: 10}
    sample(policy, prompts_of(5, 6), decoder, groups=12)
    assert decoder.buffers["0/0"].shape[0] == 24


# ----------------------------------------------------------------------------------------------------------------------
# Compiled


@pytest.mark.slow
def test_compiled_equals_plain(make_model: Any) -> None:
    """--compile, which a GPU uses, here through a C++ compiler; in float32, as torch 2.11 cannot compile the others."""
    if not shutil.which("g++"):
        pytest.skip("no C++ compiler")
    policy, prompts = make_model("Qwen2"), prompts_of(5, 9, 7, 3)
    plain = sample(policy, prompts)
    gradients = []
    for fuse in (False, True):
        policy.fuse = fuse
        rows = torch.arange(40, 90)
        given = prompts, plain.completion_ids[rows], plain.completion_mask[rows]
        logprobs = grpo.completion_logprobs(policy, *given, prompt_index=rows // 24, temperature=0.8)
        (logprobs * torch.linspace(-1, 1, logprobs.shape[1])).sum().backward()
        gradients.append({name: p.grad for name, p in policy.named_parameters()})
        policy.zero_grad()
    for name, gradient in gradients[0].items():
        assert (gradient - gradients[1][name]).norm() <= 1e-4 * gradient.norm(), name
    decoder = grpo.Decoder(policy, static=True)
    frames = torch._dynamo.utils.counters["frames"]
    before = frames["ok"]
    assert_equal(sample(policy, prompts, decoder), plain, error=1e-4)
    assert frames["ok"] > before  # it was compiled indeed
    assert not torch._dynamo.utils.counters["graph_break"]


def test_attention_keeps_one_bias_for_all_layers(make_model: Any) -> None:
    """It grows with the square of the length: of a copy for each layer most of the memory would be."""

    def kept(layers: int) -> int:
        policy, sizes = make_model("Qwen2", num_hidden_layers=layers), dict[int, int]()
        batch = sample(policy, prompts_of(60), groups=4, length=100, eos_ids=())

        def pack(x: Tensor) -> Tensor:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            index = torch.zeros(4, dtype=torch.long)
            rows = batch.completion_ids, batch.completion_mask
            logprobs = grpo.completion_logprobs(policy, prompts_of(60), *rows, prompt_index=index, temperature=1.0)
        bias = 4 * 2 * 99 * 160 * 4  # rows x folds x queries x keys (159, rounded up) x bytes
        logprobs.sum().backward()
        return sum(size >= bias for size in sizes.values())

    assert kept(1) == kept(4) == 1


# ----------------------------------------------------------------------------------------------------------------------
# Preflight


def make_learner(tokenizer: Any, policy: Any, **settings: Any) -> grpo.Learner:
    config = dataclasses.replace(
        grpo.Config(), prompts_per_step=3, num_generations=4, max_completion_length=6, learning_rate=1e-2,
        weight_decay=0.1, num_iterations=2, **settings,
    )  # fmt: skip
    masters = list(policy.parameters())
    optimizer = torch.optim.AdamW(masters, weight_decay=0.1, fused=True)
    return grpo.Learner(config, {}, policy, tokenizer, [1], masters, optimizer, None)


def test_the_preflight_leaves_no_trace(
    tokenizer: Any, policy: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    learner, update, standins = make_learner(tokenizer, policy), grpo.update, list[type]()

    def watch(learner: grpo.Learner, *given: Any) -> grpo.Metrics:
        standins.append(type(learner.optimizer))
        return update(learner, *given)

    monkeypatch.setattr(grpo, "update", watch)
    for resumed in (False, True):
        if resumed:
            for master in learner.masters:
                master.grad = torch.ones_like(master)
            learner.optimizer.step()
        before = copy.deepcopy((grpo.training_state(learner), policy.state_dict()))
        grpo.preflight(learner, [5, 6, 7], 10**6)
        after = grpo.training_state(learner), policy.state_dict()
        torch.testing.assert_close(after, before, rtol=0, atol=0)
        assert bool(after[0]["optimizer"]["state"]) is resumed
    # A resumed run's state is in memory already: a second one could make a step not fit that fitted before.
    assert standins == [torch.optim.AdamW, torch.optim.SGD]
    assert not learner.updating
    assert capsys.readouterr().out.endswith(" hours without evaluations, 72.0M completion tokens\n")


def test_the_preflights_graphs_are_those_of_training(tokenizer: Any, policy: Any, graphs: Any) -> None:
    learner = make_learner(tokenizer, policy)
    learner.eos_ids, learner.decoder = [1, 2], graphs(policy)
    prompts = [list(range(3, 12))] * 3
    grpo.preflight(learner, prompts[0], 10)
    captured = len(Graph.captured)
    assert captured > 0
    batch = sample(policy, prompts, learner.decoder, groups=4, length=6)  # at another temperature: a graph of its own
    assert len(Graph.captured) == captured + 1
    noise = grpo.uniform_noise(1, "test", 0, 12, 6)
    how: dict[str, Any] = {"num_generations": 4, "max_completion_length": 6, "eos_ids": [1, 2], "noise": noise}
    again = grpo.rollout(policy, prompts, temperature=1.0, decoder=learner.decoder, **how)
    assert len(Graph.captured) == captured + 1
    assert_equal(again, grpo.rollout(policy, prompts, temperature=1.0, **how))
    assert not torch.equal(again.logprobs, batch.logprobs)


def test_the_preflight_meets_the_worst_case(tokenizer: Any, policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest prompt for all, every completion of full length, none computed once for several, all with signal."""
    learner, scored, sampled = make_learner(tokenizer, policy, micro_batch_size=5), [], []
    logprobs, rollout = grpo.completion_logprobs, grpo.rollout

    def score(policy: Any, prompts: Any, ids: Tensor, mask: Tensor, **how: Any) -> Tensor:
        scored.append((prompts, ids, mask))
        return logprobs(policy, prompts, ids, mask, **how)

    def watch(*args: Any, **how: Any) -> grpo.Rollout:
        sampled.append(rollout(*args, **how))
        sampled[-1].completion_ids.zero_()  # as of a policy that always says the same
        return sampled[-1]

    monkeypatch.setattr(grpo, "completion_logprobs", score)
    monkeypatch.setattr(grpo, "rollout", watch)
    grpo.preflight(learner, [5, 6, 7], 10)
    assert sampled[0].completion_mask.shape == (12, 6)
    assert sampled[0].completion_mask.all()
    assert [len(ids) for _, ids, _ in scored] == [5, 5, 2] * 2  # two iterations
    assert all(prompts == [[5, 6, 7]] * 3 and mask.all() for prompts, _, mask in scored)
    assert len(torch.cat([ids for _, ids, _ in scored[:3]]).unique(dim=0)) == 12


@pytest.mark.parametrize("where", ["rollout", "update"])
def test_a_step_that_cannot_fit_ends_the_run_before_it_begins(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: Any, **how: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(grpo, where, full)
    with pytest.raises(SystemExit) as end:
        grpo.main(grpo.Config(num_steps=1, prompts_per_step=2, num_generations=2, run_dir=str(tmp_path / "runs")))
    assert end.value.code == 8
    error = capsys.readouterr().err
    assert "--micro-batch-size (now 1024)" in error
    assert "--max-completion-length" in error
    assert [path.name for path in tmp_path.glob("runs/*/checkpoints/*")] == ["step_000000"]  # to --resume with less


def test_a_run_says_what_it_will_take_before_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    questions = ["What is 10 + 10?", "What is 11 + 10, please, as a number?", "What is 20 + 20?"]
    rows = [json.dumps({"question": question, "answer": "20"}) for question in questions]
    (tmp_path / "data.jsonl").write_text("\n".join(rows))
    preflight, seen = grpo.preflight, list[Any]()

    def watch(*given: Any) -> None:
        seen.append(given[1])
        preflight(*given)

    monkeypatch.setattr(grpo, "preflight", watch)
    config = grpo.Config(num_steps=2, prompts_per_step=2, num_generations=3, run_dir=str(tmp_path / "runs"))
    grpo.main(dataclasses.replace(config, task="gsm8k", dataset_path=str(tmp_path / "data.jsonl"), eval_samples=4))
    tokenizer = grpo.load_pretrained("AutoTokenizer", config)
    assert seen == grpo.tokenize_prompts(tokenizer, [{"question": questions[1]}], config)
    lines = capfd.readouterr().out.splitlines()
    (at,) = (i for i, line in enumerate(lines) if line.startswith("preflight: ") and " GB; " in line)
    told = r"preflight: [\d.]+ s, [\d.]+ of it rollout, in [\d.]+ GB; 2 such steps: 0.00 hours without evaluations, "
    assert re.match(told, lines[at])
    assert lines[at + 1].startswith("step 0 of 2")


# ----------------------------------------------------------------------------------------------------------------------
# On a GPU


@pytest.mark.gpu
def test_on_a_gpu_captured_and_compiled_steps_give_the_same_tokens(make_model: Any) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    policy = make_model("Qwen2").double().cuda()
    for fuse in (False, True):
        policy.fuse = fuse
        decoder = grpo.Decoder(policy, static=True)
        for settings in SERIES + SERIES[:2]:
            assert_equal(sample(policy, decoder=decoder, **settings), sample(policy, **settings), error=1e-6)
        assert decoder.capture
        assert any(decoder.graphs.values())
