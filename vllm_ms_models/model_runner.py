"""The model runner: vLLM's own for CPUs, unchanged.

Batching, chunked prefill, prefix caching, sampling, log-probabilities and structured output are all inherited; the
model that it drives is a shell round a MindSpore Cell (`bridge/model.py`).
"""

from vllm.v1.worker.cpu_model_runner import CPUModelRunner


class MindSporeModelRunner(CPUModelRunner):
    """Nothing is overridden: keep it so."""
