"""The program that a worker of the local engine runs, from its first instruction on.

It is run by its path, so that neither the folder where the user is nor the main program of the driver is imported. What
it needs to find ``clipfast`` comes over the connection.
"""

import ctypes
import os
import signal
import sys
from multiprocessing.connection import Connection

_PR_SET_PDEATHSIG = 1


def main(descriptor: int, parent: int) -> None:
    """Works for a driver until it closes the connection.

    Args:
        descriptor: of the connection.
        parent: process id of the driver.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.set_inheritable(descriptor, False)
    if os.getppid() != parent:  # it ended before the line above
        os._exit(0)
    connection = Connection(descriptor)
    try:
        sys.path[:] = connection.recv()
        begin = connection.recv_bytes()  # it may be large, and the driver waits until it is read
    except (EOFError, OSError):
        os._exit(0)
    from clipfast.dataset.engines.serving import serve

    serve(connection, begin)


if __name__ == "__main__":
    # Ctrl-C in a terminal reaches every process there; what becomes of the workers is the driver's to say. Until here
    # the signal was blocked.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    main(int(sys.argv[1]), int(sys.argv[2]))
