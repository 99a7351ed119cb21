"""What a training process owes to its surroundings. Imports nothing heavy: torch is not loaded yet."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time

# glibc's mallopt parameters (malloc.h) and what they are set to.
_MALLOPT = {-4: 0, -1: 2**31 - 1, -2: 256 * 2**20}  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD

# A supervisor that died leaves a lease of 30 s: whoever takes it then must find nobody at work.
_ALONE_AT_MOST_S = 20.0


def tune_process() -> None:
    """Call first thing in a training process.

    malloc: glibc gives every large tensor fresh pages and takes them back when it is freed, so each
    step faults them in again. Keeping them made CPU training 1.6 times as fast (width 128, two
    cores); the process stays as large as it ever was.

    GOMP_SPINCOUNT: OpenMP threads wait for each other by spinning. Endless spinning (the default)
    collapses beside another busy process, to a tenth of the speed; none at all costs a third of
    the speed on a free machine. Set by the caller's environment, it is left alone.
    """
    if sys.platform == "linux":
        os.environ.setdefault("GOMP_SPINCOUNT", "30000")
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):  # musl has none
            for parameter, value in _MALLOPT.items():
                libc.mallopt(parameter, value)


def end_with_supervisor() -> None:
    """End this process, after a checkpoint where there is time for one, when its supervisor is gone.

    Standard input is a pipe that only the supervisor can write to and never does: the system closes
    it however the supervisor ends, whoever stands between the two.
    """

    def wait_for_the_end() -> None:
        while os.read(sys.stdin.fileno(), 1024):
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_ALONE_AT_MOST_S)
        os._exit(1)

    threading.Thread(target=wait_for_the_end, name="supervisor's end", daemon=True).start()
