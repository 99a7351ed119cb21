"""What a container finds in its environment."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from emulators.runpod.pods import Pod, public_port
from emulators.runpod.settings import REPOSITORY

_SECRET = re.compile(r"\{\{\s*RUNPOD_SECRET_([A-Za-z_][A-Za-z0-9_.\-/]*)\s*\}\}")


def base_environment(home: Path) -> dict[str, str]:
    """What any image of ours has: a path to programs and to this checkout's packages."""
    temporary = home / "tmp"
    temporary.mkdir(exist_ok=True)
    packages = [str(REPOSITORY / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "HOME": str(home),
        "LANG": "C.UTF-8",
        "PYTHONPATH": os.pathsep.join(packages),
        "PYTHONUNBUFFERED": "1",
        "TMPDIR": str(temporary),
    }


def with_secrets(env: Mapping[str, str], secrets: Mapping[str, str]) -> dict[str, str]:
    """Placeholders replaced. One whose secret does not exist stays as it is."""
    return {
        name: _SECRET.sub(lambda found: secrets.get(found[1], found[0]), value) for name, value in env.items()
    }


def platform_environment(pod: Pod) -> dict[str, str]:
    """What the platform puts over everything else, the pod's own key among it."""
    request, placement = pod.request, pod.placement
    environment = {
        "RUNPOD_POD_ID": pod.id,
        "RUNPOD_API_KEY": pod.api_key,
        "RUNPOD_POD_HOSTNAME": f"{pod.id}-64411eb2",
        "RUNPOD_GPU_COUNT": str(placement.count),
        "RUNPOD_CPU_COUNT": str(os.cpu_count() or 1),
        "RUNPOD_DC_ID": placement.data_center,
        "RUNPOD_PUBLIC_IP": "127.0.0.1",
    }
    if placement.cuda_version:
        environment["CUDA_VERSION"] = placement.cuda_version
    for port in request.get("ports", []):
        number, _, kind = port.partition("/")
        if kind == "tcp":
            environment[f"RUNPOD_TCP_PORT_{number}"] = str(public_port(int(number)))
    for mount in request.get("mounts", {}).get("network", []):
        environment["RUNPOD_VOLUME_ID"] = mount["volumeId"]
    if request.get("startSsh"):
        environment["PUBLIC_KEY"] = "ssh-ed25519 AAAA emulator"
    if pod.membership is not None:
        environment |= pod.membership.environment
    return environment


def command_line(entrypoint: Sequence[str], command: Sequence[str], args: str) -> list[str]:
    """`args` replaces an image's command, or, as a JSON object, its entry point too."""
    if args.lstrip().startswith("{"):
        wanted = json.loads(args)
        return [*wanted.get("entrypoint", entrypoint), *wanted.get("cmd", command)]
    return [*entrypoint, *(shlex.split(args) or command)]
