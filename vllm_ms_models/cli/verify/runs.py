"""One model's tokens, log-probabilities and hidden states for some prompts: from vLLM's engine here, and from torch."""

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import new_class
from typing import Any

import torch

EMBEDDINGS = "embeddings"


@dataclass(frozen=True)
class Run:
    """Of one prompt. `tokens` were chosen one after another, the most likely ones by `logprobs` `[tokens, vocab]`.

    `stations` are the hidden states `[prompt and tokens but the last, hidden]`, float32, that go into the first layer
    (EMBEDDINGS) and come out of each layer, residual included; empty where the layers were not found.
    """

    tokens: list[int]
    logprobs: torch.Tensor
    stations: dict[str, torch.Tensor]


def layer_name(number: int) -> str:
    return f"layer {number}"


def ours(folder: Path, prompts: Sequence[list[int]], tokens: int, dtype: str) -> list[Run]:
    """By vLLM's engine in this process, one prompt at a time; the hidden states from one pass over all tokens."""
    longest = max(map(len, prompts)) + tokens + 1
    with _engine(folder, dtype, longest) as llm:
        cell = llm.apply_model(lambda model: model.cell)[0]
        layers = _layers_of(cell, llm.llm_engine.model_config.hf_text_config.num_hidden_layers)
        rows: list[torch.Tensor] = []
        stations: dict[str, torch.Tensor] = {}
        factor = getattr(getattr(cell, "model", None), "stream_factor", 1.0)  # of layers/decoder.py
        _observe(cell, "logits", lambda _, result: rows.append(_torch(result)))
        for number, layer in enumerate(layers):
            _observe(layer, "construct", _noting(stations, number))
        found = []
        for prompt in prompts:
            rows.clear()
            chosen = _generate(llm, prompt, tokens)
            logprobs = torch.cat(rows).log_softmax(-1)
            stations.clear()
            _generate(llm, prompt + chosen[:-1], 1)
            found.append(Run(chosen, logprobs, {name: states / factor for name, states in stations.items()}))
        return found


@contextmanager
def _engine(folder: Path, dtype: str, longest: int) -> Iterator[Any]:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the model's cells are asked for
    from vllm import LLM

    llm = LLM(
        str(folder),
        dtype=dtype,
        skip_tokenizer_init=True,
        max_model_len=longest,
        max_num_seqs=1,
        max_num_batched_tokens=max(longest, 2048),
        enable_prefix_caching=False,  # a pass is over all tokens
        use_tqdm_on_load=False,
    )
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        llm.llm_engine.__dict__.clear()
        gc.collect()


def _generate(llm: Any, prompt: list[int], tokens: int) -> list[int]:
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    (output,) = llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
    return list(output.outputs[0].token_ids)


def _layers_of(cell: Any, count: int) -> list[Any]:
    """The decoder's layers: the first list of so many cells."""
    from mindspore import nn

    lists = (part for _, part in cell.cells_and_names() if isinstance(part, nn.CellList) and len(part) == count)
    return list(next(lists, ()))


def _observe(cell: Any, method: str, note: Callable[[tuple[Any, ...], Any], object]) -> None:
    """From now on `note` gets the arguments and the result of each call of a method of this one cell.

    The cell gets a class of its own: Layer's calls are its class's `construct` (layers/layer.py).
    """
    kind = type(cell)
    inner = getattr(kind, method)

    def observed(self: Any, *arguments: Any, **options: Any) -> Any:
        kept = [_torch(value) for value in arguments[:1]]  # kernels may write into it
        result = inner(self, *arguments, **options)
        note((*kept, *arguments[1:]), result)
        return result

    object.__setattr__(
        cell, "__class__", new_class(kind.__name__, (kind,), {}, lambda body: body.update({method: observed}))
    )


def _noting(stations: dict[str, torch.Tensor], number: int) -> Callable[[tuple[Any, ...], Any], None]:
    def note(arguments: tuple[Any, ...], result: Any) -> None:
        if number == 0 and arguments:
            stations[EMBEDDINGS] = arguments[0]
        parts = result if isinstance(result, tuple) else (result,)
        # A layer hands on hidden states and the residual that the next norm adds to them (layers/decoder.py).
        stations[layer_name(number)] = sum(_torch(part) for part in parts if part is not None)

    return note


def _torch(tensor: Any) -> Any:
    """A copy in float32, `[rows, ...]`."""
    from mindspore import Tensor

    from vllm_ms_models.bridge.tensors import download

    return download(tensor).float().clone() if isinstance(tensor, Tensor) else tensor


@torch.inference_mode()
def theirs(folder: Path, prompts: Sequence[list[int]], continuations: Sequence[list[int]], dtype: str) -> list[Run]:
    """By transformers, in one pass over each prompt and its continuation.

    `tokens` are the most likely ones after the prompt and so many tokens of the continuation.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=getattr(torch, dtype),
        attn_implementation="eager",  # torch's own attention has no soft caps, and nothing says that it ignores them
        experts_implementation="eager",  # grouped products take no odd sizes
    ).eval()
    count = model.config.get_text_config().num_hidden_layers
    lists = (part for part in model.modules() if isinstance(part, torch.nn.ModuleList) and len(part) == count)
    stations: dict[str, torch.Tensor] = {}

    def enter(_: Any, arguments: Any, options: Any) -> None:
        stations[EMBEDDINGS] = (arguments[0] if arguments else options["hidden_states"])[0].float().clone()

    def leave(number: int) -> Callable[[Any, Any, Any], None]:
        def note(_: Any, __: Any, result: Any) -> None:
            hidden = result[0] if isinstance(result, tuple) else result
            stations[layer_name(number)] = hidden[0].float().clone()

        return note

    for number, layer in enumerate(next(lists, ())):
        if number == 0:
            layer.register_forward_pre_hook(enter, with_kwargs=True)
        layer.register_forward_hook(leave(number))
    found = []
    for prompt, continuation in zip(prompts, continuations, strict=True):
        stations.clear()
        logits = model(torch.tensor([prompt + continuation[:-1]]), use_cache=False).logits[0, len(prompt) - 1 :].float()
        found.append(Run(logits.argmax(-1).tolist(), logits.log_softmax(-1), dict(stations)))
    return found
