"""The Ascend kernels as parts of a compiled graph (`mindspore.jit`). **Not run on hardware.**

MindSpore compiles the Python of layers and kernels as it stands, for tensors of any size. What is here avoids what it
cannot: nothing is remembered from one call to the next, nothing asks for a tensor's values, no size is compared with 0
(a graph is never run for an empty batch), nothing is a view that MindSpore takes for a place to be written to, and the
batch is of dictionaries and tuples: of other containers it loses the types of what is in them.
"""

from vllm_ms_models.kernels.ascend.graph.kernels import AscendGraphKernels

__all__ = ["AscendGraphKernels"]
