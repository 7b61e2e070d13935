"""Run one host that echoes, as a process of its own: SEED(hex) PORT [SECONDS of life are the caller's]."""

import sys

import msgspec
import trio

from p2pgrid.hole_punch.host import open_host

ECHO = "/p2pgrid/echo/1"


class Say(msgspec.Struct, tag="say"):
    text: str


async def echo(channel):
    while True:
        await channel.send(await channel.receive(Say))


async def main(seed, port):
    async with open_host(bytes.fromhex(seed), (f"/ip4/127.0.0.1/tcp/{port}",)) as host:
        host.serve(ECHO, echo)
        print(host.addresses[0], flush=True)
        await trio.sleep_forever()


if __name__ == "__main__":
    trio.run(main, *sys.argv[1:])
