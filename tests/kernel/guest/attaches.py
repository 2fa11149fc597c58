"""Attaches and detaches over the control socket, as one process that waits for
many answers at once: what is measured is the daemon and the kernel, not how
long commands take to start.

    attaches.py one-by-one BLOB TIMES     a disk, attached and detached TIMES times
    attaches.py at-once BLOB...           all of them, then all away

Needs `endpoint` and AZURE_STORAGE_KEY; `connections` may say how many each disk
has to the kernel. Prints JSON, times in milliseconds.
"""

import json
import os
import selectors
import socket
import sys
import time

SOCKET = "/run/dysk/dyskd.sock"
ACCOUNT = "devstoreaccount1"


def attach(blob):
    account = {
        "name": ACCOUNT,
        "endpoint": os.environ["endpoint"],
        "credential": {"key": os.environ["AZURE_STORAGE_KEY"]},
    }
    name = blob.removesuffix(".vhd")
    request = {"name": name, "account": account, "container": "dysks", "blob": blob}
    if "connections" in os.environ:
        request["connections"] = int(os.environ["connections"])
    return "POST", "/v1/attachments?progress=true", json.dumps(request)


def detach(blob):
    return "DELETE", "/v1/attachments/" + blob.removesuffix(".vhd"), ""


class Call:
    """A request under way: its answer, and when it came to which stage."""

    def __init__(self, method, path, body):
        self.begun = time.monotonic()
        self.answer = b""
        self.stages = {}
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(SOCKET)
        head = f"{method} {path} HTTP/1.1\r\nHost: dysk\r\nContent-Length: {len(body)}\r\n\r\n"
        self.socket.sendall((head + body).encode())

    def read(self):
        """What has come; says whether that was all."""
        data = self.socket.recv(1 << 16)
        now = (time.monotonic() - self.begun) * 1e3
        self.answer += data
        for stage in ("opening", "connecting"):
            if f'"{stage}"'.encode() in data:
                self.stages.setdefault(stage, now)
        if not data:
            self.stages["end"] = now
        return not data

    def check(self):
        self.socket.close()
        head, _, body = self.answer.partition(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 20") or b'"failed"' in body:
            sys.exit(self.answer.decode())
        return self.stages


def all_of(requests):
    """How long all of them took, and the stages of each."""
    begun = time.monotonic()
    calls = [Call(*request) for request in requests]
    with selectors.DefaultSelector() as selector:
        for call in calls:
            selector.register(call.socket, selectors.EVENT_READ, call)
        while selector.get_map():
            for key, _ in selector.select():
                if key.data.read():
                    selector.unregister(key.fileobj)
    took = (time.monotonic() - begun) * 1e3
    return {"took": took, "calls": [call.check() for call in calls]}


def one_by_one(blob, times):
    attaches, detaches = [], []
    for _ in range(int(times)):
        attaches += all_of([attach(blob)])["calls"]
        detaches += all_of([detach(blob)])["calls"]
    return {"attaches": attaches, "detaches": detaches}


def at_once(*blobs):
    return {
        "attaches": all_of([attach(blob) for blob in blobs]),
        "detaches": all_of([detach(blob) for blob in blobs]),
    }


work = {"one-by-one": one_by_one, "at-once": at_once}[sys.argv[1]]
print(json.dumps(work(*sys.argv[2:])))
