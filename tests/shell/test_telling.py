"""Is whoever waits told what it waits for, within ten seconds?"""

from __future__ import annotations

from typing import Any

import pytest
import trio
from trio.testing import MockClock

from p2pgrid.ids import PeerId
from p2pgrid.node.disks import Ticker
from p2pgrid.transfer.progress import Progress


@pytest.fixture
def autojump_clock() -> MockClock:
    return MockClock(autojump_threshold=0)


class Fetch:
    """A fetch of 1000 bytes at 10 a second that pauses; reports as a real one does."""

    def __init__(self, ticker: Ticker) -> None:
        self._ticker = ticker
        self.done, self._last = 200, trio.current_time()  # 200 were here before

    async def work(self, seconds: float, rate: int, **facts: Any) -> None:
        for _ in range(int(seconds * 4)):
            await trio.sleep(0.25)
            if rate:
                self.done, self._last = self.done + rate // 4, trio.current_time()
            self._ticker.fetched(self._progress(**facts))

    def _progress(self, **facts: Any) -> Progress:
        return Progress(**{
            "bytes_done": self.done, "bytes_total": 1000, "bytes_by_peer": {PeerId("a"): self.done - 200},
            "local": 0, "resumed": 200, "rate": 0.0, "peers": 1, "missing": 4, "unavailable": 0, "chunks": 9,
            "stalled_for": trio.current_time() - self._last, **facts,
        })  # fmt: skip


async def test_a_stall_is_named_within_ten_seconds_and_forgotten_when_it_is_over(
    autojump_clock: MockClock,
) -> None:
    told: list[tuple[float, dict[str, Any]]] = []

    async def tell(event: dict[str, Any]) -> None:
        told.append((trio.current_time() - began, event))

    began = trio.current_time()
    ticker = Ticker(tell, "fetching")
    async with ticker.telling():
        fetch = Fetch(ticker)
        await fetch.work(20, 12)
        flowing = told[-1][1]
        await fetch.work(30, 0, unavailable=2, lost=((3, 4),))
        stalled = told[-1][1]
        await fetch.work(20, 12)
    assert flowing["rate"] == pytest.approx(12, abs=1), "what was here before is no speed"
    assert flowing["left"] == pytest.approx((800 - 240) / 12, rel=0.1)
    assert not flowing["stall"]
    named = next(at for at, event in told if event.get("stall"))
    assert 20 < named <= 30
    assert stalled["stall"] == "no peer has chunks 3-4 (2 of 9)"
    assert stalled["left"] is None
    assert stalled["sources"]["resumed"] == 200
    over = next(at for at, event in told if at > named and not event["stall"])
    assert over <= 51
    end = told[-1][1]
    assert (end["done"], end["total"], end["stall"]) == (1000, 1000, "")


async def test_that_nobody_was_found_is_said_before_anything_is_known(autojump_clock: MockClock) -> None:
    told: list[dict[str, Any]] = []

    async def tell(event: dict[str, Any]) -> None:
        told.append(event)

    ticker = Ticker(tell, "fetching")
    with trio.move_on_after(10):
        async with ticker.telling():
            await Fetch(ticker).work(60, 0, bytes_done=0, bytes_total=0, peers=0, chunks=0, looked=3)
    assert told[-1]["stall"].startswith("nobody found yet: looked in the index")
    assert told[-1]["total"] == 0
