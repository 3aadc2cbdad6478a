"""Everything that works around a fault outside this package; nothing else here patches anything.

1. `torch.accelerator.empty_cache` and `empty_host_cache`: vLLM's engine core calls them when it shuts down, and torch
   raises on hosts without an accelerator. Seen in vLLM 0.32.0; goes when vLLM guards the calls.
2. MindSpore's first operator call: its wheel is compiled against NumPy 1, so that under NumPy 2 the first call prints
   forty lines and may raise SystemError. Seen in MindSpore 2.10.0; goes with a wheel built for NumPy 2.
3. Importing MindSpore sets OMP_NUM_THREADS=1 unseen by `os.environ`, and later processes inherit it. Seen in
   MindSpore 2.10.0; goes when it leaves the variable alone.
4. `ModelRegistry.models`: vLLM offers and tries its torch models too, which cannot run on this platform; taken out, its
   own refusal lists what can. In vLLM 0.32.0; goes when a platform can say which architectures it has.
5. `XLMRobertaConfig.position_embedding_type`: vLLM reads it, transformers 5 no longer has or writes it, so that
   models saved by it cannot be served (AttributeError). In vLLM 0.32.0; goes when vLLM asks whether it is there.
6. torchvision's wheel on PyPI is made for torch's CUDA build. Beside a CPU build its C++ operators cannot be loaded and
   importing it fails for want of two of them, and so does importing transformers, which looks for it; though its Python
   code, which prepares images and video, needs none. Declared without code, they are not missed. In torchvision 0.28;
   goes with a wheel that can be imported, as that of PyTorch's own index of CPU wheels.
"""

import contextlib
import io
import os
import sys
from collections.abc import Collection, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_declared: list[Any] = []  # what torch forgets when the object is gone


def make_accelerator_calls_harmless() -> None:
    """Let emptying torch's accelerator caches do nothing where there is no accelerator."""
    import torch

    if not torch.accelerator.is_available():
        torch.accelerator.empty_cache = lambda: None
        torch.accelerator.empty_host_cache = lambda: None


def hide_torch_models(ours: Collection[str]) -> None:
    """Leave only the architectures `ours` in vLLM's registry, in this process."""
    from vllm.model_executor.models import ModelRegistry

    for architecture in set(ModelRegistry.get_supported_archs()) - set(ours):
        del ModelRegistry.models[architecture]


def complete_xlm_roberta_config() -> None:
    """Give the config the kind of positions that models have whose config.json names none."""
    from transformers import XLMRobertaConfig

    if not hasattr(XLMRobertaConfig, "position_embedding_type"):
        XLMRobertaConfig.position_embedding_type = "absolute"


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Send what this process (C++ included) writes to standard error nowhere."""
    sys.stderr.flush()
    saved = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


def absorb_numpy_warning() -> None:
    """Make MindSpore's first operator call, with its complaint about NumPy 2 kept off the terminal."""
    import mindspore as ms
    import numpy

    if numpy.lib.NumpyVersion(numpy.__version__) >= "2.0.0":
        with _silent_stderr(), contextlib.suppress(SystemError):
            ms.mint.empty((1,), dtype=ms.float32)


def restore_thread_limit() -> None:
    """Take back MindSpore's OMP_NUM_THREADS=1, so that a process started from here sees what the user set."""
    if "OMP_NUM_THREADS" in os.environ:
        os.putenv("OMP_NUM_THREADS", os.environ["OMP_NUM_THREADS"])
    else:
        os.unsetenv("OMP_NUM_THREADS")


def declare_torchvision_operators() -> None:
    """Entry point `torch.backends`, which torch runs at the end of its import, in every process of the environment.

    Nothing happens without torchvision, or beside a build of it that belongs to this torch.
    """
    import torch

    with contextlib.suppress(OSError, RuntimeError, ValueError):  # of this, `import torch` must not fail
        found = find_spec("torchvision") if torch.version.cuda is None and not _declared else None
        if found is None or found.origin is None or "+cu" not in Path(found.origin).with_name("version.py").read_text():
            return
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)
