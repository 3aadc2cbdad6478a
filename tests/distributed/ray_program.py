"""Two Ray nodes of one CPU each on the loopback address, and an engine whose ranks are on both (test_ray.py).

python ray_program.py FOLDER OPTIONS PROMPTS RESULT

OPTIONS (those of `LLM`) and PROMPTS are JSON; RESULT is a file for the tokens after all prompts and the
log-probabilities within them, one prompt after another. A program of its own, because Ray leaves threads in the process
that uses it.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import ray

from tests.distributed.ray_nodes import ADDRESSES, cluster
from tests.engines import distributions, engine, greedy, token_ids
from tests.quantization.comparison import TOKENS, VOCABULARY

THREADS = os.environ.get("OMP_NUM_THREADS")  # before an engine sets it for its own processes


def answers(folder: str, options: dict[str, Any], prompts: list[list[int]], result: str) -> None:
    with engine(folder, max_model_len=64, distributed_executor_backend="ray", **options) as llm:
        executor = llm.llm_engine.engine_core.engine_core.model_executor
        nodes = [handle.node_id for handle in executor.ray_worker_handles]
        assert len(nodes) == len(set(nodes)) == 2, nodes
        threads = executor.collective_rpc(_threads)
        assert threads == [THREADS] * 2, threads
        outputs = greedy(llm, prompts, TOKENS, prompt_logprobs=-1)
        found = [distributions(output.prompt_logprobs, VOCABULARY) for output in outputs]
    np.savez(result, tokens=np.array(token_ids(outputs)), logprobs=np.concatenate(found))


def _threads(worker: Any) -> str | None:
    return os.environ.get("OMP_NUM_THREADS")


def main(folder: str, options: str, prompts: str, result: str) -> None:
    nodes = cluster()
    try:
        ray.init(nodes.address, _node_ip_address=ADDRESSES[0])
        answers(folder, json.loads(options), json.loads(prompts), result)
    finally:
        ray.shutdown()
        nodes.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
