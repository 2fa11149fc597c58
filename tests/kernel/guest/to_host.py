"""A line from a socket in the guest to the host, which cannot call in.

    to_host.py SOCKET PORT      joins the UNIX socket with the host's PORT
"""

import asyncio
import sys

path, port = sys.argv[1:]


async def pump(source, sink):
    while data := await source.read(1 << 16):
        sink.write(data)
        await sink.drain()
    sink.close()


async def main():
    from_socket, to_socket = await asyncio.open_unix_connection(path)
    from_host, to_host = await asyncio.open_connection("10.0.2.2", int(port))
    await asyncio.gather(pump(from_socket, to_host), pump(from_host, to_socket), return_exceptions=True)


asyncio.run(main())
