"""Writes to each device which one it is, or looks whether it says so.

    labels.py write|check DEVICE...
"""

import mmap
import os
import sys

SECTOR = 512


def main():
    task, *devices = sys.argv[1:]
    buffer = memoryview(mmap.mmap(-1, mmap.PAGESIZE))[:SECTOR]
    for number, device in enumerate(devices):
        label = f"device {number} of {len(devices)}".encode().ljust(SECTOR)
        file = os.open(device, os.O_RDWR | os.O_DIRECT)
        if task == "write":
            buffer[:] = label
            if os.pwritev(file, [buffer], 0) != SECTOR:
                sys.exit(f"{device}: a short write")
            os.fsync(file)
        elif os.preadv(file, [buffer], 0) != SECTOR or buffer != label:
            sys.exit(f"{device}: not what was written to it")
        os.close(file)


main()
