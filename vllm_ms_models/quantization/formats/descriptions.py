"""What the description files of ModelSlim and Golden Stick share: one word for each tensor, by its full name."""

from collections.abc import Mapping
from typing import Any

from vllm_ms_models.checkpoint.errors import CheckpointError, enumerate_names, quote
from vllm_ms_models.quantization.formats.common import Format
from vllm_ms_models.quantization.specs import FloatWeight, Spec

FLOAT = "FLOAT"
RANK = "rank_0"


class Description(Format):
    """`words` has the spec of each scheme that is supported; subclasses read the settings (names without a dot)."""

    file: str

    def __init__(self, content: Any, words: Mapping[str, Spec]) -> None:
        if not isinstance(content, Mapping):
            raise CheckpointError(
                f"{self.file} is {quote(content)}, where a dictionary from tensors to schemes is expected."
            )
        if RANK in content:
            raise CheckpointError(
                f"{self.file} describes weights that are cut for each rank and compressed (W8A8SC), which only the "
                "device they were made for can multiply; serve the checkpoint that they were made from."
            )
        self.words = {FLOAT: FloatWeight(), **words}
        self.settings = {name: value for name, value in content.items() if "." not in name}
        self.tensors = {name: value for name, value in content.items() if "." in name}
        self._check_words()

    def spec(self, module: str) -> Spec:
        word = self.tensors.get(f"{module}.weight")
        if word is None:
            raise CheckpointError(f"{self.file} has no scheme for {module}.weight; it must name every weight.")
        return self.words[word]

    def known_settings(self, *names: str) -> None:
        """Error for a setting that is not among `names`."""
        unknown = [name for name in self.settings if name not in names]
        if unknown:
            raise CheckpointError(
                f"{self.file} has settings that are not known here: {enumerate_names(unknown)}; the model cannot be "
                "served without knowing what they change."
            )

    def unset(self, *names: str) -> None:
        """Error for a setting that says anything but that it is not used."""
        for name in names:
            value = self.settings.get(name)
            if value and value not in (FLOAT, "NONE", "None", "none"):
                raise CheckpointError(
                    f"{self.file} has {name} {quote(value)}, which cannot be served here; quantize the model without."
                )

    def _check_words(self) -> None:
        """Every scheme is known, and that of a quantized weight is also that of what belongs to it."""
        for name, word in self.tensors.items():
            if not isinstance(word, str) or word not in self.words:
                raise CheckpointError(
                    f"{self.file} has the scheme {quote(word)} for {quote(name)}, which is not supported; supported "
                    f"are {', '.join(self.words)}."
                )
            module, _, end = name.rpartition(".")
            weight = self.tensors.get(f"{module}.weight", word)
            if end != "bias" and word != weight:
                raise CheckpointError(
                    f"{self.file} has {word} for {quote(name)} but {weight} for {quote(f'{module}.weight')}; they "
                    "must agree: correct the file or quantize the model again."
                )
