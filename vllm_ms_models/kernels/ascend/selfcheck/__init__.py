"""Each operator of `operators` once, on tiny inputs, against what it means in NumPy. **Not run on hardware.**

    python -m vllm_ms_models.kernels.ascend.selfcheck

It is the first thing to run on an Ascend device (docs/ascend.md). On a CPU, which has few of the operators, the others
are reported as "not on this device", which is no fault.
"""
