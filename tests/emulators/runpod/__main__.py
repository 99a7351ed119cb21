"""Serve an emulated RunPod with an S3 server beside it, until interrupted: ``make emulator``.

Standard output has the lines to copy into another shell; there, `NANOCHAT_LAUNCHER=runpod make quickstart`
trains on "pods" that are processes of this machine, for dollars that nobody pays. The store's credentials
are kept as secrets already, and the images of training and of serverless workers are in the emulator's
registry; both run this checkout's own code (workers need `make serverless-sdk`). Where the machine has no
GPU, a program that says it has some stands in for nvidia-smi, and the processor trains. Standard error tells
the images' names, and the control port's address, where things can go wrong on request while it serves. With
CONTROL as that address:

    curl $CONTROL/faults -d '{"kind": "no_capacity", "gpu": "H100", "times": null}'
    curl $CONTROL/faults -d '{"kind": "dies", "pod": "<pod id>", "state": "ERROR"}'
    curl $CONTROL/s3/faults -d '{"kind": "status", "match": "PUT", "status": 503, "times": 3}'
    curl -X DELETE $CONTROL/faults
    curl -X PATCH $CONTROL/settings -d '{"mode": "phased", "clock_speed": 3600}'
    curl $CONTROL/pods

`faults.Fault` lists the kinds, `control.Control` the rest.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import tempfile
import threading
from pathlib import Path
from urllib.parse import urlsplit

from emulators.runpod.checkout_images import serverless_image, training_image
from emulators.runpod.emulator import serve
from emulators.runpod.settings import SPEC_ENV, Settings, find_spec
from standins import s3, s3_faults

TRAINING, SERVERLESS = "nanochat-training", "nanochat-serverless"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", type=int, default=0, help="of the API; 0 takes a free one")
    parser.add_argument("--state", type=Path, help="a new folder for pods and buckets, kept afterwards")
    parser.add_argument("--mode", choices=["instant", "phased"], default="instant", help="see Settings")
    parser.add_argument("--clock-speed", type=float, default=1.0, help="seconds billed for a second")
    options = parser.parse_args()
    if s3.program() is None:
        print(
            "The S3 server is missing. Install it with Go: GOBIN=$PWD/.tools/bin "
            "go install github.com/versity/versitygw/cmd/versitygw@v1.8.0",
            file=sys.stderr,
        )
        return 1
    if find_spec() is None:
        print(
            f"Requests are not validated: there is no OpenAPI file of RunPod ({SPEC_ENV} says where)",
            file=sys.stderr,
        )
    asked_to_end = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: asked_to_end.set())
    with contextlib.ExitStack() as stack:
        state = options.state or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="runpod-")))
        server = stack.enter_context(s3.serve(state / "buckets"))
        proxy = stack.enter_context(s3_faults.proxy(server.endpoint))
        emulator = stack.enter_context(
            serve(
                state_dir=state / "runpod",
                images={f"*/{SERVERLESS}*": serverless_image(), "*": training_image(state / "bin")},
                settings=Settings(mode=options.mode, clock_speed=options.clock_speed),
                network=proxy,
                port=options.port,
            )
        )
        print(
            f"Control: {emulator.control_url}   images: {emulator.registry_url}", file=sys.stderr, flush=True
        )
        emulator.set_secret("AWS_ACCESS_KEY_ID", s3.ACCESS_KEY)
        emulator.set_secret("AWS_SECRET_ACCESS_KEY", s3.SECRET_KEY)
        for name, variable in (
            (TRAINING, "NANOCHAT_TRAINING_IMAGE"),
            (SERVERLESS, "NANOCHAT_SERVERLESS_IMAGE"),
        ):
            emulator.registry.publish(name, "latest")
            image = f"{urlsplit(emulator.registry_url).netloc}/{name}:latest"
            print(f"export {variable}={image}", file=sys.stderr, flush=True)
        exports = {
            "RUNPOD_API_URL": emulator.url,
            "RUNPOD_API_KEY": emulator.api_key,
            "NANOCHAT_STORE": f"s3://{s3.BUCKET}",
            "AWS_ENDPOINT_URL": proxy.url,
            "AWS_ACCESS_KEY_ID": s3.ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": s3.SECRET_KEY,
        }
        for name, value in exports.items():
            print(f"export {name}={value}", flush=True)
        asked_to_end.wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
