"""Endpoints as text."""

import pytest

from contracts.errors import BadInput
from contracts.types import NodeId
from node.network.addresses import (
    ENDPOINT_CHARS_MAX,
    ControlAddress,
    DataAddress,
    Endpoints,
    control_address,
    data_address,
    parse_control,
    parse_data,
    parse_endpoints,
)
from node.network.identity import node_id_of_public_key

ID = node_id_of_public_key(bytes(range(32)))
OTHER = node_id_of_public_key(bytes(32))


@pytest.mark.parametrize(
    "text",
    [
        f"/ip4/10.0.0.1/tcp/9945/p2p/{ID}",
        f"/ip6/2001:db8::1/tcp/1/p2p/{ID}",
        f"/dns4/node-1.example.org/tcp/65535/p2p/{ID}",
        f"/dns6/a/tcp/80/p2p/{ID}",
        f"/dns/localhost/tcp/80/p2p/{ID}",
    ],
)
def test_control_addresses_come_out_as_they_went_in(text: str) -> None:
    assert str(parse_control(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "aigen+tls://10.0.0.1:9946",
        "aigen+tls://[2001:db8::1]:1",
        "aigen+tls://node-1.example.org:65535",
        "aigen+tcp://10.0.0.1:9946",
        "aigen+tcp://[2001:db8::1]:1",
    ],
)
def test_data_addresses_come_out_as_they_went_in(text: str) -> None:
    assert str(parse_data(text)) == text
    assert parse_data(text).plain == text.startswith("aigen+tcp")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/",
        "10.0.0.1:9945",
        "/ip4/10.0.0.1/tcp/9945",
        f"/ip4/10.0.0.1/udp/9945/p2p/{ID}",
        f"/ip4/10.0.0.1/tcp/9945/p2p/{ID}/",
        f"x/ip4/10.0.0.1/tcp/9945/p2p/{ID}",
        f"/ip4/10.0.0.256/tcp/9945/p2p/{ID}",
        f"/ip4/::1/tcp/9945/p2p/{ID}",
        f"/ip6/10.0.0.1/tcp/9945/p2p/{ID}",
        f"/onion/abc/tcp/9945/p2p/{ID}",
        f"/dns4/-bad/tcp/9945/p2p/{ID}",
        f"/dns4/a b/tcp/9945/p2p/{ID}",
        f"/ip4/10.0.0.1/tcp/0/p2p/{ID}",
        f"/ip4/10.0.0.1/tcp/65536/p2p/{ID}",
        f"/ip4/10.0.0.1/tcp/+80/p2p/{ID}",
        f"/ip4/10.0.0.1/tcp/٨٠/p2p/{ID}",
        "/ip4/10.0.0.1/tcp/80/p2p/QmNobody",
        f"/dns4/{'a.' * 60}org/tcp/80/p2p/{ID}",
    ],
)
def test_what_is_no_control_address_is_refused(text: str) -> None:
    with pytest.raises(BadInput):
        parse_control(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "10.0.0.1:9946",
        "https://10.0.0.1:9946",
        "tcp://10.0.0.1:9946",
        "aigen+udp://10.0.0.1:9946",
        "aigen+tcp://10.0.0.1:9946/path",
        "aigen+tls://",
        "aigen+tls://:9946",
        "aigen+tls://10.0.0.1",
        "aigen+tls://10.0.0.1:0",
        "aigen+tls://10.0.0.1:99999",
        "aigen+tls://user@10.0.0.1:9946",
        "aigen+tls://10.0.0.1:9946/path",
        "aigen+tls://10.0.0.1:9946?query",
        "aigen+tls://[::1:9946",
        "aigen+tls://::1:9946",
        "aigen+tls://a_b:9946",
        "aigen+tls://" + "a" * ENDPOINT_CHARS_MAX + ":1",
    ],
)
def test_what_is_no_data_address_is_refused(text: str) -> None:
    with pytest.raises(BadInput):
        parse_data(text)


def test_the_endpoints_of_a_member_are_sorted_by_plane() -> None:
    control, data = f"/ip4/10.0.0.1/tcp/9945/p2p/{ID}", "aigen+tls://10.0.0.1:9946"
    assert parse_endpoints(ID, [data, control]) == Endpoints(
        (ControlAddress(ID, "ip4", "10.0.0.1", 9945),), (DataAddress("10.0.0.1", 9946),)
    )
    assert parse_endpoints(ID, ["aigen+tcp://10.0.0.1:9946"]).data == (DataAddress("10.0.0.1", 9946, plain=True),)
    assert parse_endpoints(ID, []) == Endpoints((), ())


def test_a_member_cannot_point_at_another_node() -> None:
    with pytest.raises(BadInput, match="names node"):
        parse_endpoints(ID, [f"/ip4/10.0.0.1/tcp/9945/p2p/{OTHER}"])


def test_addresses_from_parts() -> None:
    assert control_address(ID, "::1", 5) == ControlAddress(ID, "ip6", "::1", 5)
    assert control_address(ID, "127.0.0.1", 5) == ControlAddress(ID, "ip4", "127.0.0.1", 5)
    assert control_address(ID, "node", 5) == ControlAddress(ID, "dns", "node", 5)
    assert data_address("0:0::1", 5) == DataAddress("::1", 5)
    with pytest.raises(BadInput):
        data_address("no host", 5)
    with pytest.raises(BadInput):
        control_address(NodeId("nobody"), "node", 5)
