"""A large file of blocks that can be told apart, written and compared through
the page cache.

    large.py write|check FILE MIB

Each 4 KiB block begins with its number; what follows is the same in all of
them, so that making the pattern costs next to nothing.
"""

import hashlib
import os
import sys

BLOCK = 4096
MIB = 1 << 20
BLOCKS = MIB // BLOCK


def pieces(mib):
    """The file's contents, a MiB at a time."""
    piece = bytearray(hashlib.shake_128(b"large").digest(BLOCK) * BLOCKS)
    for number in range(mib):
        for block in range(BLOCKS):
            at = block * BLOCK
            piece[at : at + 8] = (number * BLOCKS + block).to_bytes(8, "little")
        yield piece


def write(path, mib):
    with open(path, "wb", buffering=0) as file:
        for piece in pieces(mib):
            if file.write(piece) != MIB:
                sys.exit(f"{path}: a short write")
        os.fsync(file.fileno())


def check(path, mib):
    with open(path, "rb", buffering=0) as file:
        for number, piece in enumerate(pieces(mib)):
            if file.read(MIB) != piece:
                sys.exit(f"{path}: other data came back in MiB {number}")
        if file.read(1):
            sys.exit(f"{path}: longer than it was written")


{"write": write, "check": check}[sys.argv[1]](sys.argv[2], int(sys.argv[3]))
