"""A writer that has each record acknowledged outside before it writes the
next, and the check of what it was promised.

    records.py write DIR NAME PORT FIRST    until it is killed
    records.py check DIR LAST               all up to LAST were acknowledged

Records go four ways, in turn: twice into a ring that is written in place, once
to the end of a log that grows, once into a new file that is renamed over an
old one. Each is fsynced, then told to PORT of the host as a line with its
number, and the host's answer waited for.
"""

import hashlib
import os
import sys

from promises import Promises

RECORD = 4096
WAYS = 4
RING, LOG, FILES = 1024, 4096, 64


def record(number):
    head = number.to_bytes(8, "big")
    return (head + hashlib.sha256(head).digest()) * 102 + bytes(RECORD - 102 * 40)


def place(number):
    """The file and the offset of a record; later ones may have the same."""
    turn, way = divmod(number, WAYS)
    if way < 2:
        return "ring", number % RING * RECORD
    if way == 2:
        return "log", turn % LOG * RECORD
    return f"file{turn % FILES}", 0


def put(path, offset, data):
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    if os.pwrite(file, data, offset) != len(data):
        sys.exit("a short write")
    os.fsync(file)
    os.close(file)


def write(folder, name, port, first):
    promises = Promises(name, port)
    directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    number = int(first)
    while True:
        file, offset = place(number)
        if file.startswith("file"):
            put(f"{folder}/new", 0, record(number))
            os.rename(f"{folder}/new", f"{folder}/{file}")
        else:
            put(f"{folder}/{file}", offset, record(number))
        if number < WAYS or file.startswith("file"):
            os.fsync(directory)
        promises.tell(number)
        number += 1


def check(folder, last):
    last = int(last)
    latest = {place(number): number for number in range(max(0, last + 1 - WAYS * LOG), last + 1)}
    # This one may have been under way.
    latest.pop(place(last + 1), None)
    lost = []
    for (file, offset), number in latest.items():
        try:
            with open(f"{folder}/{file}", "rb") as source:
                source.seek(offset)
                if source.read(RECORD) != record(number):
                    lost.append(number)
        except FileNotFoundError:
            lost.append(number)
    if lost:
        sys.exit(f"{len(lost)} of {last + 1} acknowledged records are lost or torn, the first is {min(lost)}")
    print(f"{len(latest)} of {last + 1} acknowledged records compared")


if sys.argv[1] == "write":
    write(*sys.argv[2:])
else:
    check(*sys.argv[2:])
