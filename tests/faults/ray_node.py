"""One node of a Ray cluster on this machine, as a process: what `ray start` does, on loopback and nothing else.

    python tests/faults/ray_node.py FOLDER [--join HOST:PORT]

prints the cluster's address once the node is up, and stays until it is told to end, or until its raylet has died. `ray
start` itself takes the machine's outer address even where it is told 127.0.0.1 (docs/adr/0005-local-ray.md).
"""

import argparse
import os
import signal
import sys
import time

os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # read at import, and by every process of the node

from ray._private.node import Node
from ray._private.parameter import RayParams

OBJECT_STORE_BYTES, MEMORY_BYTES = 80 * 2**20, 4 * 2**30
POLL_S = 0.2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="for the node's logs and sockets; a short path")
    parser.add_argument("--join", help="address of the cluster; else this is the head of a new one")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    parameters = RayParams(
        node_ip_address="127.0.0.1",
        gcs_address=options.join,
        num_cpus=1,
        num_gpus=0,
        memory=MEMORY_BYTES,
        object_store_memory=OBJECT_STORE_BYTES,
        temp_dir=options.folder,
        include_dashboard=False,
        include_log_monitor=False,
        dashboard_agent_listen_port=0,
        min_worker_port=0,
        max_worker_port=0,
    )
    node = Node(parameters, head=options.join is None, shutdown_at_exit=True, spawn_reaper=True)
    print(node.gcs_address, flush=True)
    try:
        while not node.dead_processes():
            time.sleep(POLL_S)
    finally:
        node.kill_all_processes(check_alive=False, allow_graceful=False)
    return 1


if __name__ == "__main__":
    sys.exit(main())
