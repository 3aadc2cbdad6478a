"""`vllm serve --speculative-config` on models other than the demo (tests/serving has that one): no token changes."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.models import write_tokenizer
from tests.features.families import Family, family
from tests.features.service import Service
from tests.reference import torch_reference
from tests.servers import serve
from tests.speculation.mtp import with_draft_layer

NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
OPTIONS = ("--served-model-name", "served", "--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "8")
FEATURES = {"ngram": "n-grams", "draft_model": "a draft model", "mtp": "MTP layers"}
CASES = [
    ("deepseek_v3", "mtp"),
    ("deepseek_v3", "ngram"),
    ("deepseek_v3", "draft_model"),  # a Llama, which never agrees: vLLM takes a DeepSeek for one of MTP layers
    ("quantized", "ngram"),
    ("quantized", "draft_model"),
]


def with_mtp_layer(folder: Path) -> Family:
    """A DeepSeek-V3 whose draft layer is right now and then."""
    with_draft_layer(folder, residual=0.03)
    write_tokenizer(folder, 211)
    return Family("deepseek_v3", folder, torch_reference.load(folder), torch_reference.LOGPROB_TOLERANCE)


@pytest.mark.slow
@pytest.mark.serving
@pytest.mark.parametrize(
    ("family_name", "method"),
    [
        pytest.param(*case, marks=pytest.mark.feature(f"speculation by {FEATURES[case[1]]}", families=[case[0]]))
        for case in CASES
    ],
)
def test_greedy_and_seeded_tokens(family_name: str, method: str, tmp_path: Path) -> None:
    model = with_mtp_layer(tmp_path / "model") if method == "mtp" else family(family_name)
    speculation: dict[str, Any] = NGRAM if method == "ngram" else {"method": method, "num_speculative_tokens": 2}
    if method == "draft_model":
        speculation |= {"model": str(family("llama" if family_name == "deepseek_v3" else family_name).folder)}
    prompts = [[(17 * seed + i * i) % 200 for i in range(10 + 30 * seed)] * 2 for seed in range(3)]
    sampled: dict[str, Any] = {"temperature": 0.9, "seed": 5, "max_tokens": 24}
    # Of four tokens, each pair comes again and again, followed by the same one now and then.
    few = {"max_tokens": 40, "allowed_token_ids": [5, 6, 7, 8]}
    with serve(model.folder, *OPTIONS) as server:
        service = Service(server, model, tmp_path)
        plain, repetitive = service.complete(prompts, **sampled), service.complete(prompts, **few)
    with serve(model.folder, *OPTIONS, "--speculative-config", json.dumps(speculation)) as server:
        service = Service(server, model, tmp_path)
        for choice in service.complete(prompts, max_tokens=40).choices:
            model.check_greedy(prompts[choice.index], list(choice.token_ids))
        speculated = service.complete(prompts, **few)
        assert tokens(speculated) == tokens(repetitive)
        accepted, drafts = (service.counter(f"spec_decode_num_{what}_tokens") for what in ("accepted", "draft"))
        assert 0 < drafts >= accepted
        assert accepted > 0 or (family_name, method) == ("deepseek_v3", "draft_model")
        assert tokens(service.complete(prompts, **sampled)) == tokens(plain)


def tokens(answer: Any) -> list[list[int]]:
    return [choice.token_ids for choice in answer.choices]
