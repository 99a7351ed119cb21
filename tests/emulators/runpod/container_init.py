"""What stands in for a container's boundary: runs a command and ends all that comes of it.

    python -I container_init.py <status file descriptor> <command> [arguments …]

Every process below it stays below it, also when its parent ends (Linux: child subreaper), so that
nothing outlives the command, and nothing outlives the emulator, which holds the other end of standard
input: when that closes, whatever the reason, the container is killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading

import psutil

PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


def kill_all() -> None:
    """Until nothing is left: what is killed may just have started something."""
    me = psutil.Process()
    while family := [p for p in me.children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE]:
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, timeout=1)


def end_with_emulator() -> None:
    while os.read(0, 4096):
        pass
    with contextlib.suppress(psutil.NoSuchProcess):
        kill_all()
    os._exit(0)


def main() -> int:
    status, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    nothing = os.open(os.devnull, os.O_RDONLY)
    try:
        pid = os.posix_spawnp(
            command[0], command, os.environ, setsid=True, file_actions=[(os.POSIX_SPAWN_DUP2, nothing, 0)]
        )
    except OSError as error:
        os.write(status, f"error {error}\n".encode())
        return 127
    os.write(status, f"pid {pid}\n".encode())
    threading.Thread(target=end_with_emulator, daemon=True).start()
    ended, code = os.wait()
    while ended != pid:
        ended, code = os.wait()
    with contextlib.suppress(psutil.NoSuchProcess):
        kill_all()
    return os.waitstatus_to_exitcode(code) & 0xFF


if __name__ == "__main__":
    os._exit(main())
