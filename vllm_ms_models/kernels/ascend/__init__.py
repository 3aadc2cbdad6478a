"""The Ascend back end: the kernels on MindSpore's fused operators. **Not run on hardware.**

`VLLM_MS_DEVICE=ascend` chooses it; most models are compiled to graphs of it (`graph`). tests/ascend holds every
operator call against MindSpore's own inference of arguments and dtypes, and results against the reference's, by
computing what the operators mean. `selfcheck` is the first thing to run on a device (docs/ascend.md).

What has no fused operator, or none here yet, raises NotImplementedError with a sentence: float32 models, zero points of
weights for int8 activations, weights in groups that are no multiples of 32.

Some is done by plain operators or on the host, which is right but not quick: routings that neither MoeGatingTopKSoftmax
nor FusedAddTopKDiv has (`routing`), experts in formats that GroupedMatmulV4 does not take (`experts`), low-rank
adapters (`low_rank`); soft caps, sinks, a KV cache of int8 and heads that are not multiples of 16 take plain operators
of the device, sequence by sequence (`plain_attention`); so do rotations of features that are no multiple of 32
(`dense`). The 310 series, whose caches are laid out otherwise, is not supported (`device`).

Where it differs from the interface's definitions, in rounding only:

* products are rounded to the dtype of the activations before a bias or an activation is applied, and those of experts
  before they are summed;
* biases and the weights of norms, float32 in the interface, are rounded to that dtype, as the operators ask (but not
  the biases of experts in bfloat16);
* so are the scales of weights for activations of floats, and of int8 experts in bfloat16;
* so is the scale of "static" activations, whose ties go to even after their offset is added, not before (but of
  experts, which round as the interface says);
* a masked score is 10000 lower, not absent, where PagedAttention has a mask;
* a row of a cache of int8 is rounded by the device's own division, so a value that lies between two integers may become
  either.
"""

from vllm_ms_models.kernels.ascend.kernels import AscendKernels

__all__ = ["AscendKernels"]
