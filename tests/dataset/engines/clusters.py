"""Ray clusters for tests: started with ``ray start``, and only their own processes are stopped."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import passing
import pytest

_STORE = 100 << 20  # bytes


def import_ray() -> Any:
    """Ray, without what it prints on stdout."""
    if find_spec("ray") is None:
        pytest.skip("Ray is not installed")
    from clipfast.dataset.engines.ray import _imported

    return _imported()


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
    return port


class Node:
    """One ``ray start``: it and everything that it starts are one session of processes."""

    def __init__(self, *arguments: str, cpus: int) -> None:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *arguments]
        command += [f"--num-cpus={cpus}", f"--object-store-memory={_STORE}", "--disable-usage-stats"]
        command += [f"--dashboard-agent-listen-port={free_port()}", "--include-log-monitor=false"]
        environment = {
            **os.environ,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "disabled",
            "OMP_NUM_THREADS": "1",
        }
        self._output = TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=self._output,
            start_new_session=True,
            env=environment,
        )

    def runs(self) -> bool:
        """Whether it runs; fails with what it wrote if not."""
        if self._process.poll() is not None:
            self._output.seek(0)
            pytest.fail(self._output.read().decode())
        return True

    def processes(self) -> list[int]:
        """All processes of the node that have not ended."""
        return [pid for pid in _pids() if _session(pid) == self._process.pid and passing.alive(pid)]

    def kill(self) -> None:
        """Kills everything, as when the machine loses its power."""
        while processes := self.processes():
            for pid in processes:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._process.poll()
        self._process.wait()
        self._output.close()


def _pids() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


@contextmanager
def cluster(*cpus: int) -> Iterator[tuple[str, list[Node]]]:
    """A cluster with a node per number of CPUs, the first one its head; yields its address and the nodes."""
    ray = import_ray()
    port = free_port()
    address = f"127.0.0.1:{port}"
    with ExitStack() as stack:
        nodes: list[Node] = []

        def start(*arguments: str, count: int) -> None:
            nodes.append(Node(*arguments, cpus=count))
            stack.callback(nodes[-1].kill)

        start(
            "--head",
            f"--port={port}",
            "--include-dashboard=false",
            f"--ray-client-server-port={free_port()}",
            count=cpus[0],
        )
        passing.wait_for(lambda: nodes[0].runs() and _answers(port))
        for count in cpus[1:]:
            start(f"--address={address}", count=count)
            nodes[-1].runs()
        ray.init(address=address, log_to_driver=False, logging_level="CRITICAL")
        try:
            passing.wait_for(lambda: sum(node["Alive"] for node in ray.nodes()) == len(cpus))
        finally:
            ray.shutdown()
        yield address, nodes


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except OSError:
        return False
    return True
