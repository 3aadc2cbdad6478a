"""What cannot be pooled is refused in a sentence, before any weight is read."""

import json
from typing import Any

import pytest

from tests.engines import engine
from tests.pooling.encoders import FIRST, encoder, save_encoder, with_head
from tests.pooling.models import OPTIONS, decoder, edit_config, save, sentence_transformer

MEAN = {"pooling_type": "MEAN"}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "both directions in windows": (
        {
            "hf_overrides": {
                "is_causal": False,
                "layer_types": ["sliding_attention"] * 3,
                "sliding_window": 16,
                "use_sliding_window": True,
            }
        },
        "is_causal=False asks for attention in both directions, which is not supported for Qwen2ForCausalLM with "
        "sliding windows; leave is_causal out of --hf-overrides, or serve another model.",
    ),
    "chunks of both directions": (
        {"hf_overrides": {"is_causal": False}, "enable_chunked_prefill": True},
        "--enable-chunked-prefill is not possible with attention in both directions, which takes whole prompts; leave "
        "it out.",
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


@pytest.mark.parametrize("architecture", ["ModernBertModel", "LlamaBidirectionalModel", "Qwen2ForRewardModel"])
def test_other_architectures(architecture: str) -> None:
    folder = save(decoder("qwen2"))
    edit_config(folder, architectures=[architecture])
    with pytest.raises(ValueError, match=f"{architecture}.*Qwen2ForCausalLM"), engine(folder, **OPTIONS):
        pass


ENCODER_REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "too long": (
        "roberta",
        {"max_model_len": 89},
        "--max-model-len 89 is more than the 88 positions that ",
    ),
    "no positions": (
        "roberta",
        {"hf_overrides": {"pad_token_id": 89}},
        " leaves no position to text: max_position_embeddings is 90, pad_token_id 89; correct it.",
    ),
    "int8 cache": (
        "bert",
        {"kv_cache_dtype": "int8_per_token_head"},
        "--kv-cache-dtype int8_per_token_head has no effect on BertModel, which keeps no KV cache; leave it out.",
    ),
    "converted": (
        "bert",
        {"convert": "classify"},
        "--convert classify is not possible: BertModel pools already; leave it out.",
    ),
    "prefix cache": (
        "bert",
        {"enable_prefix_caching": True},
        "--enable-prefix-caching is not possible with attention in both directions, which takes whole prompts; leave "
        "it out.",
    ),
    "other positions": (
        "bert",
        {"hf_overrides": {"position_embedding_type": "relative_key"}},
        "position_embedding_type 'relative_key' in config.json is not supported; only absolute, learned ones are.",
    ),
    "a decoder": (
        "bert",
        {"hf_overrides": {"is_decoder": True}},
        "is_decoder and add_cross_attention in config.json are not supported: serve an encoder.",
    ),
    "stages": ("bert", {"pipeline_parallel_size": 2}, "Pipeline parallelism is not supported for this model."),
    "adapters": (
        "bert",
        {"enable_lora": True},
        "--enable-lora is not supported yet for models that embed or classify; leave it out.",
    ),
}


@pytest.mark.parametrize("name", ENCODER_REFUSED)
def test_refused_for_encoders(name: str) -> None:
    family, options, sentence = ENCODER_REFUSED[name]
    folder = save_encoder(encoder(family, **FIRST[family]))
    with (
        pytest.raises((ValueError, NotImplementedError)) as caught,
        engine(folder, **{**OPTIONS, "max_model_len": None} | options),
    ):
        pass
    assert sentence in str(caught.value)


def test_pairs_without_types() -> None:
    """The tokenizer tells two texts apart, the model has not learned to."""
    folder = save_encoder(with_head("bert", "sequence", 1, type_vocab_size=1))
    sentence = "the tokenizer gives the second text of a pair tokens of type 1"
    with pytest.raises(ValueError, match=sentence), engine(folder, **{**OPTIONS, "max_model_len": None}):
        pass
