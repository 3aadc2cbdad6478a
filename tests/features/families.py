"""One small model for each family that is served, all with the demo's tokenizer, and its torch reference.

Qwen2 is the demo itself, which answers questions; the others have random weights. The vocabulary has room for tokens of
reasoning and of tool calls, which the demo's has not.
"""

import functools
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from tests.checkpoints import DEEPSEEK, checkpoint
from tests.quantization.comparison import UNIT_TOLERANCE
from tests.quantization.models import written
from tests.quantization.writers_compressed import SCHEMES
from tests.reference import torch_reference
from tests.reference.torch_reference import LOGPROB_TOLERANCE
from tests.servers import DEMO

ADDED = ["<think>", "</think>", "<tool_call>", "</tool_call>"]  # the first of these is token 1024
VOCABULARY = 1040

# The demo's, with tools, tool calls, results, and reasoning where it is asked for.
TEMPLATE = """
{%- if tools %}{{- '<|im_start|>system\\n' + (tools | tojson) + '<|im_end|>\\n' }}{%- endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + (message['content'] or '') }}
{%- for call in message.get('tool_calls') or [] %}
{{- '<tool_call>' + (call['function'] | tojson) + '</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
{%- if thinking %}{{- '<think>' }}{%- endif %}
"""

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "deepseek_v3": DEEPSEEK | {"n_group": 2, "topk_group": 1},
    "quantized": {},
    "llama": {},
    "qwen3": {},
    "qwen3_moe": {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
    "mixtral": {},
}
QUICK = ("qwen2", "deepseek_v3", "quantized")  # dense, latent attention with experts, W8A8: also in `make test`


@dataclass(frozen=True)
class Family:
    """A checkpoint to serve in float32, and what torch says of it."""

    name: str
    folder: Path
    model: torch.nn.Module
    tolerance: float  # of log-probabilities: see torch_reference.py and quantization/comparison.py

    def logits(self, tokens: list[int]) -> torch.Tensor:
        """Of all positions: float32 `[len(tokens), vocab]`."""
        return torch_reference.logits(self.model, tokens)

    def check_greedy(self, prompt: list[int], tokens: list[int]) -> None:
        """Each of `tokens` is the most likely one, or as likely as that to rounding."""
        assert tokens
        rows = self.logits(prompt + tokens)[len(prompt) - 1 : -1]
        behind = rows.amax(-1) - rows.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert behind.max().item() <= 2 * self.tolerance, behind


@functools.cache
def family(name: str, vocabulary: int = VOCABULARY) -> Family:
    if name == "quantized":
        model = written("llama", SCHEMES["w8a8 dynamic"], vocab_size=vocabulary)  # int8 weights and activations
        folder, reference, tolerance = model.folder, model.model, UNIT_TOLERANCE
    else:
        options = FAMILIES[name] | {"vocab_size": vocabulary}
        folder = _demo(vocabulary) if name == "qwen2" else checkpoint(name, **options)
        reference, tolerance = torch_reference.load(folder), LOGPROB_TOLERANCE
    _write_tokenizer(folder)
    return Family(name, folder, reference, tolerance)


@functools.cache
def _root() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="vllm_ms_models_features_")


def _demo(vocabulary: int) -> Path:
    """The demo with rows of zeros for the added tokens in its embedding, which is its head too."""
    folder = Path(_root().name) / f"demo_{vocabulary}"
    shutil.copytree(DEMO, folder)
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    more = torch.zeros(vocabulary - len(embedding), embedding.shape[1], dtype=embedding.dtype)
    tensors["model.embed_tokens.weight"] = torch.cat((embedding, more))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": vocabulary}))
    return folder


def _write_tokenizer(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    tokenizer.add_tokens(ADDED)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
