"""What mindone imports and does not find beside vLLM: packages that are not run, and names that are supplied."""

from typing import Any

# Their `__init__` imports every model, pipeline, tokenizer and trainer, most of which cannot be imported here.
BYPASSED = (
    "mindone",
    "mindone.models",
    "mindone.transformers",
    "mindone.transformers.generation",
    "mindone.transformers.integrations",
    "mindone.transformers.models",
)


class GenerationMixin:
    """A base class of mindone's models, which look at its name; generating is what vLLM does."""


class PeftAdapterMixin:
    """Another, for what is not done here."""


def _absent(*_: Any, **__: Any) -> bool:
    """For functions that only mindone's `from_pretrained` calls, which nobody calls here."""
    raise NotImplementedError("Weights of mindone's models are read by this package's own loader.")


def supplied() -> dict[str, dict[str, Any]]:
    """Module -> names that mindone imports from it."""
    return {
        # Of packages in BYPASSED.
        "mindone.transformers": {"__version__": "4.57.1"},  # of the transformers that it was made from
        "mindone.transformers.generation": {"GenerationMixin": GenerationMixin},
        "mindone.transformers.integrations": {"PeftAdapterMixin": PeftAdapterMixin},
        # Gone in transformers 5; all are for reading checkpoints, of other frameworks or by address.
        "transformers.utils": {
            "FLAX_WEIGHTS_NAME": "flax_model.msgpack",
            "TF2_WEIGHTS_NAME": "tf_model.h5",
            "TF_WEIGHTS_NAME": "model.ckpt",
            "download_url": _absent,
            "is_offline_mode": _absent,
            "is_remote_url": _absent,
            "is_safetensors_available": lambda: True,
        },
        # Gone there too; for tokenizers and processors, which vLLM has of its own.
        "transformers.tokenization_utils": {"TOKENIZER_CONFIG_FILE": "tokenizer_config.json"},
    }
