"""Quantized checkpoints through `vllm serve` without a flag: the tokens of torch models that do the same arithmetic."""

import pytest

from benchmarks.models import write_tokenizer
from tests.quantization.comparison import TOKENS, UNIT_TOLERANCE, VOCABULARY, without_ties
from tests.quantization.models import written
from tests.quantization.test_quantized_models import AS_INT8, SCHEMES
from tests.reference.torch_reference import LOGPROB_TOLERANCE
from tests.servers import serve

QUICK = ("compressed-tensors w8a8 dynamic", "modelslim w8a8")  # a server takes seconds to start
OPTIONS = ("--dtype", "float32", "--max-model-len", "64", "--max-num-seqs", "4", "--kv-cache-memory-bytes", "33554432")

pytestmark = pytest.mark.serving


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in SCHEMES]
)
def test_tokens(name: str) -> None:
    scheme = SCHEMES[name]
    model = written(("qwen2", "llama")[list(SCHEMES).index(name) % 2], scheme)
    write_tokenizer(model.folder, VOCABULARY)
    prompts, answers = without_ties(model.model, 2 * (UNIT_TOLERANCE if scheme.int8_inputs else LOGPROB_TOLERANCE))
    more = ("--additional-config", '{"fp8": "int8"}') if name in AS_INT8 else ()
    with serve(model.folder, "--served-model-name", "quantized", *OPTIONS, *more) as server:
        for prompt, wanted in zip(prompts, answers, strict=True):
            answer = server.client.completions.create(
                model="quantized",
                prompt=prompt,
                temperature=0,
                max_tokens=TOKENS,
                extra_body={"ignore_eos": True, "return_token_ids": True},
            )
            assert answer.choices[0].token_ids == wanted.tokens
