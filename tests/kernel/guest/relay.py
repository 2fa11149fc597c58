"""An address of the store that can go away: passes on what comes to ADDRESS.

    relay.py ADDRESS PORT       to the same PORT of the host
"""

import asyncio
import sys

address, port = sys.argv[1:]


async def pump(source, sink):
    while data := await source.read(1 << 16):
        sink.write(data)
        await sink.drain()
    sink.close()


async def serve(reader, writer):
    from_host, to_host = await asyncio.open_connection("10.0.2.2", int(port))
    await asyncio.gather(pump(reader, to_host), pump(from_host, writer), return_exceptions=True)


async def main():
    server = await asyncio.start_server(serve, address, int(port))
    await server.serve_forever()


asyncio.run(main())
