"""Two Ray nodes of one CPU each on the loopback address, until standard input ends.

`python -m tests.distributed.ray_nodes` prints the address of the cluster. A program of its own, because Ray leaves
threads in the process that uses it.
"""

import sys
from typing import Any

# Of the loopback network; Ray would take 127.0.0.1 for the host's address on another.
ADDRESSES = ("127.0.0.2", "127.0.0.3")


def cluster() -> Any:
    """The caller shuts it down."""
    from ray.cluster_utils import Cluster

    nodes = Cluster()
    for address in ADDRESSES:
        nodes.add_node(num_cpus=1, node_ip_address=address, include_dashboard=False)
    return nodes


def main() -> None:
    nodes = cluster()
    try:
        print(nodes.address, flush=True)
        sys.stdin.read()
    finally:
        nodes.shutdown()


if __name__ == "__main__":
    main()
