"""Bearer tokens: against eth-account's own EIP-712, and every way one can be wrong."""

import base64

import pytest
from eth_account import Account
from eth_account.messages import encode_typed_data
from hypothesis import given
from hypothesis import strategies as st

from contracts.errors import BadInput, NotAllowed
from ledger.keys import Key
from node.config import RpcSettings
from node.rpc import token

from .fake import ADMIN, BASIC, CHAIN_ID, NOW, OPERATOR, STRANGER, FakeNode
from .wire import call, post, serving

EXPIRY = NOW + 3600


def test_what_is_minted_is_verified():
    text = token.mint(BASIC, CHAIN_ID, EXPIRY)
    assert text.startswith("aigen_")
    assert len(text) == token.TOKEN_CHARACTERS == 130
    assert token.verify(text, CHAIN_ID, NOW) == BASIC.address


def test_a_wallet_signs_the_same_message():
    """eth-account builds and signs the typed data by itself; its parity byte is a wallet's, 27 or 28."""
    message = encode_typed_data(
        {"name": "AIGEN", "version": "1", "chainId": CHAIN_ID},
        {"Access": [{"name": "account", "type": "address"}, {"name": "expiry", "type": "uint64"}]},
        {"account": BASIC.address, "expiry": EXPIRY},
    )
    signature = Account.sign_message(message, BASIC.secret).signature
    assert signature[64] in {27, 28}
    assert token.verify(token.encode(BASIC.address, EXPIRY, bytes(signature)), CHAIN_ID, NOW) == BASIC.address


@pytest.mark.parametrize(
    ("now", "words"),
    [
        (EXPIRY, "expired 0 s ago"),
        (EXPIRY + 7.5, "expired 7 s ago"),
        (EXPIRY - token.LIFETIME_MAX_S - 1, "at most"),
    ],
)
def test_times(now, words):
    with pytest.raises(NotAllowed, match=words):
        token.verify(token.mint(BASIC, CHAIN_ID, EXPIRY), CHAIN_ID, now)


def test_the_last_second_and_the_longest_life():
    text = token.mint(BASIC, CHAIN_ID, EXPIRY)
    token.verify(text, CHAIN_ID, EXPIRY - 1)
    token.verify(text, CHAIN_ID, EXPIRY - token.LIFETIME_MAX_S)


def test_another_chain():
    with pytest.raises(NotAllowed, match="for chain id 1"):
        token.verify(token.mint(BASIC, CHAIN_ID, EXPIRY), 1, NOW)


@pytest.mark.parametrize("expiry", [0, -1, 1 << 64])
def test_no_time(expiry):
    with pytest.raises(BadInput):
        token.mint(BASIC, CHAIN_ID, expiry)


@given(st.integers(0, token.TOKEN_SIZE - 1), st.integers(1, 255))
def test_any_changed_byte_is_refused(position, change):
    text = token.mint(BASIC, CHAIN_ID, EXPIRY)
    content = bytearray(base64.urlsafe_b64decode(text.removeprefix(token.PREFIX)))
    content[position] ^= change
    parity = content[-1]
    if position == token.TOKEN_SIZE - 1 and parity - 27 in {0, 1} and (parity - 27) ^ change ^ parity == 0:
        return  # the same parity in a wallet's spelling
    changed = token.PREFIX + base64.urlsafe_b64encode(bytes(content)).decode()
    try:
        assert token.verify(changed, CHAIN_ID, NOW) == BASIC.address
        assert (parity - 27) == (parity ^ change), "accepted for another reason than the wallet's spelling of parity"
    except NotAllowed:
        pass


@given(st.text(max_size=200))
def test_any_text_is_refused(text):
    for given_ in (text, token.PREFIX + text, (token.PREFIX + text).ljust(token.TOKEN_CHARACTERS, "A")):
        with pytest.raises(NotAllowed):
            token.verify(given_, CHAIN_ID, NOW)


# Over HTTP


def bearer(key: Key, chain_id: int = CHAIN_ID, expiry: int = EXPIRY) -> dict[str, str]:
    return {"authorization": f"Bearer {token.mint(key, chain_id, expiry)}"}


GET_ACCOUNT = call("getAccount")


async def test_on_loopback_nobody_named_is_the_operator():
    async with serving() as served:
        reply = await post(served, GET_ACCOUNT)
    assert reply.json["result"]["account"] == f"0x{OPERATOR.address.hex()}"


async def test_a_token_names_the_account():
    async with serving() as served:
        reply = await post(served, GET_ACCOUNT, bearer(BASIC))
        lower = await post(
            served, GET_ACCOUNT, {"authorization": bearer(BASIC)["authorization"].replace("Bearer", "bearer")}
        )
    assert reply.json["result"]["account"] == lower.json["result"]["account"] == f"0x{BASIC.address.hex()}"


async def test_a_token_on_loopback_is_not_the_operator():
    async with serving() as served:
        reply = await post(served, call("verifyShards"), bearer(ADMIN))
    assert reply.json["error"]["code"] == -32003


@pytest.mark.parametrize(
    "headers",
    [bearer(BASIC, chain_id=1), bearer(BASIC, expiry=NOW), {"authorization": "Basic eDp5"}, {"authorization": "x"}],
)
async def test_a_bad_token_refuses_open_methods_too(headers):
    """Whoever sends one believes to be known; acting as nobody, or as the operator, would be worse than saying so."""
    async with serving() as served:
        reply = await post(served, call("health"), headers)
    assert reply.status == 401
    assert reply.headers["www-authenticate"] == "Bearer"
    assert reply.error["code"] == -32003


@pytest.mark.parametrize("header", ["forwarded", "x-forwarded-for", "via"])
async def test_behind_a_proxy_nobody_is_the_operator(header):
    async with serving() as served:
        reply = await post(served, call("getNodeInfo"), {header: "192.0.2.1"})
    assert reply.json["error"]["code"] == -32003


async def test_away_from_loopback_a_token_is_needed():
    async with serving(FakeNode(), RpcSettings(port=0, host="0.0.0.0")) as served:
        nobody = await post(served, call("getNodeInfo"))
        stranger = await post(served, call("getNodeInfo"), bearer(STRANGER))
        known = await post(served, call("getNodeInfo"), bearer(BASIC))
        operator = await post(served, call("verifyShards"), bearer(OPERATOR))
        read = await post(served, call("listModels"))
    assert nobody.json["error"]["code"] == stranger.json["error"]["code"] == -32003
    assert known.json["result"]["role"] == "worker"
    assert len(operator.json["result"]) == 4
    assert len(read.json["result"]["models"]) == 3
