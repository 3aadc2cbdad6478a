"""vLLM in one process, whatever back end is installed: ours, its own for CPUs, zentorch's.

    python vllm_engine.py CHECKPOINT SPAWNED OPTIONS    (options of `LLM`, as JSON)

The engine core runs in this process (VLLM_ENABLE_V1_MULTIPROCESSING=0), so that steps are timed without pipes.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

from protocol import Answer, Engine, serve


class VllmEngine(Engine):
    """`LLM(...).llm_engine`, driven step by step."""

    def __init__(self) -> None:
        from vllm import LLM

        self.load_seconds = 0.0
        self._time_loading()
        self.llm: Any = LLM(sys.argv[1], **json.loads(sys.argv[3]))
        self.engine: Any = self.llm.llm_engine
        runner = self.engine.model_executor.driver_worker.worker.model_runner
        self.model_seconds = 0.0
        runner._model_forward = self._timed(runner._model_forward)
        runner.model.compute_logits = self._timed(runner.model.compute_logits)
        self.runner = runner
        self.vocab_size = runner.model_config.get_vocab_size()
        self.requests: list[str] = []
        self.count = 0

    def _time_loading(self) -> None:
        """Time the load of the weights, with what a back end makes of them then."""
        from vllm.v1.worker.worker_base import WorkerWrapperBase

        def timed(wrapper: Any, *arguments: Any, **keywords: Any) -> Any:
            start = time.perf_counter()
            result = wrapper.worker.load_model(*arguments, **keywords)
            self.load_seconds = time.perf_counter() - start
            return result

        WorkerWrapperBase.load_model = timed

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **keywords: Any) -> Any:
            start = time.perf_counter()
            result = call(*arguments, **keywords)
            self.model_seconds = (self.model_seconds or 0.0) + time.perf_counter() - start
            return result

        return timed

    def describe(self) -> Answer:
        import torch
        import vllm
        from vllm.platforms import current_platform

        cache = self.engine.vllm_config.cache_config
        return {
            "vllm": vllm.__version__,
            "torch": torch.__version__,
            "platform": type(current_platform).__name__,
            "runner": f"{type(self.runner).__module__}.{type(self.runner).__name__}",
            "torch_threads": torch.get_num_threads(),
            "block_size": cache.block_size,
            "kv_blocks": cache.num_gpu_blocks,
            "load_seconds": self.load_seconds,
        }

    def begin(self, prompts: list[list[int]], limit: int) -> None:
        from vllm import SamplingParams

        for prompt in prompts:
            self.count += 1
            self.requests.append(str(self.count))
            sampling = SamplingParams(
                temperature=0, max_tokens=limit - len(prompt), ignore_eos=True, detokenize=False, output_kind=DELTA
            )
            self.engine.add_request(self.requests[-1], {"prompt_token_ids": prompt}, sampling)

    def step(self) -> int:
        return sum(len(output.outputs[0].token_ids) for output in self.engine.step())

    def chat(self, questions: list[str], tokens: int) -> list[str]:
        from transformers import AutoTokenizer
        from vllm import SamplingParams

        tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
        prompts = []
        for question in questions:
            messages = [{"role": "user", "content": question}]
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            prompts.append({"prompt_token_ids": list(ids)})
        end = [tokenizer.eos_token_id]
        sampling = SamplingParams(temperature=0, max_tokens=tokens, stop_token_ids=end, detokenize=False)
        outputs = self.llm.generate(prompts, sampling, use_tqdm=False)
        return [tokenizer.decode(output.outputs[0].token_ids, skip_special_tokens=True) for output in outputs]

    def end(self) -> None:
        self.engine.abort_request(self.requests)
        self.requests = []
        while self.engine.has_unfinished_requests():
            self.engine.step()


if __name__ == "__main__":
    from vllm.sampling_params import RequestOutputKind

    DELTA = RequestOutputKind.DELTA
    serve(VllmEngine, float(sys.argv[2]))
