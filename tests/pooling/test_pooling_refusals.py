"""What cannot be pooled is refused in a sentence, before any weight is read."""

import json
from typing import Any

import pytest

from tests.engines import engine
from tests.pooling.models import OPTIONS, decoder, edit_config, save, sentence_transformer

MEAN = {"pooling_type": "MEAN"}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "both directions": (
        {"hf_overrides": {"is_causal": False}},
        "is_causal=False asks for attention in both directions, which is not supported yet: serve a model that reads "
        "from left to right, or leave is_causal out of --hf-overrides.",
    ),
    "chunks": (
        {"pooler_config": MEAN, "enable_chunked_prefill": True},
        "--enable-chunked-prefill is not possible with MEAN and ALL pooling, which takes whole prompts; leave it out.",
    ),
    "prefix cache": (
        {"pooler_config": {"pooling_type": "CLS"}, "enable_prefix_caching": True},
        "--enable-prefix-caching is not possible with CLS and ALL pooling, which takes whole prompts; leave it out.",
    ),
    "speculation": (
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}},
        "--speculative-config is not possible with --runner pooling, which generates no tokens; leave it out.",
    ),
    "no method": (
        {
            "hf_overrides": {
                "architectures": ["Qwen2ForSequenceClassification"],
                "classifier_from_token": ["cold", "hot"],
            }
        },
        'classifier_from_token needs "method" in --hf-overrides, one of from_2_way_softmax, no_post_processing.',
    ),
    "unknown token": (
        {
            "hf_overrides": {
                "architectures": ["Qwen2ForSequenceClassification"],
                "method": "from_2_way_softmax",
                "classifier_from_token": ["cold", "nonesuch"],
            }
        },
        "classifier_from_token has 'nonesuch', which is no token of ",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    options, sentence = REFUSED[name]
    with pytest.raises(ValueError) as caught, engine(save(decoder("qwen2")), **options, **OPTIONS):
        pass
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("config", "asked"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}, "mean_tokens and max_tokens"),
        ({"pooling_mode": "weightedmean"}, "weightedmean"),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, "mean_sqrt_len_tokens"),
    ],
)
def test_poolings_that_vllm_lacks(config: dict[str, Any], asked: str) -> None:
    """vLLM would take another."""
    folder = sentence_transformer(save(decoder("qwen2")), "mean_tokens", normalize=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))
    sentence = f"1_Pooling/config.json of .* asks for the pooling {asked}, where"
    with pytest.raises(ValueError, match=sentence), engine(folder, **OPTIONS):
        pass
    if asked == "weightedmean":
        with engine(folder, pooler_config={"pooling_type": "MEAN"}, **OPTIONS):
            pass  # chosen


def test_a_dense_layer_that_cannot_be_read() -> None:
    """vLLM would go on without it."""
    folder = sentence_transformer(save(decoder("qwen2")), "lasttoken", normalize=True, dense=32)
    (folder / "3_Dense" / "model.safetensors").unlink()
    sentence = "Only 0 of the 1 dense layers that modules.json of .* names could be read (3_Dense)"
    with pytest.raises(ValueError, match=sentence.replace("(3_Dense)", r"\(3_Dense\)")), engine(folder, **OPTIONS):
        pass


@pytest.mark.parametrize("architecture", ["BertModel", "LlamaBidirectionalModel", "Qwen2ForRewardModel"])
def test_other_architectures(architecture: str) -> None:
    folder = save(decoder("qwen2"))
    edit_config(folder, architectures=[architecture])
    with pytest.raises(ValueError, match=f"{architecture}.*Qwen2ForCausalLM"), engine(folder, **OPTIONS):
        pass
