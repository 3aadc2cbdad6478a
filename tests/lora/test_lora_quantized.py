"""Adapters on quantized models: their products are of floats, with the input as it was before it is rounded.

The torch model is that of the quantized checkpoint (quantization/models.py), each of its linears with an adapter beside
it. What activations that are rounded to int8 may do to a comparison is in comparison.py.
"""

import copy

import numpy as np
import pytest
import torch

from tests.distributed.rank_models import UNIT_TOLERANCE
from tests.engines import distributions, engine
from tests.lora.adapters import VOCABULARY, adapt, adapter, ask, requests
from tests.quantization.models import SIZES, written
from tests.quantization.test_quantized_models import SCHEMES
from tests.reference.torch_reference import LEAST_MARGIN, LOGPROB_TOLERANCE

# The last ones multiply their input, or put it into another order, before the kernels get it: adapters do not see that.
QUICK = "compressed-tensors w8a8 dynamic"
OTHERS = (
    "compressed-tensors w8a8 static",
    "compressed-tensors w8a8 static, asymmetric",
    "compressed-tensors packed w4a16",
    "fp8 in blocks",
    "awq",
    "modelslim w8a8",
    "golden stick w8a8",
    "compressed-tensors packed w4a16, activation order",
    "gptq, activation order",
)


@pytest.mark.feature("LoRA", families=["quantized"])
@pytest.mark.parametrize("name", [QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_tokens_and_logprobs(name: str) -> None:
    scheme = SCHEMES[name]
    tolerance, least = (UNIT_TOLERANCE, 0.1) if scheme.int8_inputs else (LOGPROB_TOLERANCE, LEAST_MARGIN)
    model = written("qwen2", scheme)
    adapters = [adapter("qwen2", seed, SIZES, r=rank) for seed, rank in ((1, 4), (2, 7))]
    models = [model.model, *(adapt(copy.deepcopy(model.model), path) for path in adapters)]
    wanted = requests(models, [20, 33, 5, 1, 9, 12], least)
    with engine(model.folder, max_model_len=64, enable_lora=True, max_loras=2) as llm:
        outputs = ask(llm, wanted, adapters)
    off = []
    for output, request in zip(outputs, wanted, strict=True):
        assert list(output.outputs[0].token_ids) == request.answer.tokens
        want = torch.log_softmax(request.answer.token_logits, -1).numpy()
        off.append(np.abs(distributions(output.outputs[0].logprobs, VOCABULARY) - want).reshape(-1))
    assert np.concatenate(off).max() < tolerance
    assert np.median(np.concatenate(off)) < LOGPROB_TOLERANCE
