"""The same batch through TRL's GRPOTrainer and through grpo.py; then what must not change a gradient, what may be
sampled, and two bandits whose optimum is known."""

import copy
import dataclasses
import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

import grpo
import rewards as reward_functions
from tests.conftest import to_float64

# TRL and transformers warn about settings that TRL itself passes.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

ROOT = Path(__file__).resolve().parents[1]
EOS = 512  # of the tiny policy
GROUPS, LENGTH, TEMPERATURE, BETA = 4, 14, 0.7, 0.04
QUESTIONS = ["What is 12 + 34?", "2 + 2", "What is 98 - 9?", "What is the sum of 77 and 12, please?"]
# Each group has another kind of signal: mixed; none; two rows at the mean; one far above the others.
REWARDS = [1.0, 0.0, 0.0, 0.5] + [1.0] * 4 + [0.0, 2.0, 1.0, 1.0] + [0.25, 0.0, 1.0, 3.0]
DTYPES = {"float32": torch.float32, "float64": torch.float64}
TOLERANCE = 1e-5


def load(dtype: torch.dtype) -> Any:
    """The tiny policy."""
    from transformers import AutoModelForCausalLM

    policy = AutoModelForCausalLM.from_pretrained(ROOT / "tiny_policy").eval()
    return to_float64(policy) if dtype == torch.float64 else policy


def moved(policy: Any) -> Any:
    """The same policy with seeded noise on its weights, so that its KL to the tiny policy is not zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.1 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return policy


@dataclass
class Tokens:
    """Prompts and their completions."""

    prompts: list[list[int]]
    rollout: grpo.Rollout

    @property
    def rows(self) -> list[list[int]]:
        pairs = zip(self.rollout.completion_ids, self.rollout.completion_mask, strict=True)
        return [ids[mask].tolist() for ids, mask in pairs]


@dataclass
class Batch(Tokens):
    """Of which it is known which completions have no stop token."""

    truncated: Tensor  # (N,)

    def check(self) -> bool:
        """What a comparison needs: ragged lengths; in the groups with signal, ended and truncated completions."""
        lengths = self.rollout.completion_mask.sum(-1).tolist()
        signal = grpo.group_advantages(torch.tensor(REWARDS), GROUPS) != 0
        both = min((self.truncated & signal).sum(), (~self.truncated & signal).sum()) >= 2
        return bool(both) and len(set(lengths)) >= 4 and len(set(map(len, self.prompts))) == len(self.prompts)

    def loss_mask(self, masked: bool) -> Tensor:
        return self.rollout.completion_mask & ~(self.truncated[:, None] & masked)


def random_batch() -> Batch:
    """Random tokens, no policy involved. Row 1 ends with EOS at the last position: it is not truncated.
    Rows 8 and 9 are equal, with advantages of opposite signs."""
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
    batch = Batch(prompts, grpo.Rollout(ids, mask, zeros, zeros), ~ended[:, 0])
    assert batch.check()
    return batch


def sampled_batch(policy: Any, tokenizer: Any) -> Batch:
    """A rollout: the answer alone for two prompts, reasoning of varying length for the two that ask for tags."""
    prompts = []
    for question, system_prompt in zip(QUESTIONS, ["", grpo.TAG_PROMPT] * 2, strict=True):
        config = grpo.Config(system_prompt=system_prompt)
        prompts += grpo.tokenize_prompts(tokenizer, [{"question": question}], config)
    for seed in range(50):  # the first rollout that shows all that is to be compared
        batch = grpo.rollout(
            policy, prompts, num_generations=GROUPS, max_completion_length=LENGTH, temperature=TEMPERATURE,
            eos_ids=[EOS], noise=torch.rand(16, LENGTH, generator=torch.Generator().manual_seed(seed)),
        )  # fmt: skip
        found = Batch(prompts, batch, ~((batch.completion_ids == EOS) & batch.completion_mask).any(-1))
        if found.check():
            return found
    raise AssertionError("no rollout has both ended and truncated completions in groups with signal")


def make_learner(policy: Any, tokenizer: Any, optimizer: Any, reference: Any = None, **settings: Any) -> grpo.Learner:
    """A Learner around a policy that is there already, on the CPU in the policy's own precision."""
    fixed: dict[str, Any] = {"num_generations": GROUPS, "max_completion_length": LENGTH, "temperature": TEMPERATURE}
    fixed |= {"max_grad_norm": 0.0, "learning_rate": 0.0, "lr_schedule": "constant", "warmup_steps": 0}
    config = grpo.Config(**(fixed | settings))
    return grpo.Learner(config, {}, policy, tokenizer, [EOS], list(policy.parameters()), optimizer, reference)


def gradients(policy: Any) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in policy.named_parameters()}


def weights(policy: Any) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in policy.named_parameters()}


def largest_error(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Largest ||ours - theirs|| / ||theirs|| of all parameters; where theirs is zero, 1e-7 counts as 1e-5."""
    assert ours.keys() == theirs.keys()
    errors = []
    for name, expected in theirs.items():
        difference, norm = (ours[name] - expected).norm().item(), expected.norm().item()
        errors.append(difference / norm if norm > 0 else 100 * difference)
    assert all(map(math.isfinite, errors))
    return max(errors)


# The oracle


class Oracle:
    """A GRPOTrainer that is given completions instead of sampling them; all else is TRL's own code."""

    def __init__(self, dtype: torch.dtype, tokenizer: Any, folder: Path) -> None:
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer

        arguments = GRPOConfig(
            output_dir=str(folder), report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False,
            gradient_accumulation_steps=1, per_device_train_batch_size=16, disable_dropout=True,
            num_generations=GROUPS, max_completion_length=LENGTH, temperature=TEMPERATURE, epsilon=0.2, beta=BETA,
            loss_type="dr_grpo", scale_rewards="none", use_bias_correction_kl=False,
        )  # fmt: skip
        self.tokenizer = tokenizer
        self.policy, self.reference = moved(load(dtype)), load(dtype)  # ours
        data = Dataset.from_dict({"prompt": QUESTIONS})
        policy, reward = moved(load(dtype)), cast(Any, self.reward)
        self.trainer: Any = GRPOTrainer(policy, reward, arguments, data, processing_class=tokenizer)
        if dtype == torch.float64:
            to_float64(self.trainer.ref_model)
        self.trainer.current_gradient_accumulation_steps = 1  # as its training loop sets it
        self.trainer.rollout_func = self.given
        self.start = copy.deepcopy(self.policy.state_dict())
        self.batches = {"random": random_batch(), "rollout": sampled_batch(self.policy, tokenizer)}
        self.reset()

    def reset(self) -> None:
        """Both policies as they were, in training mode there and in eval mode here, without gradients."""
        for policy in (self.policy, self.trainer.model):
            policy.load_state_dict(self.start)
            policy.zero_grad()
        self.trainer.model.train()
        self.trainer.max_completion_length, self.rewards = LENGTH, REWARDS

    def reward(self, completions: list[str], **columns: Any) -> list[float]:
        return self.rewards

    def given(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        repeated = [prompt for prompt in self.batch.prompts for _ in range(len(prompts) // len(self.batch.prompts))]
        return {"prompt_ids": repeated, "completion_ids": self.batch.rows, "logprobs": None}

    def inputs(
        self, batch: Tokens, *, loss_type: str = "dr_grpo", scale_rewards: bool = False, beta: float = 0.0,
        num_iterations: int = 1, mask_truncated_completions: bool = False,
        examples: list[dict[str, Any]] | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """What TRL makes of the completions: padded tensors, masks, advantages, old and reference log-probs."""
        trainer, self.batch = self.trainer, batch
        trainer.loss_type, trainer.beta, trainer.num_iterations = loss_type, beta, num_iterations
        trainer.scale_rewards = "group" if scale_rewards else "none"
        trainer.mask_truncated_completions = mask_truncated_completions
        inputs = trainer._generate_and_score_completions(examples or [{"prompt": q} for q in QUESTIONS for _ in "1234"])
        assert ("old_per_token_logps" in inputs) == (num_iterations > 1)
        assert ("ref_per_token_logps" in inputs) == (beta > 0)
        return inputs

    def backward(self, inputs: dict[str, Any]) -> float:
        """TRL's loss; its gradient is left in its policy."""
        self.trainer.model.zero_grad()
        loss = self.trainer.compute_loss(self.trainer.model, inputs)
        loss.backward()
        return loss.item()

    def metric(self, name: str) -> float:
        return self.trainer._metrics["train"][name][-1]


@pytest.fixture(scope="module")
def oracles(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Oracle]]:
    from accelerate.state import AcceleratorState
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny_policy")
    yield {name: Oracle(dtype, tokenizer, tmp_path_factory.mktemp("trl")) for name, dtype in DTYPES.items()}
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def oracle(oracles: dict[str, Oracle], request: pytest.FixtureRequest) -> Oracle:
    """In float32, the precision of a run on a CPU, unless a test asks for another."""
    chosen = oracles[getattr(request, "param", "float32")]
    chosen.reset()
    return chosen


SOURCES = ["random", "rollout"]
LOSS_TYPES = ["dr_grpo", "grpo", "bnpo"]


@pytest.mark.parametrize("scale_rewards", [False, True])
def test_advantages_equal_trl(scale_rewards: bool, oracle: Oracle) -> None:
    for rewards in (REWARDS, [0.1, 0.7, 0.3, 0.3] + [0.1] * 4 + [-1.0, 1e-3, 0.0, 5.0] + [2.5, 2.5, 2.5, 0.0]):
        oracle.rewards = rewards
        theirs = oracle.inputs(oracle.batches["random"], scale_rewards=scale_rewards)["advantages"]
        ours = grpo.group_advantages(torch.tensor(rewards), GROUPS, scale_rewards)
        assert theirs.abs().max() > 1
        assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("oracle", DTYPES, indirect=True)
def test_logprobs_and_entropy_equal_trl(oracle: Oracle) -> None:
    """What was written down when the tokens were sampled, what is scored afterwards, and TRL's scores."""
    batch = oracle.batches["rollout"]
    inputs = oracle.inputs(batch)
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    mask = batch.rollout.completion_mask
    logprobs, entropy, _ = oracle.trainer._get_per_token_logps_and_entropies(
        oracle.trainer.model, ids, attention, LENGTH, compute_entropy=True
    )
    with torch.no_grad():
        scored = grpo.completion_logprobs(
            oracle.policy, batch.prompts, batch.rollout.completion_ids, mask,
            prompt_index=torch.arange(16) // GROUPS, temperature=TEMPERATURE,
        )  # fmt: skip
    assert (scored - batch.rollout.logprobs)[mask].abs().max() < 1e-4
    assert (scored - logprobs)[mask].abs().max() < 1e-4
    assert (batch.rollout.entropy - entropy)[mask].abs().max() < 1e-4


def compare(oracle: Oracle, batch: Batch, loss_type: str, scale: bool, beta: float, iterations: int, cut: bool) -> None:
    """One batch through TRL's compute_loss and through completion_logprobs and dr_grpo_loss."""
    inputs = oracle.inputs(
        batch, loss_type=loss_type, scale_rewards=scale, beta=beta, num_iterations=iterations,
        mask_truncated_completions=cut,
    )  # fmt: skip
    ids, mask, loss_mask = batch.rollout.completion_ids, batch.rollout.completion_mask, batch.loss_mask(cut)
    score: dict[str, Any] = {"prompt_index": torch.arange(16) // GROUPS, "temperature": TEMPERATURE}
    logprobs = grpo.completion_logprobs(oracle.policy, batch.prompts, ids, mask, **score)
    old, ref = logprobs.detach(), None
    if iterations > 1:  # the policy has moved since its first pass: the same random way on both sides
        drift = 0.5 * torch.randn(old.shape, generator=torch.Generator().manual_seed(3))
        inputs["old_per_token_logps"] = inputs["old_per_token_logps"] + drift
        old = old + drift
    if beta:
        with torch.no_grad():
            ref = grpo.completion_logprobs(oracle.reference, batch.prompts, ids, mask, **score)
    advantages = grpo.group_advantages(torch.tensor(REWARDS), GROUPS, scale)
    loss = grpo.dr_grpo_loss(
        logprobs, old, advantages, loss_mask, num_completions=16, max_completion_length=LENGTH,
        num_tokens=int(loss_mask.sum()), epsilon=0.2, beta=beta, ref_logprobs=ref, loss_type=loss_type,
    )  # fmt: skip
    loss.backward()
    theirs = oracle.backward(inputs)
    clipped_low, clipped_high = oracle.metric("clip_ratio/low_mean"), oracle.metric("clip_ratio/high_mean")
    if iterations > 1:
        assert min(clipped_low, clipped_high) > 0.01
        assert 0.1 < (logprobs - old)[loss_mask].abs().mean() < 1
    else:
        assert clipped_low == clipped_high == 0
    if beta:
        assert oracle.metric("kl") > 0.01
    # On-policy, token means of a group's advantages cancel in `grpo`: then there is only rounding left to compare.
    assert loss.item() == pytest.approx(theirs, rel=TOLERANCE, abs=1e-7)
    assert largest_error(gradients(oracle.policy), gradients(oracle.trainer.model)) <= TOLERANCE


@pytest.mark.parametrize("mask_truncated_completions", [False, True])
@pytest.mark.parametrize("num_iterations", [1, 2])
@pytest.mark.parametrize("beta", [0.0, BETA])
@pytest.mark.parametrize("scale_rewards", [False, True])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("source", SOURCES)
def test_loss_and_gradient_equal_trl(
    source: str, loss_type: str, scale_rewards: bool, beta: float, num_iterations: int,
    mask_truncated_completions: bool, oracle: Oracle,
) -> None:  # fmt: skip
    batch = oracle.batches[source]
    compare(oracle, batch, loss_type, scale_rewards, beta, num_iterations, mask_truncated_completions)


@pytest.mark.parametrize("oracle", ["float64"], indirect=True)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_and_gradient_equal_trl_in_float64(loss_type: str, oracle: Oracle) -> None:
    """TRL's output head works in float32 all the same."""
    compare(oracle, oracle.batches["random"], loss_type, scale=False, beta=BETA, iterations=2, cut=True)


@pytest.mark.parametrize("oracle", ["float64"], indirect=True)
@pytest.mark.parametrize(
    ("settings", "micro_batch_size"),
    [
        ({}, 1),
        ({}, 16),
        ({"scale_rewards": True, "beta": BETA}, 5),
        ({"loss_type": "grpo", "scale_rewards": True}, 3),
        ({"loss_type": "grpo", "beta": BETA, "mask_truncated_completions": True}, 5),
        ({"loss_type": "bnpo", "mask_truncated_completions": True}, 5),
        ({"loss_type": "bnpo", "beta": BETA}, 3),
        ({"num_iterations": 2}, 3),
        ({"num_iterations": 2, "loss_type": "grpo", "scale_rewards": True, "beta": BETA}, 5),
        ({"num_iterations": 2, "loss_type": "bnpo", "mask_truncated_completions": True, "beta": BETA}, 5),
    ],
)
@pytest.mark.parametrize("source", SOURCES)
def test_update_in_micro_batches_equals_trl(
    source: str, settings: dict[str, Any], micro_batch_size: int, oracle: Oracle
) -> None:
    """The gradient that `update` leaves behind. With two iterations a step of plain gradient descent lies in between,
    long enough to bring ratios out of the clip range on both sides, and the second gradient is compared."""
    batch, iterations = oracle.batches[source], settings.get("num_iterations", 1)
    inputs = oracle.inputs(batch, **settings)
    losses = [oracle.backward(inputs)]
    norm = math.sqrt(sum(g.norm().item() ** 2 for g in gradients(oracle.trainer.model).values()))
    lr = 0.0 if iterations == 1 else 0.03 / norm
    if iterations > 1:
        torch.optim.SGD(oracle.trainer.model.parameters(), lr=lr).step()
        losses.append(oracle.backward(inputs))
        assert oracle.metric("clip_ratio/low_mean") > 0.01
        assert oracle.metric("clip_ratio/high_mean") > 0.01
        torch.optim.SGD(oracle.trainer.model.parameters(), lr=lr).step()
    optimizer = torch.optim.SGD(oracle.policy.parameters(), lr=lr)
    reference = oracle.reference if "beta" in settings else None
    learner = make_learner(
        oracle.policy, oracle.tokenizer, optimizer, reference, micro_batch_size=micro_batch_size, **settings
    )
    advantages = grpo.group_advantages(torch.tensor(REWARDS), GROUPS, settings.get("scale_rewards", False))
    loss_mask = batch.loss_mask(settings.get("mask_truncated_completions", False))
    metrics = grpo.update(learner, batch.prompts, batch.rollout, advantages, loss_mask)
    assert largest_error(gradients(oracle.policy), gradients(oracle.trainer.model)) <= TOLERANCE
    assert metrics["train/loss"] == pytest.approx(sum(losses) / iterations, rel=TOLERANCE, abs=1e-7)
    if iterations == 1:
        assert metrics["train/grad_norm"] == pytest.approx(norm, rel=TOLERANCE)
        if "beta" in settings and "mask_truncated_completions" not in settings:
            assert metrics["train/kl"] == pytest.approx(oracle.metric("kl"), rel=1e-4)
    else:
        steps = [
            {name: weight - oracle.start[name] for name, weight in weights(policy).items()}
            for policy in (oracle.policy, oracle.trainer.model)
        ]
        assert largest_error(*steps) <= TOLERANCE


def digit_sum(completions: list[Any], **columns: Any) -> list[float]:
    """A reward with many values, of messages as both sides pass them."""
    return [sum(int(c) for c in message["content"] if c in "0123456789") / 4 for (message,) in completions]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"loss_type": "grpo", "scale_rewards": True},
        {"loss_type": "bnpo", "beta": BETA, "mask_truncated_completions": True},
    ],
)
def test_whole_train_step_equals_trl(settings: dict[str, Any], oracle: Oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    """`train_step` samples, rewards and updates; TRL gets the tokens alone, and decodes, rewards and masks them."""
    sums, length = ((12, 34), (91, 17), (3, 4), (80, 13)), 3  # answers of three digits are cut before their stop token
    problems = [{"question": f"What is {a} + {b}?", "answer": str(a + b)} for a, b in sums]
    learner = make_learner(
        oracle.policy, oracle.tokenizer, torch.optim.SGD(oracle.policy.parameters(), lr=0.0),
        oracle.reference if "beta" in settings else None, prompts_per_step=4, max_completion_length=length,
        micro_batch_size=5, **settings,
    )  # fmt: skip
    functions: dict[str, Any] = {"accuracy": (reward_functions.accuracy_reward, 2.0), "digits": (digit_sum, 0.5)}
    learner.functions = functions
    sample, seen = grpo.rollout, []

    def spy(policy: Any, prompts: list[list[int]], **kwargs: Any) -> grpo.Rollout:
        seen.append((prompts, sample(policy, prompts, **kwargs)))
        return seen[-1][1]

    monkeypatch.setattr(grpo, "rollout", spy)
    metrics, _ = grpo.train_step(learner, problems, 1, 10)

    trainer = oracle.trainer
    trainer.max_completion_length = length
    monkeypatch.setattr(trainer, "reward_funcs", [reward_functions.accuracy_reward, digit_sum])
    monkeypatch.setattr(trainer, "reward_func_names", ["accuracy", "digits"])
    monkeypatch.setattr(trainer, "reward_processing_classes", [None, None])
    monkeypatch.setattr(trainer, "reward_weights", torch.tensor([2.0, 0.5]))
    examples = [
        {"prompt": [{"role": "user", "content": p["question"]}], "answer": p["answer"]}
        for p in grpo.problems_of_step(problems, 1, learner.config)
        for _ in range(GROUPS)
    ]
    ((prompts, rollout),) = seen
    theirs = oracle.backward(oracle.inputs(Tokens(prompts, rollout), examples=examples, **settings))
    assert metrics["train/loss"] == pytest.approx(theirs, rel=TOLERANCE, abs=1e-7)
    assert largest_error(gradients(oracle.policy), gradients(trainer.model)) <= TOLERANCE
    same = {
        "train/reward": "reward", "rewards/accuracy/mean": "rewards/accuracy/mean",
        "rewards/digits/mean": "rewards/digits/mean", "train/frac_reward_zero_std": "frac_reward_zero_std",
        "completions/mean_length": "completions/mean_length", "completions/clipped_ratio": "completions/clipped_ratio",
    }  # fmt: skip
    if "mask_truncated_completions" not in settings:  # TRL leaves masked completions out of its entropy
        same["train/entropy"] = "entropy"
    for our_name, trl_name in same.items():
        assert metrics[our_name] == pytest.approx(oracle.metric(trl_name), rel=1e-4), our_name
    assert 0 < metrics["completions/clipped_ratio"] < 1
    assert metrics["train/grad_norm"] > 0.01


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("nothing", ["equal rewards", "all truncated"])
def test_without_anything_to_learn_both_gradients_are_zero(nothing: str, loss_type: str, oracle: Oracle) -> None:
    batch = oracle.batches["random"]
    if nothing == "equal rewards":
        oracle.rewards = [1.0] * 16
    else:  # no completion has a stop token
        ids = torch.where(batch.rollout.completion_ids == EOS, 7, batch.rollout.completion_ids)
        rollout = dataclasses.replace(batch.rollout, completion_ids=ids)
        batch = Batch(batch.prompts, rollout, torch.ones(16, dtype=torch.bool))
    settings: dict[str, Any] = {"loss_type": loss_type, "mask_truncated_completions": True}
    assert oracle.backward(oracle.inputs(batch, **settings)) == 0
    optimizer = torch.optim.SGD(oracle.policy.parameters(), lr=0.0)
    learner = make_learner(oracle.policy, oracle.tokenizer, optimizer, **settings)
    advantages = grpo.group_advantages(torch.tensor(oracle.rewards), GROUPS)
    metrics = grpo.update(learner, batch.prompts, batch.rollout, advantages, batch.loss_mask(True))
    assert metrics["train/loss"] == metrics["train/grad_norm"] == 0
    assert largest_error(gradients(oracle.policy), gradients(oracle.trainer.model)) == 0


# Invariance, in float64: what is about speed alone changes no gradient


def gradient_of(
    policy: Any, tokenizer: Any, batch: Batch, lr: float = 0.0, reference: Any = None, **settings: Any
) -> dict[str, Tensor]:
    """That of the last iteration of one update; the policy is as before afterwards."""
    start = copy.deepcopy(policy.state_dict())
    learner = make_learner(policy, tokenizer, torch.optim.SGD(policy.parameters(), lr=lr), reference, **settings)
    advantages = grpo.group_advantages(torch.tensor(REWARDS), GROUPS, settings.get("scale_rewards", False)).double()
    loss_mask = batch.loss_mask(settings.get("mask_truncated_completions", False))
    grpo.update(learner, batch.prompts, batch.rollout, advantages, loss_mask)
    policy.load_state_dict(start)
    return gradients(policy)


@pytest.mark.parametrize(
    "settings",
    [
        {"loss_type": "grpo", "scale_rewards": True},
        {"loss_type": "bnpo", "mask_truncated_completions": True},
        {"beta": BETA, "num_iterations": 2, "lr": 0.005},
        {"loss_type": "bnpo", "num_iterations": 2, "lr": 0.005},
    ],
)
def test_micro_batches_change_no_gradient_in_any_setting(settings: dict[str, Any], policy: Any, tokenizer: Any) -> None:
    batch, reference = random_batch(), load(torch.float64) if "beta" in settings else None
    policy = moved(policy)
    whole, *parts = (
        gradient_of(policy, tokenizer, batch, reference=reference, micro_batch_size=size, **settings)
        for size in (16, 7, 3, 1)
    )
    for part in parts:
        assert largest_error(part, whole) < 1e-9


def test_padding_changes_no_gradient(policy: Any, tokenizer: Any) -> None:
    """Columns of junk outside the mask; a much longer prompt beside the others, in the group without signal."""
    settings: dict[str, Any] = {"micro_batch_size": 16, "loss_type": "grpo"}
    batch = random_batch()
    expected = gradient_of(policy, tokenizer, batch, **settings)
    mask = torch.nn.functional.pad(batch.rollout.completion_mask, (0, 5), value=False)
    ids = torch.nn.functional.pad(batch.rollout.completion_ids, (0, 5), value=0).masked_fill(~mask, 9)
    zeros = torch.zeros(ids.shape)
    padded = Batch(batch.prompts, grpo.Rollout(ids, mask, zeros, zeros), batch.truncated)
    assert largest_error(gradient_of(policy, tokenizer, padded, **settings), expected) < 1e-9

    prompts = [batch.prompts[0], list(range(100)), *batch.prompts[2:]]
    logprobs = grpo.completion_logprobs(
        policy, prompts, padded.rollout.completion_ids, padded.rollout.completion_mask,
        prompt_index=torch.arange(16) // GROUPS, temperature=TEMPERATURE,
    )  # fmt: skip
    policy.zero_grad()
    grpo.dr_grpo_loss(
        logprobs, logprobs.detach(), grpo.group_advantages(torch.tensor(REWARDS), GROUPS).double(), mask,
        num_completions=16, max_completion_length=LENGTH, loss_type="grpo",
    ).backward()  # fmt: skip
    assert largest_error(gradients(policy), expected) < 1e-9


def test_any_chunks_of_a_rollout_are_the_same_tokens(policy: Any, tokenizer: Any) -> None:
    """By prompts, by pairs of prompts, and by halves of a group, with the same noise for each completion."""
    prompts = grpo.tokenize_prompts(tokenizer, [{"question": q} for q in QUESTIONS], grpo.Config())
    noise = torch.rand(16, 12, generator=torch.Generator().manual_seed(6)).view(4, GROUPS, 12)
    settings: dict[str, Any] = {"max_completion_length": 12, "temperature": 1.5, "eos_ids": [EOS]}

    def ids(some: slice, generations: slice) -> Tensor:
        part = noise[some, generations]
        batch = grpo.rollout(
            policy, prompts[some], num_generations=part.shape[1], noise=part.reshape(-1, 12), **settings
        )
        return batch.completion_ids.view(part.shape)

    everything = slice(None)
    whole = ids(everything, everything)
    assert len(set(map(tuple, whole.view(16, 12).tolist()))) > 8
    for prompts_at_once, generations_at_once in ((1, 4), (2, 4), (3, 4), (4, 2), (4, 1), (1, 1), (3, 3)):
        for p, g in itertools.product(range(0, 4, prompts_at_once), range(0, GROUPS, generations_at_once)):
            some, generations = slice(p, p + prompts_at_once), slice(g, g + generations_at_once)
            assert torch.equal(ids(some, generations), whole[some, generations])


# Sampler

VOCABULARY = 151_936


def test_zero_probability_tokens_of_a_large_vocabulary_are_never_sampled() -> None:
    """Both ends of the vocabulary and three in four tokens between have none: by -inf, or by underflow of exp."""
    generator = torch.Generator().manual_seed(7)
    logits = 3 * torch.randn(VOCABULARY, generator=generator)
    dead = torch.rand(VOCABULARY, generator=generator) < 0.75
    dead[:1000] = dead[-1000:] = True
    logits[dead] = torch.where(torch.rand(int(dead.sum()), generator=generator) < 0.5, -math.inf, -200.0)
    ends = [0.0, 2.0**-149, 2.0**-24, 1 - 2.0**-24, 1 - 2.0**-53]
    uniform = torch.cat([torch.tensor(ends, dtype=torch.float64), torch.rand(500, generator=generator).double()])
    tokens = torch.cat([grpo.sample_tokens(logits.softmax(-1).expand(len(u), -1), u) for u in uniform.split(100)])
    alive = (~dead).nonzero()[:, 0]
    assert not dead[tokens].any()
    assert tokens[0] == tokens[1] == alive[0]
    assert tokens[4] == alive[-1]
    assert len(tokens.unique()) > 200


def test_the_last_number_below_1_finds_a_token_whatever_the_rounding() -> None:
    """In float64 a sum over blocks and one token by token differ in the last bit."""
    probs = torch.rand(5000, 256, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    probs[:, 100:] = 0
    uniform = torch.full((5000,), 1 - 2**-53, dtype=torch.float64)
    assert (grpo.sample_tokens(probs / probs.sum(-1, keepdim=True), uniform) == 99).all()


def test_rare_tokens_behind_a_common_one_have_their_interval() -> None:
    probs = torch.full((1, 1000), 1e-12, dtype=torch.float64)
    probs[0, 3] = 1 - 999e-12
    tokens = torch.tensor([0, 2, 4, 5, 130, 500, 999])
    uniform = probs[0].cumsum(0)[tokens] - 0.5e-12
    assert torch.equal(grpo.sample_tokens(probs.expand(len(tokens), -1), uniform), tokens)


def test_every_token_of_a_large_vocabulary_has_its_interval() -> None:
    """Of V equally likely tokens, number k is that of every u in [k / V, (k + 1) / V)."""
    tokens = torch.cat([torch.tensor([0, 1, VOCABULARY - 2, VOCABULARY - 1]), torch.arange(5, VOCABULARY, 997)])
    logits = torch.full((1, VOCABULARY), -3.0)
    for place in (0.01, 0.5, 0.99):
        uniform = (tokens.double() + place) / VOCABULARY
        found = [grpo.sample_tokens(logits.softmax(-1).expand(len(u), -1), u) for u in uniform.split(40)]
        assert torch.equal(torch.cat(found), tokens)


@pytest.fixture
def qwen_like(tmp_path: Path, make_model: Any, tokenizer: Any) -> Path:
    """A random model whose generation_config.json is that of Qwen2-0.5B-Instruct but for the token ids."""
    model = make_model("Qwen2", vocab_size=len(tokenizer), eos_token_id=EOS)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    settings = {
        "bos_token_id": 510, "pad_token_id": 511, "do_sample": True, "eos_token_id": [EOS, 511],
        "repetition_penalty": 1.1, "temperature": 0.7, "top_p": 0.8, "top_k": 20,
    }  # fmt: skip
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(settings))
    return tmp_path / "model"


def test_of_a_generation_config_only_the_eos_ids_reach_sampling(
    qwen_like: Path, make_model: Any, tokenizer: Any
) -> None:
    config = grpo.Config(model=str(qwen_like), num_generations=512, max_completion_length=3, temperature=1.0)
    learner = grpo.make_learner(config, {}, tokenizer, torch.device("cpu"))
    assert learner.policy.generation_config.top_k == 20
    assert learner.eos_ids == [511, EOS]
    prompt = tokenizer("What is 12 + 34?").input_ids
    noise = torch.rand(512, 3, generator=torch.Generator().manual_seed(8))
    batch = grpo.rollout(
        learner.policy, [prompt], num_generations=512, max_completion_length=3, temperature=1.0, noise=noise,
        eos_ids=learner.eos_ids,
    )  # fmt: skip
    same = grpo.rollout(
        make_model("Qwen2", vocab_size=len(tokenizer)), [prompt], num_generations=512, max_completion_length=3,
        temperature=1.0, noise=noise, eos_ids=[511, EOS],
    )  # fmt: skip
    assert torch.equal(batch.completion_ids, same.completion_ids)
    assert len(batch.completion_ids[:, 0].unique()) > 200  # far more than top_k
    # A completion ends at either EOS id, the second of which is also the pad id, and nowhere else.
    ends = torch.isin(batch.completion_ids, torch.tensor([511, EOS])) & batch.completion_mask
    assert {511, EOS} <= set(batch.completion_ids[ends].tolist())
    lengths = batch.completion_mask.sum(-1)
    assert torch.equal(lengths < 3, ends[:, :2].any(-1))
    assert (ends.sum(-1) <= 1).all()


def test_greedy_equals_generate_without_the_generation_config(qwen_like: Path, tokenizer: Any) -> None:
    """Greedy evaluation ignores repetition_penalty, which transformers would apply even without sampling."""
    learner = grpo.make_learner(grpo.Config(model=str(qwen_like)), {}, tokenizer, torch.device("cpu"))
    prompts = [tokenizer(q).input_ids for q in QUESTIONS]
    batch = grpo.rollout(
        learner.policy, prompts, num_generations=1, max_completion_length=20, temperature=1.0, noise=None,
        eos_ids=learner.eos_ids,
    )  # fmt: skip
    plain: dict[str, Any] = {"do_sample": False, "max_new_tokens": 20, "eos_token_id": [EOS, 511], "pad_token_id": 511}
    differs = 0
    learner.policy.set_attn_implementation("sdpa")  # transformers' own
    for prompt, ours in zip(prompts, Tokens(prompts, batch).rows, strict=True):
        tensor = torch.tensor([prompt])
        theirs = learner.policy.generate(tensor, **plain, repetition_penalty=1.0)[0, len(prompt) :].tolist()
        assert ours == theirs
        differs += ours != learner.policy.generate(tensor, **plain)[0, len(prompt) :].tolist()
    assert differs  # else this could not fail


# Stop token


def test_gradient_is_that_of_the_tokens_up_to_the_stop_token(make_model: Any, tokenizer: Any) -> None:
    """Two EOS ids, one of which is also what pads: -1 / (N * L) * sum of A * logprobs, by one plain forward a row."""
    policy = to_float64(make_model("Qwen2", vocab_size=8))
    prompts, rewards = [[2, 3, 4], [5]], torch.tensor([1.0, 0.0, 0.5, 0.0, 2.0, 0.0])
    rows = [[3, 0], [4, 4, 1], [5, 6, 7, 2], [0], [1], [2, 2, 0]]  # the third is truncated
    mask = torch.tensor([[t < len(row) for t in range(4)] for row in rows])
    ids = torch.tensor([row + [0] * (4 - len(row)) for row in rows])
    advantages = grpo.group_advantages(rewards, 3).double()
    total: Any = 0.0
    for i, row in enumerate(rows):
        prompt = prompts[i // 3]
        logits = policy(torch.tensor([prompt + row])).logits[0, len(prompt) - 1 : -1] / TEMPERATURE
        total = total + advantages[i] * logits.log_softmax(-1).gather(-1, torch.tensor(row)[:, None]).sum()
    (-total / (6 * 4)).backward()
    expected = gradients(policy)
    learner = make_learner(
        policy, tokenizer, torch.optim.SGD(policy.parameters(), lr=0.0), num_generations=3, max_completion_length=4,
        micro_batch_size=4,
    )  # fmt: skip
    zeros = torch.zeros(6, 4)
    grpo.update(learner, prompts, grpo.Rollout(ids, mask, zeros, zeros), advantages, mask)
    assert largest_error(gradients(policy), expected) < 1e-9


@pytest.mark.parametrize("masked", [False, True])
def test_the_step_counts_either_eos_and_masks_only_the_truncated(
    masked: bool, policy: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss mask that `train_step` hands on: the stop token is in it, whichever it is; truncated rows may be out."""
    learner = make_learner(
        policy, tokenizer, torch.optim.SGD(policy.parameters(), lr=0.0), num_generations=16, prompts_per_step=4,
        max_completion_length=2, temperature=1.5, mask_truncated_completions=masked,
    )  # fmt: skip
    other = tokenizer("4").input_ids[0]
    learner.eos_ids, learner.functions = sorted([EOS, other]), grpo.load_rewards(("accuracy=1.0",))
    seen: list[tuple[grpo.Rollout, Tensor]] = []

    def spy(learner: Any, prompts: Any, batch: grpo.Rollout, advantages: Tensor, loss_mask: Tensor) -> dict[str, float]:
        seen.append((batch, loss_mask))
        return {}

    monkeypatch.setattr(grpo, "update", spy)
    problems = [{"question": q, "answer": "4"} for q in QUESTIONS]
    metrics, _ = grpo.train_step(learner, problems, 1, 10)
    ((batch, loss_mask),) = seen
    kinds: dict[int | None, int] = {EOS: 0, other: 0, None: 0}
    for ids, mask, in_loss in zip(batch.completion_ids, batch.completion_mask, loss_mask, strict=True):
        last = ids[mask][-1].item()
        kind = last if last in (EOS, other) else None
        kinds[kind] += 1
        assert not {EOS, other} & set(ids[mask][:-1].tolist())
        assert torch.equal(in_loss, mask & (kind is not None or not masked))
        assert kind is not None or mask.all()
    assert min(kinds.values()) > 0
    assert metrics["completions/clipped_ratio"] == pytest.approx(kinds[None] / 64)


# Learning


def test_bandit_finds_its_arm(make_model: Any, tokenizer: Any) -> None:
    """One token, one of 519 pays: whole training steps bring its probability from 1 / 519 to above 0.95."""
    policy, arm = make_model("Qwen2", vocab_size=len(tokenizer), eos_token_id=EOS), 77
    learner = make_learner(
        policy, tokenizer, torch.optim.AdamW(policy.parameters(), weight_decay=0.0), learning_rate=0.01,
        lr_schedule="linear", max_grad_norm=1.0, prompts_per_step=4, num_generations=128, max_completion_length=1,
        temperature=1.0,
    )  # fmt: skip
    learner.functions = {"arm": (lambda completion_ids, **_: [float(ids[0] == arm) for ids in completion_ids], 1.0)}
    problems = [{"question": q, "answer": "0"} for q in QUESTIONS]
    prompts = grpo.tokenize_prompts(tokenizer, problems, learner.config)

    def probability() -> float:
        with torch.no_grad():
            return min(policy(torch.tensor([p])).logits[0, -1].softmax(-1)[arm].item() for p in prompts)

    assert probability() < 0.01
    for step in range(1, 41):
        grpo.train_step(learner, problems, step, 40)
    assert probability() > 0.95


def test_bandit_finds_its_answer(make_model: Any, tokenizer: Any) -> None:
    """One completion pays, a token and then the stop token: the policy must also learn where to stop."""
    policy, prompts, best = make_model("Qwen2", vocab_size=8), [[2, 3, 4], [5]], torch.tensor([[3, 1]] * 2)
    optimizer = torch.optim.SGD(policy.parameters(), lr=2.0)  # no momentum, which drifts on once every reward is equal
    settings: dict[str, Any] = {"num_generations": 64, "max_completion_length": 5, "temperature": TEMPERATURE}
    learner = make_learner(policy, tokenizer, optimizer, max_grad_norm=0.1, **settings)

    def probability() -> float:
        with torch.no_grad():
            logprobs = grpo.completion_logprobs(
                policy, prompts, best, torch.ones_like(best).bool(), prompt_index=torch.arange(2),
                temperature=TEMPERATURE,
            )  # fmt: skip
        return logprobs.sum(-1).exp().min().item()

    assert probability() < 0.05
    for step in range(40):
        noise = grpo.uniform_noise(1, "sampling", step, 128, 5)
        batch = grpo.rollout(policy, prompts, noise=noise, eos_ids=[1], **settings)
        pays = (batch.completion_ids[:, :2] == best[0]).all(-1).float()
        grpo.update(learner, prompts, batch, grpo.group_advantages(pays, 64), batch.completion_mask)
    assert probability() > 0.95
