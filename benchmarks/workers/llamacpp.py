"""llama.cpp through its C API: no HTTP, no sampling (the next tokens are made up), logits computed as for sampling.

python llamacpp.py GGUF SPAWNED THREADS
"""

import ctypes
import sys
import time
from importlib.metadata import version
from itertools import islice
from typing import Any

import llama_cpp as api
from protocol import Answer, Engine, serve

BATCH, UBATCH = 2048, 512  # llama.cpp's own defaults


class LlamaCpp(Engine):
    """One model; a context of the size that the sequences need."""

    def __init__(self) -> None:
        self.threads = int(sys.argv[3])
        api.llama_backend_init()
        start = time.perf_counter()
        model = api.llama_model_load_from_file(sys.argv[1].encode(), api.llama_model_default_params())
        self.load_seconds = time.perf_counter() - start
        if model is None:
            raise RuntimeError(f"llama.cpp could not load {sys.argv[1]}.")
        self.model = model
        self.vocab_size = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
        self.context: Any = None
        self.size = (0, 0)
        self.batch = api.llama_batch_init(BATCH, 0, 1)
        self.pending: list[tuple[int, int, int, bool]] = []  # token, position, sequence, logits wanted
        self.positions: list[int] = []

    def describe(self) -> Answer:
        return {
            "llama-cpp-python": version("llama-cpp-python"),
            "system": api.llama_print_system_info().decode(),
            "threads": self.threads,
            "n_batch": BATCH,
            "n_ubatch": UBATCH,
            "load_seconds": self.load_seconds,
        }

    def _resize(self, sequences: int, limit: int) -> None:
        """A context for `sequences` of `limit` positions; the present one if it has that size."""
        size = (sequences, -(-limit // 256) * 256)
        if size == self.size:
            api.llama_memory_clear(api.llama_get_memory(self.context), False)
            return
        if self.context is not None:
            api.llama_free(self.context)
        parameters = api.llama_context_default_params()
        parameters.n_ctx = size[0] * size[1]
        parameters.n_seq_max = sequences
        parameters.n_batch, parameters.n_ubatch = BATCH, UBATCH
        parameters.n_threads = parameters.n_threads_batch = self.threads
        self.context = api.llama_init_from_model(self.model, parameters)
        if self.context is None:
            raise RuntimeError("llama.cpp could not make a context.")
        self.size = size

    def begin(self, prompts: list[list[int]], limit: int) -> None:
        self._resize(len(prompts), limit)
        self.pending = [
            (token, position, sequence, position == len(prompt) - 1)
            for sequence, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        self.positions = [len(prompt) for prompt in prompts]

    def step(self) -> int:
        if not self.pending:
            self.pending = [(100 + s, position, s, True) for s, position in enumerate(self.positions)]
            self.positions = [position + 1 for position in self.positions]
        rest = iter(self.pending)
        while part := list(islice(rest, BATCH)):
            self._decode(part)
        self.pending = []
        return len(self.positions)

    def _decode(self, part: list[tuple[int, int, int, bool]]) -> None:
        batch = self.batch
        batch.n_tokens = len(part)
        for row, (token, position, sequence, wanted) in enumerate(part):
            batch.token[row] = token
            batch.pos[row] = position
            batch.n_seq_id[row] = 1
            batch.seq_id[row][0] = sequence
            batch.logits[row] = wanted
        if (status := api.llama_decode(self.context, batch)) != 0:
            raise RuntimeError(f"llama_decode returned {status}.")
        api.llama_synchronize(self.context)
        if part[-1][3]:
            self.logit = ctypes.cast(api.llama_get_logits_ith(self.context, -1), ctypes.POINTER(ctypes.c_float))[0]

    def end(self) -> None:
        self.pending, self.positions = [], []


if __name__ == "__main__":
    serve(LlamaCpp, float(sys.argv[2]))
