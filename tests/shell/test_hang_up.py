"""Does a daemon survive whoever hangs up in the middle of long work?"""

import threading

import trio

from p2pgrid.node import api
from p2pgrid.node.disks import Ticker

PATIENCE = 10


async def test_work_in_a_thread_ends_with_the_request_and_the_daemon_goes_on(tmp_path):
    begun, ended = trio.Event(), threading.Event()
    token = trio.lowlevel.current_trio_token()

    async def cut(args, tell):
        ticker = Ticker(tell, "cutting")

        def work():
            token.run_sync_soon(begun.set)
            try:
                while True:
                    ticker(1, 2)
                    ticker._gone.wait(0.01)
            finally:
                ended.set()

        return await ticker.run(work)

    async def status(args, tell):
        return "well"

    with trio.fail_after(PATIENCE):
        async with api.serve_api(tmp_path, {"cut": cut, "status": status}):
            with api.connected(tmp_path) as line:
                line.sendall(b'{"op": "cut", "args": {}}\n')
                await begun.wait()
            assert await trio.to_thread.run_sync(ended.wait, PATIENCE)
            assert await trio.to_thread.run_sync(api.call, tmp_path, "status") == "well"
