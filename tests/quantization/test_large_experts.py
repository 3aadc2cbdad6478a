"""256 experts of DeepSeek-V3's structure in FP8 blocks and in int8: loaded within the memory bound, and right.

1.8 billion parameters, with the sizes of V3's attention but for the number of heads. What is computed is compared with
transformers' layers, one at a time, whose linears read their tensors from the files and dequantize them by definition.
"""

import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3DecoderLayer, DeepseekV3RotaryEmbedding

from tests.checkpoints import random_prompts
from tests.engines import answer_once
from tests.quantization.experts import Experts
from tests.quantization.large import Large, Tensors, write
from tests.quantization.models import Exact, replace_module

GIB = 2**30
PROMPT_LENGTH = 24
# Of two mean errors: each is of 23 samples, uncertain by 0.75 / sqrt(23) = 16 %, hence their ratio by 22 %; three times
# that is allowed.
RATIO = 1.66
SIZES: dict[str, Any] = {
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "intermediate_size": 5632,
    "moe_intermediate_size": 512,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 3,
    "num_nextn_predict_layers": 0,
    "vocab_size": 16384,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


class Floats(torch.nn.Module):
    """A linear of weights dequantized to bfloat16, in the dtype of its inputs; read anew each time."""

    def __init__(self, tensors: Tensors, name: str) -> None:
        super().__init__()
        self.tensors, self.name = tensors, name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ torch.from_numpy(self.tensors.matrix(self.name)).bfloat16().to(x.dtype).T


class StoredExpert(torch.nn.Module):
    """One expert whose linears are made when it is chosen."""

    def __init__(self, linear: Any, prefix: str) -> None:
        super().__init__()
        self.linear, self.prefix = linear, prefix

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up, down = (self.linear(f"{self.prefix}.{name}_proj") for name in ("gate", "up", "down"))
        return down(torch.nn.functional.silu(gate(x)) * up(x))


class Streamed:
    """The torch model of a large checkpoint; `integers`: with weights and activations of int8."""

    def __init__(self, large: Large, integers: bool) -> None:
        self.tensors = Tensors(large)
        self.config = large.config
        self.config._attn_implementation = "eager"
        self.integers = integers

    def linear(self, name: str) -> torch.nn.Module:
        return Exact(self.tensors.multiply(name)) if self.integers else Floats(self.tensors, name)

    def read(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self.tensors.read(name).astype(np.float32))

    def layer(self, number: int, dtype: torch.dtype) -> torch.nn.Module:
        prefix = f"model.layers.{number}"
        with torch.device("meta"):
            layer = DeepseekV3DecoderLayer(self.config, number)
        mlp: Any = layer.mlp
        if number >= self.config.first_k_dense_replace:
            names = [f"{prefix}.mlp.experts.{expert}" for expert in range(self.config.n_routed_experts)]
            mlp.experts = Experts([StoredExpert(self.linear, name) for name in names])
        for name in [name for name, module in layer.named_modules() if isinstance(module, torch.nn.Linear)]:
            replace_module(layer, name, self.linear(f"{prefix}.{name}"))
        values = {name: self.read(f"{prefix}.{name}") for name in layer.state_dict()}
        # The router computes in float32, and what is added to its scores stays there.
        kept = {name: value if name.endswith("bias") else value.to(dtype) for name, value in values.items()}
        layer.load_state_dict(kept, assign=True)
        return layer.eval()

    @torch.inference_mode()
    def logprobs(self, prompt: list[int], dtype: torch.dtype, noise: float = 0.0) -> np.ndarray:
        """Of the whole vocabulary after each token of the prompt; `noise`: by how much embeddings are off."""
        hidden = self.read("model.embed_tokens.weight")[prompt][None].to(dtype)
        hidden *= 1 + noise * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        positions = torch.arange(len(prompt))[None]
        rotary = DeepseekV3RotaryEmbedding(self.config)
        mask = torch.full((len(prompt), len(prompt)), -torch.inf).triu(1)[None, None].to(dtype)
        for number in range(self.config.num_hidden_layers):
            layer = self.layer(number, dtype)
            hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary(hidden, positions))
        wide = hidden[0].float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.config.rms_norm_eps)
        normed = self.read("model.norm.weight").to(dtype) * normed.to(dtype)
        logits = normed @ self.read("lm_head.weight").to(dtype).T
        return torch.log_softmax(logits.float(), -1).numpy()


@pytest.fixture(scope="module", params=["F8_E4M3", "I8"])
def large(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Large]:
    """The checkpoint, removed at once afterwards."""
    folder = tmp_path_factory.mktemp("large")
    if psutil.virtual_memory().available < 8 * GIB or shutil.disk_usage(folder).free < 4 * GIB:
        pytest.skip("needs 8 GiB of free memory, and 4 GiB of disk where temporary files are")
    try:
        yield write(folder, DeepseekV3Config(**SIZES), request.param)
    finally:
        shutil.rmtree(folder)


def serve(large: Large, loaded: int, **options: Any) -> tuple[list[int], dict[str, Any]]:
    """A prompt and what vLLM says, once it is sure that this took no more than what is loaded and 1.5 GiB.

    Python, torch, vLLM and MindSpore are in that: they hold 1.2 GiB before any weight is read.
    """
    prompt = random_prompts([PROMPT_LENGTH], large.config.vocab_size)[0]
    answer = answer_once(large.folder, prompt, kv_cache_memory_bytes=GIB // 16, **options)
    print(f"peak {answer['peak'] / GIB:.2f} GiB, loaded {loaded / GIB:.2f} GiB")
    assert answer["peak"] < loaded + 3 * GIB // 2
    return prompt, answer


def of_prompt(logprobs: np.ndarray, prompt: list[int]) -> np.ndarray:
    return logprobs[np.arange(len(prompt) - 1), prompt[1:]]


def test_in_floats(large: Large) -> None:
    """FP8 as it is served by default, in bfloat16: as far from float32 as torch is."""
    if large.dtype != "F8_E4M3":
        pytest.skip("int8 is served as it is")
    prompt, answer = serve(large, 2 * large.values)
    streamed = Streamed(large, integers=False)
    exact, rounded = (of_prompt(streamed.logprobs(prompt, dtype), prompt) for dtype in (torch.float32, torch.bfloat16))
    ours, torchs = np.abs(answer["logprobs"] - exact).mean(), np.abs(rounded - exact).mean()
    print(f"mean error {ours:.2e}, torch's {torchs:.2e}")
    assert ours <= RATIO * torchs


def test_in_integers(large: Large) -> None:
    """W8A8 as it is, and FP8 rounded to it; activations in float32.

    In a model of this size some input always lies so near the middle between two integers that the order of a sum
    decides how it is rounded: of 3 million, 1e-6 * 127 of them. One unit of one input is 6e-4 of what a linear gives,
    so that more of the next ones are rounded differently, until rounding noise is all there is. The torch model itself
    moves as far when its embeddings change by 1e-6, which is the measure here; test_quantized_experts.py is exact.
    """
    floats = large.values - large.weights + large.absorbed
    loaded = large.weights - large.absorbed + 4 * floats
    prompt, answer = serve(large, loaded, dtype="float32", additional_config={"fp8": "int8"})
    streamed = Streamed(large, integers=True)
    exact, moved = (streamed.logprobs(prompt, torch.float32, noise) for noise in (0.0, 1e-6))
    ours = np.abs(answer["logprobs"] - of_prompt(exact, prompt)).mean()
    torchs = np.abs(of_prompt(moved, prompt) - of_prompt(exact, prompt)).mean()
    print(f"mean error {ours:.2e}, torch's after a change of 1e-6 {torchs:.2e}")
    assert ours <= RATIO * torchs
    assert exact[-1].max() - exact[-1][answer["tokens"][0]] < 10 * torchs
