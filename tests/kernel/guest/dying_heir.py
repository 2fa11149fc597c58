"""A new daemon that dies on the way: connects to the handover socket and
leaves after its own Hello, or after the old one's End."""

import json
import socket
import sys

path, until = sys.argv[1:]
peer = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
peer.connect(path)
peer.send(json.dumps({"hello": {"format": 1}}).encode())
got = 0
while until == "end":
    message, fds, _, _ = socket.recv_fds(peer, 4096, 64)
    if not message:
        sys.exit("the old one hung up")
    if json.loads(message) == "end":
        break
    got += len(fds)
# Two volumes: a connection each and a file of what was read from it.
if until == "end" and got != 4:
    sys.exit(f"{got} descriptors instead of 4")
