"""Run as a program in another environment: the greedy answers of the vLLM that is installed there.

python stock.py FOLDER PROMPTS_JSON TOKENS    prints a line of JSON: a list of token ids for each prompt
"""

import json
import os
import sys


def main(folder: str, prompts: list[list[int]], tokens: int) -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams

    llm = LLM(folder, skip_tokenizer_init=True, dtype="bfloat16", max_model_len=256, max_num_seqs=8, enforce_eager=True)
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
    print("ANSWER " + json.dumps([list(output.outputs[0].token_ids) for output in outputs]))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]))
