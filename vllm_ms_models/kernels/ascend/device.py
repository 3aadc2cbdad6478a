"""Which Ascend devices these kernels are made for: the 910B series. **Not run on hardware.**"""


def check_device(name: str) -> None:
    """NotImplementedError for a device, as `mindspore.hal.get_device_name` calls it, of the 310 series.

    Its operators of attention want caches in the NZ format, in tensors of three axes.
    """
    if name.removeprefix("Ascend").startswith("310"):
        raise NotImplementedError(
            f"The Ascend kernels do not have the cache layout (NZ) that {name} needs; serve on a 910B, or with "
            "VLLM_MS_DEVICE=cpu."
        )
