"""The Ascend back end: the kernels on MindSpore's fused operators. **Not run on hardware.**

`VLLM_MS_DEVICE=ascend` chooses it. tests/ascend holds every operator call against MindSpore's own inference of
arguments and dtypes, and results against the reference's, by computing what the operators mean. `selfcheck` is the
first thing to run on a device (docs/ascend.md).

What has no fused operator, or none here yet, raises NotImplementedError with a sentence: float32 models, weights of
integers for activations of floats and zero points of weights, `clamped_swiglu`, mixtures of experts, LoRA. Attention
has all of the interface; soft caps, sinks, a KV cache of int8 and heads that are not multiples of 16 take plain
operators of the device, sequence by sequence (`plain_attention`), and are slow. The 310 series, whose caches are laid
out otherwise, is not supported (`device`).

Where it differs from the interface's definitions, in rounding only:

* products are rounded to the dtype of the activations before a bias or an activation is applied;
* biases and the weights of norms, float32 in the interface, are rounded to that dtype, as the operators ask;
* so is the scale of "static" activations, whose ties go to even after their offset is added, not before;
* a masked score is 10000 lower, not absent, where PagedAttention has a mask;
* a row of a cache of int8 is rounded by the device's own division, so a value that lies between two integers may become
  either.
"""

from vllm_ms_models.kernels.ascend.kernels import AscendKernels

__all__ = ["AscendKernels"]
