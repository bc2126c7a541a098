"""The same batch through TRL's GRPOTrainer and through a step of `main`; bf16 weights; stop tokens.
In float64 unless a test says otherwise: then rounding hides nothing. Settings that grpo.py lacks: grpo_ablations.py."""

import dataclasses
import math
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

import grpo
import grpo_ablations
from rewards import accuracy_reward
from tests.conftest import rows_of, tiny_policy, to_float64

# TRL and transformers warn about settings that TRL itself passes.
pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.usefixtures("one_thread")]

EOS = 512  # of the tiny policy
GROUPS, LENGTH, TEMPERATURE, BETA = 4, 14, 0.7, 0.04
QUESTIONS = ["What is 12 + 34?", "2 + 2", "What is 98 - 9?", "What is the sum of 77 and 12, please?"]
# Each group has another kind of signal: mixed; none; two rows at the mean; one far above the others.
REWARDS = [1.0, 0.0, 0.0, 0.5] + [1.0] * 4 + [0.0, 2.0, 1.0, 1.0] + [0.25, 0.0, 1.0, 3.0]
TOLERANCE = 1e-5


def moved_policy() -> Any:
    """The tiny policy with seeded noise on its weights, so that its KL to the tiny policy is not zero."""
    policy, generator = tiny_policy(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.1 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return policy


def random_batch() -> SimpleNamespace:
    """Prompts, and completions of random tokens. Row 1 ends with EOS at the last position: it is not truncated. Rows 8
    and 9 are equal, with advantages of opposite signs."""
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(0, EOS, (n,), generator=generator).tolist() for n in (1, 9, 4, 17)]
    lengths = torch.tensor([1, 14, 14, 2, 14, 3, 2, 1, 9, 9, 14, 2, 3, 14, 4, 1])[:, None]
    positions = torch.arange(LENGTH)
    mask = positions < lengths
    ids = torch.randint(0, EOS, (16, LENGTH), generator=generator)
    ids[9] = ids[8]
    ended = (lengths < LENGTH) | (torch.arange(16)[:, None] == 1)
    ids = torch.where((positions == lengths - 1) & ended, EOS, ids) * mask
    zeros = torch.zeros(16, LENGTH)
    return SimpleNamespace(prompts=prompts, rollout=grpo.Rollout(ids, mask, zeros, zeros))


def given_reward(completions: list[Any] = REWARDS, **columns: Any) -> list[float]:
    return REWARDS[: len(completions)]


def partial_reward(completions: list[Any] = REWARDS, **columns: Any) -> list[float | None]:
    """Of the groups all, two, one and none of four are judged."""
    return ([1.0, 0.0, 0.0, 0.5, 1.0, None, 0.0, None, None, None, 2.0, None] + [None] * 4)[: len(completions)]


def digit_sum(completions: list[Any], **columns: Any) -> list[float]:
    """A reward with many values, of messages as both sides pass them."""
    return [sum(int(c) for c in message["content"] if c in "0123456789") / 4 for (message,) in completions]


def run_main(tmp_path: Path, policy: Any, batch: Any = None, problems: Any = None, **settings: Any) -> Any:
    """`main` with a policy and completions that are there already, with the tiny policy as reference and plain gradient
    descent at a rate of `learning_rate`; all else is its own, but for evaluations and checkpoints, which are left out.
    What it did: its metrics, the gradients of each optimizer step, the last rollout, what was trained."""
    fixed: dict[str, Any] = {
        "num_generations": GROUPS, "max_completion_length": LENGTH, "temperature": TEMPERATURE, "num_steps": 1,
        "prompts_per_step": 4, "max_grad_norm": 0.0, "learning_rate": 0.0, "lr_schedule": "constant",
        "warmup_steps": 0, "rewards": (f"{__name__}:given_reward",), "run_dir": str(tmp_path),
    }  # fmt: skip
    names = [name for name, _ in policy.named_parameters()]
    problems = problems or [{"question": question, "answer": "4"} for question in QUESTIONS]
    script: Any = grpo_ablations if {"loss_type", "scale_rewards", "beta"} & settings.keys() else grpo
    policies, rollout = [policy, tiny_policy()], script.rollout
    done: Any = SimpleNamespace(gradients=[])

    class Recorder(torch.optim.SGD):
        def __init__(self, masters: list[Tensor], **how: Any) -> None:
            super().__init__(masters, lr=0.0)
            done.masters = dict(zip(names, masters, strict=True))

        def step(self, closure: Any = None) -> Any:
            done.gradients.append({name: cast(Tensor, p.grad).clone() for name, p in done.masters.items()})
            super().step()

    def sample(policy: Any, prompts: list[list[int]], **how: Any) -> grpo.Rollout:
        done.tokens = batch or SimpleNamespace(prompts=prompts, rollout=rollout(policy, prompts, **how))
        # The scores of a policy in float64 are in float64.
        logprobs = done.tokens.rollout.logprobs.to(torch.promote_types(policy.dtype, torch.float32))
        return dataclasses.replace(done.tokens.rollout, logprobs=logprobs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "AdamW", Recorder)
        patch.setattr(subprocess, "run", lambda *given, **how: subprocess.CompletedProcess(given, 0, "", ""))
        stubs: dict[str, Any] = {
            "load_policy": lambda *_: policies.pop(0), "load_problems": lambda _: (problems, [], []),
            "problems_of_step": lambda train, *_: train, "rollout": sample, "evaluate": lambda *_: ({}, []),
            "check_policy": lambda *_: None, "save_checkpoint": lambda *_: None,
        }  # fmt: skip
        if batch:
            stubs["tokenize_prompts"] = lambda *_: batch.prompts
        for name, stub in stubs.items():
            patch.setattr(script, name, stub)
        done.metrics = script.main(script.Config(**(fixed | settings)))[-1]
    return done


def gradients(policy: Any) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in policy.named_parameters()}


def norm_of(tensors: dict[str, Tensor]) -> float:
    return math.sqrt(sum(tensor.norm().item() ** 2 for tensor in tensors.values()))


def largest_error(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Largest ||ours - theirs|| / ||theirs|| of all parameters."""
    assert ours.keys() == theirs.keys()
    errors = [((ours[name] - expected).norm() / expected.norm()).item() for name, expected in theirs.items()]
    assert all(map(math.isfinite, errors))
    return max(errors)


class Oracle:
    """A GRPOTrainer that is given completions instead of sampling them; all else is TRL's own code."""

    def __init__(self, tokenizer: Any, folder: Path) -> None:
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer

        arguments = GRPOConfig(
            # Not TRL's default: Dr GRPO, a reference model, this batch, float64 instead of a GPU's autocast, no files.
            loss_type="dr_grpo", scale_rewards="none", beta=BETA, per_device_train_batch_size=16,
            num_generations=GROUPS, max_completion_length=LENGTH, temperature=TEMPERATURE,
            bf16=False, use_cpu=True, output_dir=str(folder), report_to="none",
        )  # fmt: skip
        assert arguments.use_bias_correction_kl  # TRL's default
        data, reward = Dataset.from_dict({"prompt": QUESTIONS}), cast(Any, given_reward)
        policy = moved_policy().train()
        self.trainer: Any = GRPOTrainer(policy, reward, arguments, data, processing_class=tokenizer)
        to_float64(self.trainer.ref_model)
        self.trainer.current_gradient_accumulation_steps = 1  # as its training loop sets it
        self.trainer.rollout_func = self.given

    def given(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        repeated = [prompt for prompt in self.batch.prompts for _ in range(GROUPS)]
        return {"prompt_ids": repeated, "completion_ids": rows_of(self.batch.rollout), "logprobs": None}

    def inputs(self, batch: Any, examples: Any = None, **settings: Any) -> dict[str, Any]:
        """What TRL makes of the completions: padded tensors, masks, advantages, old and reference log-probs."""
        trainer, self.batch = self.trainer, batch
        fixed = {"loss_type": "dr_grpo", "beta": 0.0, "num_iterations": 1, "mask_truncated_completions": False}
        scale = {"scale_rewards": "group" if "scale_rewards" in settings else "none"}
        vars(trainer).update(fixed | settings | scale)
        return trainer._generate_and_score_completions(examples or [{"prompt": q} for q in QUESTIONS for _ in "1234"])

    def backward(self, inputs: dict[str, Any]) -> float:
        """TRL's loss; its gradient is left in its policy."""
        self.trainer.model.zero_grad()
        loss = self.trainer.compute_loss(self.trainer.model, inputs)
        loss.backward()
        return loss.item()

    def metric(self, name: str) -> float:
        return self.trainer._metrics["train"][name][-1]


@pytest.fixture
def oracle(tokenizer: Any, tmp_path: Path) -> Iterator[Oracle]:
    from accelerate.state import AcceleratorState

    yield Oracle(tokenizer, tmp_path)
    AcceleratorState._reset_state(reset_partial_state=True)


UPDATES: list[tuple[dict[str, Any], int, Any]] = [
    ({}, 1, given_reward), ({"mask_truncated_completions": True}, 5, given_reward),
    ({"num_iterations": 2}, 3, given_reward), ({"num_iterations": 2, "beta": BETA}, 3, given_reward),
    ({"scale_rewards": True, "beta": BETA}, 5, given_reward), ({"loss_type": "bnpo", "beta": BETA}, 3, given_reward),
    ({"loss_type": "grpo", "beta": BETA, "mask_truncated_completions": True}, 5, given_reward),
    ({"num_iterations": 2, "loss_type": "grpo", "scale_rewards": True, "beta": BETA}, 5, given_reward),
    ({"num_iterations": 2, "loss_type": "bnpo", "mask_truncated_completions": True, "beta": BETA}, 5, given_reward),
    ({}, 16, partial_reward), ({"beta": BETA}, 5, partial_reward), ({"loss_type": "bnpo"}, 5, partial_reward),
    ({"loss_type": "grpo", "scale_rewards": True}, 5, partial_reward),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "size", "reward"), UPDATES)
def test_update_in_micro_batches_equals_trl(
    settings: dict[str, Any], size: int, reward: Any, oracle: Oracle, tmp_path: Path
) -> None:
    """The gradient that a step of `main` leaves. With two iterations a step of plain gradient descent lies in between,
    long enough to bring ratios out of the clip range on both sides, and the second gradient is compared."""
    batch, iterations = random_batch(), settings.get("num_iterations", 1)
    oracle.trainer.reward_funcs = [reward]
    inputs, model = oracle.inputs(batch, **settings), oracle.trainer.model
    if "beta" in settings:  # the one difference: in TRL a completion that no reward judges has a KL term
        inputs["completion_mask"][[value is None for value in reward()]] = 0
    losses = [oracle.backward(inputs)]
    norm = norm_of(gradients(model))
    lr = 0.0 if iterations == 1 else 0.03 / norm
    if iterations > 1:
        torch.optim.SGD(model.parameters(), lr=lr).step()
        losses.append(oracle.backward(inputs))
        assert oracle.metric("clip_ratio/low_mean") > 0.01
        assert oracle.metric("clip_ratio/high_mean") > 0.01
    given = {"rewards": (f"{__name__}:{reward.__name__}",), "micro_batch_size": size, "learning_rate": lr}
    ours = run_main(tmp_path, moved_policy(), batch, **given, **settings)
    assert len(ours.gradients) == iterations
    assert largest_error(ours.gradients[-1], gradients(model)) <= TOLERANCE
    assert ours.metrics["train/loss"] == pytest.approx(sum(losses) / iterations, rel=TOLERANCE, abs=1e-7)
    assert ours.metrics["train/reward"] == pytest.approx(oracle.metric("reward"))
    if iterations == 1:
        assert ours.metrics["train/grad_norm"] == pytest.approx(norm, rel=TOLERANCE)
        if "beta" in settings and "mask_truncated_completions" not in settings:  # TRL leaves masked ones out of it
            assert ours.metrics["train/kl"] == pytest.approx(oracle.metric("kl"), rel=1e-4)
    else:
        assert 0 < ours.metrics["train/clip_ratio"] < 1


STEPS: list[dict[str, Any]] = [
    {}, {"loss_type": "grpo", "scale_rewards": True},
    {"loss_type": "bnpo", "beta": BETA, "mask_truncated_completions": True},
]  # fmt: skip


@pytest.mark.parametrize("settings", STEPS)
def test_whole_step_equals_trl(settings: dict[str, Any], oracle: Oracle, tmp_path: Path) -> None:
    """`main` samples, rewards and updates; TRL gets the tokens alone, and decodes, rewards and masks them."""
    sums, length = ((12, 34), (91, 17), (3, 4), (80, 13)), 3  # answers of three digits are cut before their stop token
    problems = [{"question": f"What is {a} + {b}?", "answer": str(a + b)} for a, b in sums]
    ours = run_main(
        tmp_path, moved_policy(), None, problems, max_completion_length=length, micro_batch_size=5,
        rewards=("accuracy=2.0", f"{__name__}:digit_sum=0.5"), **settings,
    )  # fmt: skip
    trainer = oracle.trainer
    trainer.max_completion_length, trainer.reward_weights = length, torch.tensor([2.0, 0.5])
    trainer.reward_funcs, trainer.reward_func_names = [accuracy_reward, digit_sum], ["accuracy", "digit_sum"]
    trainer.reward_processing_classes = [None, None]
    chats = [{"prompt": [{"role": "user", "content": p["question"]}], "answer": p["answer"]} for p in problems]
    examples = [chat for chat in chats for _ in range(GROUPS)]
    theirs = oracle.backward(oracle.inputs(ours.tokens, examples=examples, **settings))
    assert ours.metrics["train/loss"] == pytest.approx(theirs, rel=TOLERANCE, abs=1e-7)
    assert largest_error(ours.gradients[0], gradients(trainer.model)) <= TOLERANCE
    same = {
        "train/reward": "reward", "rewards/accuracy/mean": "rewards/accuracy/mean",
        "rewards/digit_sum/mean": "rewards/digit_sum/mean", "train/frac_reward_zero_std": "frac_reward_zero_std",
        "completions/mean_length": "completions/mean_length", "completions/clipped_ratio": "completions/clipped_ratio",
        "completions/mean_terminated_length": "completions/mean_terminated_length",
    }  # fmt: skip
    if "mask_truncated_completions" not in settings:  # TRL leaves masked completions out of its entropy
        same["train/entropy"] = "entropy"
    for our_name, trl_name in same.items():
        assert ours.metrics[our_name] == pytest.approx(oracle.metric(trl_name), rel=1e-4), our_name
    assert 0 < ours.metrics["completions/clipped_ratio"] < 1
    assert ours.metrics["train/grad_norm"] > 0.01


def test_a_gradient_is_cut_to_its_largest_norm(tmp_path: Path) -> None:
    whole, cut = (run_main(tmp_path, tiny_policy(), random_batch(), max_grad_norm=norm) for norm in (0.0, 0.01))
    norm = norm_of(whole.gradients[0])
    assert cut.metrics["train/grad_norm"] == whole.metrics["train/grad_norm"] == pytest.approx(norm)
    expected = {name: gradient * 0.01 / norm for name, gradient in whole.gradients[0].items()}
    assert largest_error(cut.gradients[0], expected) < 1e-4


def test_bf16_weights_are_trained_through_float32_masters(tmp_path: Path) -> None:
    """On a CPU, as on a GPU: an update of a millionth is kept though bf16 cannot hold it, and the gradient points where
    float64's does."""
    batch, policy = random_batch(), tiny_policy(torch.bfloat16)
    expected = torch.cat([g.flatten() for g in run_main(tmp_path, tiny_policy(), batch).gradients[0].values()])
    before = {name: weight.detach().clone() for name, weight in policy.named_parameters()}
    rate = 1e-6 / expected.abs().mean().item()
    ours = run_main(tmp_path, policy, batch, num_steps=3, micro_batch_size=5, learning_rate=rate)
    found = torch.cat([g.double().flatten() for g in ours.gradients[0].values()])
    assert all(g.dtype == torch.float32 for g in ours.gradients[0].values())
    assert torch.cosine_similarity(found, expected, dim=0) > 0.99
    for (name, weight), weight_after in zip(before.items(), policy.parameters(), strict=True):
        moves = rate * sum(step[name] for step in ours.gradients)
        error = (weight.float() - moves - ours.masters[name]).abs().max()
        assert error < 3e-7 * weight.float().abs().max(), name  # the rounding of float32
        assert torch.equal(weight_after, ours.masters[name].bfloat16()), name
    assert torch.cat([(ours.masters[n] - w.float()).flatten() for n, w in before.items()]).abs().mean() > 2e-6


def test_a_step_ends_at_either_eos(tokenizer: Any, tmp_path: Path) -> None:
    """Of the tokenizer and of the model; a completion is truncated if it ends with neither."""
    start, other = tiny_policy(torch.float32), tokenizer("4").input_ids[0]
    start.generation_config.eos_token_id = [other, 511]
    sizes = {"num_generations": 16, "max_completion_length": 2}
    ours = run_main(tmp_path, start, rewards=("accuracy",), temperature=1.5, **sizes)
    rows = rows_of(ours.tokens.rollout)
    last = [row[-1] for row in rows]
    assert {EOS, other} < set(last)
    assert all(not {EOS, other} & set(row[:-1]) for row in rows)
    truncated = [token not in (EOS, other, 511) for token in last]
    assert ours.metrics["completions/clipped_ratio"] == pytest.approx(sum(truncated) / 64)
