"""DeepSeek-V3 and R1: latent attention, experts by groups. tests/reference/test_deepseek.py has V2."""

from transformers import DeepseekV3Config

from tests.checkpoints import DEEPSEEK
from tests.zoo.family import Family

FAMILY = Family(
    ("DeepseekV3ForCausalLM", "DeepseekV2ForCausalLM"),
    DeepseekV3Config,
    {
        "experts": DEEPSEEK,
        "groups": DEEPSEEK | {"n_group": 2, "topk_group": 1},
        "queries not reduced": DEEPSEEK | {"q_lora_rank": None},
    },
    in_16_bits={"first_k_dense_replace": 4, "num_key_value_heads": 8},  # without experts, as in test_bfloat16.py
    floats=(".gate", "kv_b_proj"),
)
