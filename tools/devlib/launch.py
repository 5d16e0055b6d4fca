"""`python launch.py main.py ...`: run a program that ends when the process that started it is gone.

The starter holds the other end of this process's standard input; when it ends, however it ends, the system closes
that, on every system. The program itself is run as if it had been named to Python.
"""

import _thread
import os
import runpy
import signal
import sys
import threading
import time

PATIENCE_S = 5.0


def watch(stream: int) -> None:
    """Wait for the end of the stream, then stop as Ctrl-C would, and for certain after a while."""
    while os.read(stream, 1024):
        pass
    print("The process that started this server is gone; stopping.", flush=True)
    if hasattr(signal, "pthread_kill"):  # which wakes it, too
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
    else:
        _thread.interrupt_main()
    time.sleep(PATIENCE_S)
    os._exit(1)


if __name__ == "__main__":
    stream = os.dup(0)  # the program gets an empty input, and its children cannot hold ours
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    threading.Thread(target=watch, args=(stream,), name="starter", daemon=True).start()
    del sys.argv[0]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")
