"""Do the frames on the protocol's page mean what the page says, and does noise only give BadFrame?"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pgrid import wire
from p2pgrid.errors import BadFrame, Conflict, GridError, NotFound, TimedOut
from p2pgrid.ids import Cid
from p2pgrid.scheduler import messages as m
from p2pgrid.scheduler.job import ARRAY_MAX, Gone, JobSpec, Outcome, ResultTree
from p2pgrid.scheduler.views import RUNNING_SHOWN

PAGE = Path(__file__).parents[2] / "docs" / "protocols" / "coordinator.md"
CID = str(Cid(0x71, bytes(32)))
VECTORS = re.findall(r"^\| `(\w+\(.*\))` \| `([0-9a-f]+)` \|$", PAGE.read_text(), re.M)
NAMES = {**vars(m), "CID": CID}
ANY = m.Request | m.Reply


def test_the_page_has_vectors():
    assert len(VECTORS) == 15


@pytest.mark.parametrize(("spelled", "frame"), VECTORS, ids=[s.split("(")[0] for s, _ in VECTORS])
def test_vectors(spelled, frame):
    message = eval(spelled, {"__builtins__": {}}, NAMES)
    assert wire.encode(message).hex() == frame
    body = bytes.fromhex(frame)[wire.HEADER :]
    assert wire.decode(body, ANY) == message


def test_every_request_and_reply_has_its_own_type():
    kinds = [*m.Request.__args__, *m.Reply.__args__]
    assert len({kind.__struct_config__.tag for kind in kinds}) == len(kinds)


@given(st.binary(max_size=200))
def test_noise_is_a_bad_frame_or_a_message(noise):
    try:
        message = wire.decode(noise, m.Request)
    except BadFrame:
        return
    assert wire.decode(wire.encode(message)[wire.HEADER :], m.Request) == message


@given(st.sampled_from(VECTORS), st.integers(0, 200), st.integers(1, 255))
def test_a_flipped_byte_is_a_bad_frame_or_another_message(vector, at, flip):
    body = bytearray(bytes.fromhex(vector[1])[wire.HEADER :])
    body[at % len(body)] ^= flip
    try:
        wire.decode(bytes(body), ANY)
    except BadFrame:
        return


@pytest.mark.parametrize(
    "message",
    [
        m.Renew("t" * 65, 1),
        m.Renew("t", 0),
        m.Pull(m.Capacity(), patience=26.0),
        m.Pull(m.Capacity(memory=-1)),
        m.Submit(JobSpec("not a cid"), "k"),
        m.Submit(JobSpec(CID, array=tuple(range(ARRAY_MAX + 1))), "k"),
        m.Submit(JobSpec(CID, array=()), "k"),
        m.Submit(JobSpec(CID, net="grid"), "k"),  # type: ignore[arg-type]
        m.Beat(addresses=("/a",) * (m.ADDRESSES_MAX + 1)),
        m.Beat(addresses=("/a" * 100,)),
    ],
)
def test_what_is_out_of_bounds_is_refused(message):
    with pytest.raises(BadFrame):
        wire.decode(wire.encode(message)[wire.HEADER :], m.Request)


def test_unknown_fields_are_refused():
    body = wire.msgspec.msgpack.encode({"type": "leave", "more": 1})
    with pytest.raises(BadFrame):
        wire.decode(body, m.Request)


@pytest.mark.parametrize("error", [NotFound(what="x"), Conflict(what="x"), Gone(what="x")])
def test_errors_travel(error: GridError):
    told = m.raised(m.failure(error))
    assert (type(told), str(told)) == (type(error), str(error))


def test_an_error_that_does_not_travel_is_temporary():
    assert type(m.raised(m.failure(TimedOut(what="x")))).__name__ == "Temporary"
    assert type(m.raised(m.Failure("NewInVersion2", "x"))).__name__ == "Temporary"


WIDE = "\U0001f5a5"
"""Four bytes for one character."""
ADDRESSES = ("a" * 192,) * m.ADDRESSES_MAX
OUTCOME = Outcome(
    1 << 31,
    WIDE * 200,
    ResultTree(CID, CID, 1 << 50, 1 << 50),
    sources={f"{i:064}": 1 << 50 for i in range(64)},
    timings={f"{i:064}": 1.5 for i in range(16)},
)
PROVIDER = m.Provider("p" * 128, ADDRESSES)
WANTED = m.Wanted(CID, "disk", CID, 1 << 50, "result", (PROVIDER,) * m.PROVIDERS_MAX, "t" * 64, 1 << 62)
SPEC = JobSpec(CID, CID, WIDE * 128, tuple(range(1 << 30, (1 << 30) + ARRAY_MAX)), needs=("n" * 64,) * 32)
TASK = m.TaskView("t" * 64, 1 << 30, "completed", 1 << 62, 1 << 62, 1 << 62, "p" * 128, WIDE * 128,
                  1.0, 1.0, 1.0, WIDE * 200, OUTCOME)  # fmt: skip
NODE = m.NodeView("p" * 128, WIDE * 128, ("worker", "submitter", "coordinator"), True, 1.0, ("s" * 64,) * 32,
                  running=("t" * 64,) * RUNNING_SHOWN, addresses=ADDRESSES, status=WIDE * 200)  # fmt: skip
RECORD = m.DatumRecord(CID, "disk", CID, WIDE * 128, "f" * 16, 1 << 50, 1 << 50, 1 << 50, 1 << 20)
LARGEST = [
    m.Orders(
        (WANTED,) * m.HOLD_MAX,
        (CID,) * m.DROP_MAX,
        ("t" * 64,) * m.DROP_MAX,
        revocations="r" * 64,
        relays=(m.Relay("p" * 128, PROVIDER.addresses),) * m.RELAYS_MAX,
    ),
    m.JobView("j" * 64, SPEC, "p" * 128, 1.0, "running", 1 << 62, {}, WIDE * 500, (TASK,) * m.PAGE),
    m.NodeList((NODE,) * m.PAGE),
    m.DataList((m.DatumView(RECORD, "p" * 128, 1.0),) * m.PAGE),
    m.JobList((m.JobRow("j" * 64, WIDE * 128, CID, "p" * 128, 1.0, "running", {}),) * m.PAGE),
    m.ProviderList((PROVIDER,) * 64),
    m.RevocationList("r" * 64, (m.Revocation("p" * 128, 1e10),) * m.REVOCATIONS_MAX),
    m.NeighbourList((m.Neighbour("p" * 128, ADDRESSES, (1 << 62,) * m.INDICES_MAX),) * m.PAGE),
    m.Grant("t" * 64, 1, "j" * 64, 1, SPEC, "p" * 128, 1.0, WANTED, WANTED),
    m.Failure("c" * 64, WIDE * 1000),
]


@pytest.mark.parametrize("reply", LARGEST, ids=lambda r: type(r).__name__)
def test_the_largest_replies_fit_a_frame(reply):
    """Whatever nodes tell of themselves, what is told of them fits."""
    frame = wire.encode(reply)
    assert wire.decode(frame[wire.HEADER :], m.Reply) == reply
