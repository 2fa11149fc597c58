"""Writers on a raw device, and the check of what was acknowledged to them.

    raw_load.py write DEVICE OFFSET LENGTH WRITERS SEED ACKS GOING
    raw_load.py check DEVICE OFFSET LENGTH WRITERS SEED ACKS

Each writer has a part of the range to itself and writes pieces of any length
there, one over the other, in short spells with pauses between them: whenever a
daemon dies, some are waiting for it and others begin. Now and then one reads
back. Nothing is ever flushed. ACKS lies outside the disk under test: a line
for each acknowledged write. The writers stop when the file GOING is gone.
"""

import hashlib
import mmap
import os
import random
import sys
import threading
import time

SECTOR = 512
LONGEST = 128 * SECTOR


def content(seed, writer, number, length):
    return hashlib.shake_128(f"{seed} {writer} {number}".encode()).digest(length)


def give_up(text):
    # A thread's SystemExit would end the thread alone.
    print(text, flush=True)
    os._exit(1)


def differ(found, expected):
    return next(at for at in range(0, len(found), SECTOR) if found[at : at + SECTOR] != expected[at : at + SECTOR])


def write_for_a_while(file, start, length, writer, seed, log, going):
    dice = random.Random(f"{seed} {writer}")
    model = bytearray(length)
    buffer = memoryview(mmap.mmap(-1, LONGEST))
    number = 0
    while os.path.exists(going):
        for _ in range(dice.randint(1, 20)):
            size = dice.randint(1, LONGEST // SECTOR) * SECTOR
            at = dice.randrange((length - size) // SECTOR + 1) * SECTOR
            if dice.random() < 0.2:
                if os.preadv(file, [buffer[:size]], start + at) != size:
                    give_up(f"writer {writer}: a short read")
                if buffer[:size] != model[at : at + size]:
                    bad = at + differ(buffer[:size], model[at : at + size])
                    give_up(f"writer {writer}: acknowledged data at {start + bad} is lost or torn")
                continue
            data = content(seed, writer, number, size)
            buffer[:size] = data
            if os.pwritev(file, [buffer[:size]], start + at) != size:
                give_up(f"writer {writer}: a short write")
            log.write(f"{writer} {number} {at} {size}\n")
            log.flush()
            model[at : at + size] = data
            number += 1
        time.sleep(dice.uniform(0, 3))


def guarded(*args):
    try:
        write_for_a_while(*args)
    except OSError as error:
        give_up(f"a writer was told: {error}")


def write(file, start, length, writers, seed, acks, going):
    part = length // writers // SECTOR * SECTOR
    with open(acks, "w") as log:
        threads = [
            threading.Thread(target=guarded, args=(file, start + n * part, part, n, seed, log, going))
            for n in range(writers)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def check(file, start, length, writers, seed, acks):
    part = length // writers // SECTOR * SECTOR
    expected = bytearray(part * writers)
    count = 0
    with open(acks) as log:
        for line in log:
            writer, number, at, size = map(int, line.split())
            at += writer * part
            expected[at : at + size] = content(seed, writer, number, size)
            count += 1
    buffer = memoryview(mmap.mmap(-1, 1 << 20))
    for at in range(0, len(expected), len(buffer)):
        size = min(len(buffer), len(expected) - at)
        if os.preadv(file, [buffer[:size]], start + at) != size:
            sys.exit("a short read")
        if buffer[:size] != expected[at : at + size]:
            bad = start + at + differ(buffer[:size], expected[at : at + size])
            sys.exit(f"of {count} acknowledged writes one at {bad} is lost or torn")
    print(f"figure: {count} writes acknowledged without a flush, all there")


def main():
    task, device, start, length, writers, seed, *rest = sys.argv[1:]
    file = os.open(device, os.O_RDWR | os.O_DIRECT)
    {"write": write, "check": check}[task](file, int(start), int(length), int(writers), seed, *rest)


main()
