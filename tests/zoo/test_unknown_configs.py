"""Models whose config transformers does not have: how theirs are read, and what in them is refused."""

import json
from pathlib import Path

import pytest
from transformers import AutoConfig

from vllm_ms_models import registry
from vllm_ms_models.bridge.plugin import register_configs
from vllm_ms_models.minicpm.config import MiniCPMConfig, check


@pytest.fixture(autouse=True)
def registered() -> None:
    register_configs()


@pytest.mark.parametrize("model_type", registry.CONFIGS)
def test_a_config_that_names_code(model_type: str, tmp_path: Path) -> None:
    """As published: `auto_map` is there, its file is not, and nobody is asked whether to trust it."""
    entries = {"model_type": model_type, "auto_map": {"AutoConfig": "configuration.Config"}, "rope_theta": 5e5}
    rope = {"type": "dynamic", "factor": 2.0}
    (tmp_path / "config.json").write_text(json.dumps(entries | {"hidden_size": 96, "rope_scaling": rope}))
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.model_type == model_type
    assert config.hidden_size == 96
    assert config.rope_parameters["rope_theta"] == 5e5
    assert config.rope_parameters["rope_type"] == "dynamic"
    # The defaults of their own code, where they are not Llama's.
    assert config.tie_word_embeddings == (model_type == "minicpm")
    assert getattr(config, "bias", None) == {"internlm2": True, "internlm3": False}.get(model_type)


@pytest.mark.parametrize("entry", [{"num_experts": 8}, {"sparse_config": {"kernel_size": 32}}])
def test_minicpm_with_more_than_is_implemented(entry: dict[str, object]) -> None:
    check(MiniCPMConfig())
    (name,) = entry
    with pytest.raises(ValueError, match=rf"^{name}.* in config\.json .* is not supported"):
        check(MiniCPMConfig(**entry))
