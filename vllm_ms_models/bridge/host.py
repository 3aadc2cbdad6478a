"""What vLLM knows of this host's memory."""

from vllm.utils.cpu_resource_utils import get_memory_node_info

from vllm_ms_models.memory import HostMemory


def host_memory() -> HostMemory:
    """Of the host, or of the container where that is less."""
    info = get_memory_node_info()
    return HostMemory(info.total_memory, info.available_memory)
