"""What a network of mindformers offers vLLM's side, wherever it runs."""

from collections.abc import Iterator
from typing import Any

import mindspore as ms
from mindspore import Tensor, nn

from vllm_ms_models.checkpoint.slots import Slot
from vllm_ms_models.layers.prediction import prediction_tensors
from vllm_ms_models.suites.mindformers import weights


class ServedNetwork(nn.Cell):
    """All but `construct` of what `bridge/model.py` wants of a Cell."""

    def __init__(self, network: Any, hf_config: Any) -> None:
        super().__init__(auto_prefix=False)
        self.network = network
        self.ignored = prediction_tensors(hf_config)
        network.model.return_hidden_states = True  # vLLM chooses the tokens whose logits it wants

    def embed(self, input_ids: Tensor | None) -> Tensor:
        """Input embeddings `[tokens, hidden]`."""
        return self.network.model.embedding(input_ids)

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits `[rows, vocab]` of hidden states `[rows, hidden]`."""
        return self.network.model.output_layer(hidden).astype(ms.float32)

    def slots(self) -> Iterator[Slot]:
        """Of mindformers' own parameters; parts of ours, where there are any, have theirs."""
        return weights.slots(self.network)

    def finish_loading(self) -> None:
        """What mindformers does once weights are loaded: latent attention splits the matrix that it absorbs."""
        self.network.process_weights_after_loading(self.network.model)
