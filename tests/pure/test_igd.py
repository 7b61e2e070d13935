"""Is nobody but the gateway asked, and is what it says read as UPnP writes it?"""

from __future__ import annotations

import contextlib
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pgrid.errors import BadFrame
from p2pgrid.hole_punch.portmap import igd

GATEWAY = "192.168.1.1"
URL = f"http://{GATEWAY}:5000/rootDesc.xml"
DESCRIPTION = """<?xml version="1.0"?>
<root xmlns="urn:schemas-upnp-org:device-1-0">{base}<device>
<deviceList><device><deviceList><device><serviceList>
<service><serviceType>urn:schemas-upnp-org:service:WANCommonInterfaceConfig:1</serviceType>
<controlURL>/ctl/CmnIfCfg</controlURL></service>
<service><serviceType>urn:schemas-upnp-org:service:WANIPConnection:1</serviceType>
<controlURL>{control}</controlURL></service>
</serviceList></device></deviceList></device></deviceList></device></root>"""


def described(control: str, base: str = "") -> igd.Service:
    return igd.service_of(DESCRIPTION.format(control=control, base=base).encode(), URL, GATEWAY)


def answer_to_search(location: str, status: str = "200 OK") -> bytes:
    return f"HTTP/1.1 {status}\r\nST: x\r\nLocation: {location}\r\nEXT:\r\n\r\n".encode()


def test_the_description_is_found_and_leads_to_the_service():
    assert igd.found(answer_to_search(URL), GATEWAY) == URL
    assert described("/ctl/IPConn") == igd.Service(GATEWAY, 5000, "/ctl/IPConn", igd.SERVICES[1])
    assert described("ctl?x=1").target == "/ctl?x=1"
    assert described("/c", f"<URLBase>http://{GATEWAY}:80/</URLBase>").port == 80


@pytest.mark.parametrize(
    "url",
    [
        "http://192.168.1.2:5000/x",
        "http://127.0.0.1/x",
        "http://router.lan/x",
        "https://192.168.1.1/x",
        "ftp://192.168.1.1/x",
        "http://192.168.1.1@10.0.0.1/x",
        "http://me:secret@192.168.1.1/x",
        "http://192.168.1.1:99999/x",
        "http://[::1/x",
        "//10.0.0.1/x",
        "http://192.168.1.1/a b",
        "http://192.168.1.1/ä",
    ],
)
def test_no_other_place_is_asked(url: str):
    with pytest.raises(BadFrame):
        described(url)
    with pytest.raises(BadFrame):
        igd.found(answer_to_search(url), GATEWAY)


@pytest.mark.parametrize(
    "data", [b"", b"NOTIFY * HTTP/1.1\r\nLOCATION: x\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n", b"\xff" * 99]
)
def test_an_answer_without_a_place_is_none(data: bytes):
    with pytest.raises(BadFrame):
        igd.found(data, GATEWAY)


def test_entities_are_refused_before_they_are_parsed():
    bomb = '<!DOCTYPE a [<!ENTITY b "bbbb"><!ENTITY c "&b;&b;">]><a>&c;</a>'
    for text in (
        bomb.encode(),
        bomb.replace("DOCTYPE", "doctype").encode(),
        bomb.encode("utf-16"),
        b"\xff\xfe",
    ):
        with pytest.raises(BadFrame):
            igd.service_of(text, URL, GATEWAY)


def test_a_call_is_as_the_standard_writes_it():
    service = igd.Service(GATEWAY, 5000, "/ctl", igd.SERVICES[0])
    headers, body = igd.request(service, "AddPortMapping", {"NewProtocol": "TCP", "NewX": "<&>"})
    assert headers["SOAPAction"] == f'"{igd.SERVICES[0]}#AddPortMapping"'
    call = ElementTree.fromstring(body)[0][0]
    assert call.tag == f"{{{igd.SERVICES[0]}}}AddPortMapping"
    assert [(arg.tag, arg.text) for arg in call] == [("NewProtocol", "TCP"), ("NewX", "<&>")]


def test_answers_and_faults_are_told_apart():
    told = (
        "<e><Body><u:R xmlns:u='x'><NewExternalIPAddress> 11.3.0.1 </NewExternalIPAddress></u:R></Body></e>"
    )
    assert igd.answer(200, told.encode())["NewExternalIPAddress"] == "11.3.0.1"
    fault = "<e><Fault><UPnPError><errorCode>718</errorCode><errorDescription>taken</errorDescription>"
    fault += "</UPnPError></Fault></e>"
    with pytest.raises(igd.Fault) as refused:
        igd.answer(500, fault.encode())
    assert refused.value.code == igd.CONFLICT
    assert str(refused.value) == "taken (718)"
    for status, body in (
        (404, told),
        (302, told),
        (500, told),
        (500, fault.replace("718", "x")),
        (200, "<a"),
    ):
        with pytest.raises(BadFrame):
            igd.answer(status, body.encode())


@given(st.binary(max_size=300), st.text(max_size=60))
def test_noise_is_only_ever_a_bad_frame(data: bytes, text: str):
    for read in (
        lambda: igd.found(data, GATEWAY),
        lambda: igd.found(answer_to_search(text), GATEWAY),
        lambda: igd.service_of(data, URL, GATEWAY),
        lambda: igd.service_of(DESCRIPTION.format(control=text, base="").encode(), URL, GATEWAY),
        lambda: igd.answer(200, data),
    ):
        with contextlib.suppress(BadFrame):
            read()
