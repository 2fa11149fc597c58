"""A writer that fsyncs every record, and the check of what it was promised.

    fsync_load.py write FILE ACKS GOING   until the file GOING is gone
    fsync_load.py check FILE ACKS

ACKS lies outside the disk under test: a line for each acknowledged record,
with the moment of it.
"""

import hashlib
import os
import sys
import time

RECORD = 4096
# The file is a ring, so that a long run does not fill the disk.
SLOTS = 16384


def record(number):
    head = number.to_bytes(8, "big")
    return (head + hashlib.sha256(head).digest()) * 102 + bytes(RECORD - 102 * 40)


def write(path, acks, going):
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    number = 0
    with open(acks, "w") as log:
        while os.path.exists(going):
            if os.pwrite(file, record(number), number % SLOTS * RECORD) != RECORD:
                sys.exit("a short write")
            os.fsync(file)
            log.write(f"{number} {time.monotonic():.4f}\n")
            log.flush()
            number += 1


def check(path, acks):
    with open(acks) as log:
        lines = [line.split() for line in log]
    count = len(lines)
    with open(path, "rb") as file:
        for number in range(max(0, count - SLOTS + 1), count):
            file.seek(number % SLOTS * RECORD)
            if file.read(RECORD) != record(number):
                sys.exit(f"record {number} of {count} acknowledged ones is lost or torn")
    times = [float(moment) for _, moment in lines]
    gaps = sorted((b - a for a, b in zip(times, times[1:])), reverse=True)
    longest = ", ".join(f"{gap:.2f}" for gap in gaps if gap > 0.5)
    print(f"figure: {count} records acknowledged in {times[-1] - times[0]:.0f} s")
    print(f"figure: longest {gaps[0]:.2f} s between two; those above 0.5 s: {longest or 'none'}")


if sys.argv[1] == "write":
    write(*sys.argv[2:])
else:
    check(*sys.argv[2:])
