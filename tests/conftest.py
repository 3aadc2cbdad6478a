"""MindSpore set up once for every test, as the worker does it."""

import os

import mindspore as ms
from hypothesis import settings

from vllm_ms_models import compat

# vLLM would look at the CPU for its statistics, seconds of it in each engine, and send them where nobody answers.
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

ms.set_device("CPU")
ms.runtime.launch_blocking()
compat.absorb_numpy_warning()

# In CI the same examples every time; elsewhere new ones in each run.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")
