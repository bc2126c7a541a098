"""Fixtures: the tiny policy and random models of other families, all built locally."""

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that reaches for the network is wrong
os.environ.setdefault("WANDB_MODE", "disabled")
# Where bytecode is not kept, each of some hundred programs that the tests start would compile torch anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
os.environ.pop("PYTHONUNBUFFERED", None)  # a user's output is buffered
# A shell ignores SIGINT for what it starts in the background, nohup ignores SIGHUP, and tests would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For models so small that a second thread costs more than it brings."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def no_report(monkeypatch: Patch) -> None:
    """The closing report is a program of its own; in this process it would only cost time."""
    real = subprocess.run

    def run(command: Any, *args: Any, **kwargs: Any) -> Any:
        return None if "report.py" in str(command) else real(command, *args, **kwargs)

    monkeypatch.setattr(subprocess, "run", run)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ROOT / "models" / "tiny")


def to_float64(model: Any) -> Any:
    """All of it: transformers' RMSNorm would go through float32, and its rounding hide small errors."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = forward.__get__(module)
    return model.double()


def tiny_policy(dtype: torch.dtype = torch.float64) -> Any:
    """A fresh copy of the tiny policy."""
    from transformers import AutoModelForCausalLM

    policy = AutoModelForCausalLM.from_pretrained(ROOT / "models" / "tiny").eval()
    return to_float64(policy) if dtype == torch.float64 else policy.to(dtype)


@pytest.fixture
def policy() -> Any:
    return tiny_policy()


def random_model(family: str, vocab_size: int = 96, **changes: Any) -> Any:
    """A small random model of another architecture, in float32 and eval mode."""
    import transformers

    shape = {
        "vocab_size": vocab_size, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "pad_token_id": 0,
        "num_attention_heads": 4, "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    kind = getattr(transformers, f"{family}Config")
    if hasattr(kind(), "num_key_value_heads"):
        shape["num_key_value_heads"] = 2
    if family == "Qwen3":
        shape["head_dim"] = 8
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(kind(**(shape | changes))).eval()


def rows_of(batch: Any) -> list[list[int]]:
    """The tokens of each completion of a Rollout."""
    return [ids[mask].tolist() for ids, mask in zip(batch.completion_ids, batch.completion_mask, strict=True)]


def refusal(capsys: Capture, function: Callable[..., Any], *given: Any) -> str:
    """The one line with which a function refuses."""
    with pytest.raises(SystemExit) as end:
        function(*given)
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


@pytest.fixture
def gsm8k() -> Path:
    """Folder with the real GSM8K's train.jsonl and test.jsonl."""
    folder = os.environ.get("GSM8K_DIR")
    if not folder:
        pytest.skip("GSM8K_DIR names no folder with the real GSM8K")
    return Path(folder)
