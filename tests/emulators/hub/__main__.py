"""Serve, in the tests folder: ``python -m emulators.hub --data ../../shared/data`` prints its URL.

Point a client at it with ``HF_ENDPOINT=<url>``.
"""

from __future__ import annotations

import argparse
import socket
import tempfile
from pathlib import Path

import uvicorn
from emulators.hub.app import PAGE, Hub
from emulators.hub.repos import folder_repo, shared_repos


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--data", type=Path, help="the shared test data: serves the project's datasets")
    parser.add_argument(
        "--repo", action="append", default=[], metavar="OWNER/NAME=FOLDER", help="serve a folder as a dataset"
    )
    parser.add_argument("--token", help="refuse requests without this token")
    parser.add_argument("--page", type=int, default=PAGE, help="entries in a page of a listing")
    options = parser.parse_args()
    repos = shared_repos(options.data) if options.data else []
    for entry in options.repo:
        name, _, folder = entry.partition("=")
        repos.append(folder_repo(name, Path(folder)))
    server = socket.socket()
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.bind(("127.0.0.1", options.port))
    server.listen(128)  # from here on clients wait for an answer instead of being refused
    print(f"http://127.0.0.1:{server.getsockname()[1]}", flush=True)
    with tempfile.TemporaryDirectory(prefix="hub-uploads-") as uploads:
        hub = Hub(repos, uploads=Path(uploads), token=options.token, page=options.page)
        uvicorn.Server(uvicorn.Config(hub.app(), log_level="critical")).run(sockets=[server])


if __name__ == "__main__":
    main()
