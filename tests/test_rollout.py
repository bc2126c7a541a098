"""Sampling: what is sampled is what is scored, noise that does not depend on its company, stop tokens, CUDA graphs."""

import itertools
import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import grpo
from tests.conftest import Capture, Patch, random_model, refusal, rows_of
from tests.cuda import REAL, Graph, any_cuda, pretended_cuda

pytestmark = pytest.mark.usefixtures("one_thread")
FAMILIES = ("Qwen2", "GPTNeoX")
EOS = 512  # of the tiny policy
LENGTH = 24


def prompts_of(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(3, 90, (length,), generator=generator).tolist() for length in lengths]


PROMPTS = prompts_of(3, 5, 1)


def sample(policy: Any, prompts: Any = PROMPTS, groups: int = 4, length: int = 6, **changes: Any) -> grpo.Rollout:
    noise = grpo.uniform_noise(1, "test", 0, len(prompts) * groups, length)
    settings: dict[str, Any] = {"temperature": 0.8, "eos_ids": [1, 2], "noise": noise} | changes
    return grpo.rollout(policy, prompts, num_generations=groups, max_completion_length=length, **settings)


def assert_equal(a: grpo.Rollout, b: grpo.Rollout, error: float = 1e-9) -> None:
    assert torch.equal(a.completion_mask, b.completion_mask)
    assert torch.equal(a.completion_ids, b.completion_ids)
    for x, y in ((a.logprobs, b.logprobs), (a.entropy, b.entropy)):
        assert (x - y).abs().max() <= error


def test_sampler_at_both_ends() -> None:
    """A token without probability is never drawn, wherever it stands."""
    probs = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]])
    for u, token in ((0.0, 1), (0.4999, 1), (0.5, 3), (1 - 2**-24, 3), (1 - 2**-53, 3)):
        assert grpo.sample_tokens(probs, torch.tensor([u], dtype=torch.float64)).item() == token


def test_rare_tokens_of_a_large_vocabulary_have_their_interval() -> None:
    """Behind a common one, too, where float32 has no number between their cumulative probabilities."""
    probs = torch.full((1, 151_936), 1e-12)
    probs[0, 3] = 1
    tokens = torch.tensor([0, 2, 4, 5, 130, 50_000, 151_935])
    cdf = probs[0].double().cumsum(0)
    uniform = (cdf[tokens] - 0.5e-12) / cdf[-1]
    assert torch.equal(grpo.sample_tokens(probs.expand(len(tokens), -1), uniform), tokens)


def test_the_rollout_draws_at_the_temperature() -> None:
    policy = random_model("Qwen2", vocab_size=7, initializer_range=0.5)
    batch = sample(policy, [[2, 3, 4]], 20_000, 1, temperature=0.5, eos_ids=[])
    with torch.no_grad():
        probs = (policy(torch.tensor([[2, 3, 4]])).logits[0, -1] / 0.5).softmax(-1)
    expected = probs * 20_000
    found = batch.completion_ids.flatten().bincount(minlength=7)
    assert ((found - expected) ** 2 / expected).sum() < 22.46  # chi-square, 6 degrees of freedom, p = 0.001
    entropy = -(probs * probs.log()).sum().item()
    assert batch.entropy.flatten()[:3].tolist() == pytest.approx([entropy] * 3, rel=1e-5)


def test_entropy_counts_a_token_without_probability_as_nothing() -> None:
    """0 * log 0 is 0, also where the logit is -inf."""
    policy = random_model("Qwen2", vocab_size=4, tie_word_embeddings=False)
    policy.lm_head = torch.nn.Linear(32, 4)
    policy.lm_head.weight.data.zero_()
    policy.lm_head.bias.data.copy_(torch.tensor([0.0, -math.inf, 0.0, -math.inf]))
    batch = sample(policy, [[2, 3]], 12, eos_ids=[])
    assert batch.entropy.flatten().tolist() == pytest.approx([math.log(2)] * 72)
    assert set(batch.completion_ids.flatten().tolist()) == {0, 2}


def test_any_chunks_of_a_rollout_are_the_same_tokens(policy: Any) -> None:
    """By prompts, by pairs of prompts, and by halves of a group, with the same noise for each completion: a row's
    tokens depend neither on its neighbours nor on the padding that these bring."""
    prompts = prompts_of(3, 17, 1, 8)
    noise = grpo.uniform_noise(6, "test", 0, 16, 12).view(4, 4, 12)

    def ids(some: slice, generations: slice) -> Tensor:
        part = noise[some, generations]
        settings: dict[str, Any] = {"noise": part.reshape(-1, 12), "temperature": 1.5, "eos_ids": [EOS]}
        return sample(policy, prompts[some], part.shape[1], 12, **settings).completion_ids.view(part.shape)

    whole = ids(slice(None), slice(None))
    assert len(set(map(tuple, whole.view(16, 12).tolist()))) > 8
    for prompts_at_once, generations_at_once in ((1, 4), (2, 4), (3, 4), (4, 2), (1, 1), (3, 3)):
        for p, g in itertools.product(range(0, 4, prompts_at_once), range(0, 4, generations_at_once)):
            some, generations = slice(p, p + prompts_at_once), slice(g, g + generations_at_once)
            assert torch.equal(ids(some, generations), whole[some, generations])


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_generate_and_nothing_takes_its_generation_config(family: str) -> None:
    """Qwen ships such a one; greedy decoding by transformers applies its repetition_penalty."""
    policy = random_model(family, initializer_range=0.3)
    sampled = sample(policy, eos_ids=[])
    settings = {"repetition_penalty": 1.3, "top_k": 1, "top_p": 0.1, "temperature": 0.01, "do_sample": True}
    for name, value in settings.items():
        setattr(policy.generation_config, name, value)
    assert_equal(sample(policy, eos_ids=[]), sampled)
    ours, differs = sample(policy, PROMPTS * 2, 1, 12, noise=None), 0
    for prompt, row in zip(PROMPTS * 2, rows_of(ours), strict=True):
        how: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": [1, 2], "pad_token_id": 0}
        tensor = torch.tensor([prompt])
        assert row == policy.generate(tensor, **how, repetition_penalty=1.0)[0, len(prompt) :].tolist()
        differs += row != policy.generate(tensor, **how)[0, len(prompt) :].tolist()
    assert differs  # else this could not fail


def test_stop_token_is_in_the_mask_and_what_follows_is_not() -> None:
    policy = random_model("Qwen2", vocab_size=4)  # four tokens, two of them EOS: about half the draws stop
    batch = sample(policy, [[2, 3]], 64, 5, eos_ids=[0, 1])
    lengths = batch.completion_mask.sum(-1)
    assert {1, 2, 3, 5} <= set(lengths.tolist())
    for row, mask, n in zip(batch.completion_ids, batch.completion_mask, lengths.tolist(), strict=True):
        assert mask.tolist() == [True] * n + [False] * (5 - n)
        assert all(token in (2, 3) for token in row[: n - 1].tolist())
        assert row[n - 1].item() in (0, 1) or n == 5
        assert row[n:].sum() == 0
    assert not batch.logprobs[~batch.completion_mask].any()
    assert not batch.entropy[~batch.completion_mask].any()
    assert {0, 1} <= set(batch.completion_ids[batch.completion_mask].tolist())


def watch(policy: Any) -> list[tuple[int, int, bool]]:
    """(rows, tokens, whether it is being captured) of every forward pass from now on."""
    seen: list[tuple[int, int, bool]] = []

    def hook(module: Any, args: Any, kwargs: Any) -> None:
        capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        seen.append((*kwargs["input_ids"].shape, capturing))

    policy.base_model.register_forward_pre_hook(hook, with_kwargs=True)
    return seen


def test_rows_that_have_ended_leave_the_batch() -> None:
    policy = random_model("Qwen2")
    seen = watch(policy)
    batch = sample(policy, prompts_of(5, 9), 16, 64, eos_ids=list(range(10)))
    lengths = batch.completion_mask.sum(-1)
    steps = [(int((lengths > t).sum()), 1, False) for t in range(1, int(lengths.max()))]
    # Each prompt once, then at each step the rows that go on and no other, until none is left.
    assert seen == [(2, 9, False), *steps]


captured: list[Any] = []  # by sample_on_gpu


def sample_on_gpu(policy: Any, *given: Any, **settings: Any) -> grpo.Rollout:
    with any_cuda(), mock.patch.object(torch.cuda, "graph", wraps=torch.cuda.graph) as capture:
        batch = sample(policy.cuda(), *given, **settings)
        found = {name: values.cpu() for name, values in vars(batch).items()}
        policy.cpu()
    captured[:] = [call.args[0] for call in capture.call_args_list]
    return grpo.Rollout(**found)


SERIES: list[dict[str, Any]] = [
    {"prompts": prompts_of(5, 9, 7, 3)},
    {"prompts": prompts_of(11, 2), "noise": None},
    {"prompts": prompts_of(60, 8, 9), "length": 70, "eos_ids": list(range(8))},
    {"prompts": prompts_of(4, 4, 4, 4), "eos_ids": []},  # no padding, no end
    {"prompts": prompts_of(6), "groups": 5, "length": 1}, {"prompts": prompts_of(6), "groups": 2, "length": 2},
    {"prompts": prompts_of(9, 5, 3), "length": 40, "eos_ids": list(range(60))},  # all end before the first look
]  # fmt: skip


@pytest.mark.parametrize("family", [*FAMILIES, "Mistral"])
def test_captured_steps_give_the_same_tokens(family: str) -> None:
    """Mistral's sliding window is not captured, but right: it cuts some of the prompts, and most completions."""
    sliding = {"sliding_window": 8} if family == "Mistral" else {}
    policy = random_model(family, **sliding).double()
    for given in SERIES:
        settings = {"groups": 12, "length": LENGTH} | given
        expected = sample(policy, **settings)
        for can_capture in (True, False):
            policy._can_compile_fullgraph = can_capture
            assert_equal(sample_on_gpu(policy, **settings), expected, error=1e-5)
            if sliding or not can_capture:
                assert not captured
            elif settings["length"] > 2:
                assert sum(getattr(graph, "replays", 11) for graph in captured) > 10


def test_few_shapes_are_captured_each_after_a_step_that_runs() -> None:
    policy = random_model("Qwen2").double()
    settings: dict[str, Any] = {"prompts": prompts_of(5, 9), "groups": 128, "length": 150, "eos_ids": list(range(6))}
    expected = sample(policy, **settings)
    seen = watch(policy)
    assert_equal(sample_on_gpu(policy, **settings), expected, error=1e-5)
    prompts, *steps = seen
    assert prompts == (2, 9, False)
    sizes = [rows for rows, _, _ in steps[::2]]
    assert steps == [(rows, 1, capturing) for rows in sizes for capturing in (False, True)]
    assert sizes[0] == 256
    assert all(after <= before // 2 for before, after in itertools.pairwise(sizes))
    assert 3 <= len(sizes) == len(captured) <= 8
    # Nor does it go on for long when none is left.
    longest = int(expected.completion_mask.sum(-1).max())
    assert longest < 120
    assert REAL or sum(graph.replays for graph in captured) + len(sizes) < longest + 16


def test_a_policy_is_checked_on_the_gpu_that_it_runs_on(tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    """Its graphs, too: a model whose captured steps are wrong is refused before training."""
    monkeypatch.setattr(Graph, "replay", lambda graph: None)
    with pretended_cuda():
        error = refusal(capsys, grpo.main, grpo.Config(run_dir=str(tmp_path)))
    assert "cannot be trained here" in error
    assert Graph.captured
