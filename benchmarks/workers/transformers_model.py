"""Hugging Face transformers: forward passes in bf16 with its dynamic cache, greedy, all sequences of equal length.

python transformers_model.py CHECKPOINT SPAWNED THREADS
"""

import sys
import time
from typing import Any

import torch
import transformers
from protocol import Answer, Engine, serve


class TransformersModel(Engine):
    """`AutoModelForCausalLM`, without what generate() does round it."""

    def __init__(self) -> None:
        torch.set_num_threads(int(sys.argv[3]))
        start = time.perf_counter()
        self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
        self.model.eval()
        self.load_seconds = time.perf_counter() - start
        self.vocab_size = self.model.config.vocab_size
        self.cache: Any = None
        self.ids = torch.empty(0, 0, dtype=torch.long)

    def describe(self) -> Answer:
        return {
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "torch_threads": torch.get_num_threads(),
            "attention": self.model.config._attn_implementation,
            "load_seconds": self.load_seconds,
        }

    def begin(self, prompts: list[list[int]], limit: int) -> None:
        self.cache = transformers.DynamicCache(config=self.model.config)
        self.ids = torch.tensor(prompts)

    @torch.inference_mode()
    def step(self) -> int:
        output = self.model(self.ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.ids = output.logits.argmax(-1)
        return len(self.ids)

    def end(self) -> None:
        self.cache = None


if __name__ == "__main__":
    serve(TransformersModel, float(sys.argv[2]))
