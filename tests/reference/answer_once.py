"""Run as a program: one engine, one prompt, and how much memory that took. Prints a line of JSON.

python answer_once.py FOLDER OPTIONS TOKEN_ID...

OPTIONS are those of `LLM`, as JSON.
"""

import json
import os
import re
import sys
from pathlib import Path
from typing import Any


def peak_memory() -> int:
    """The most memory this process has had resident, in bytes.

    From /proc because `ru_maxrss` begins with that of the process which started this one.
    """
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def main(folder: str, options: dict[str, Any], prompt: list[int]) -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # one process, whose memory is everything
    from vllm import LLM, SamplingParams

    llm = LLM(folder, skip_tokenizer_init=True, max_model_len=512, max_num_seqs=1, **options)
    sampling = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, detokenize=False, prompt_logprobs=0)
    (output,) = llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
    logprobs = [entry[token].logprob for entry, token in zip(output.prompt_logprobs[1:], prompt[1:], strict=True)]
    answer = {"tokens": list(output.outputs[0].token_ids), "logprobs": logprobs, "peak": peak_memory()}
    print("ANSWER " + json.dumps(answer))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]), [int(token) for token in sys.argv[3:]])
