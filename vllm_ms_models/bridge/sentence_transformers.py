"""What sentence-transformers' files in a model's folder ask for and vLLM would leave out: refused in a sentence."""

from collections.abc import Iterator
from typing import Any

from vllm.config import ModelConfig
from vllm.transformers_utils.repo_utils import get_hf_file_to_dict

POOLED = ("cls", "cls_token", "lasttoken", "mean", "mean_tokens")
MODE = "pooling_mode"


def refusals(model: ModelConfig) -> Iterator[str]:
    """Of `1_Pooling/config.json`, unless --pooler-config chooses the pooling."""
    if getattr(model, "_pooler_config_sources", {}).get("seq_pooling_type") == "user":
        return
    modules = get_hf_file_to_dict("modules.json", model.model, model.revision) or []
    for path in (module["path"] for module in modules if module["type"].endswith(".Pooling")):
        modes = _modes(get_hf_file_to_dict(f"{path}/config.json", model.model, model.revision) or {})
        if len(modes) != 1 or modes[0] not in POOLED:
            asked = " and ".join(modes) or "of no kind"
            yield (
                f"{path}/config.json of {model.model} asks for the pooling {asked}, where "
                f"one of {', '.join(POOLED)} is expected; choose one yourself: --pooler-config "
                '\'{"pooling_type": "LAST"}\', "MEAN" or "CLS".'
            )


def _modes(config: dict[str, Any]) -> list[str]:
    """Written as `"pooling_mode": "mean"`, or as `"pooling_mode_mean_tokens": true`."""
    named = config.get(MODE, [])
    switched = [key.removeprefix(f"{MODE}_") for key, value in config.items() if value is True and MODE in key]
    return [*([named] if isinstance(named, str) else named), *switched]
