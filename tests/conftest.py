"""MindSpore set up once for every test, as the worker does it."""

import mindspore as ms

from vllm_ms_models import compat

ms.set_device("CPU")
ms.runtime.launch_blocking()
compat.absorb_numpy_warning()
