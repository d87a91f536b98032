# pragma version 0.4.3
# pragma evm-version cancun
"""
@title What a name or a text on the ledger may be made of
@notice Owns the alphabets. Every string a contract accepts is checked here, so that a log always decodes as text
        and a name means the same bytes to every node. Knows no contract.
@dev An alphabet is a bit mask: bit c is set when the byte c is allowed.
"""

DIGITS: constant(uint256) = ((1 << 10) - 1) << 48  # 0-9
LOWER: constant(uint256) = ((1 << 26) - 1) << 97  # a-z
UPPER: constant(uint256) = ((1 << 26) - 1) << 65  # A-Z
NAME_FIRST: constant(uint256) = LOWER | DIGITS
NAME: constant(uint256) = LOWER | DIGITS | (1 << 45) | (1 << 46) | (1 << 95)  # and - . _
BASE58: constant(uint256) = (LOWER | UPPER | DIGITS) ^ ((1 << 48) | (1 << 73) | (1 << 79) | (1 << 108))  # no 0 I O l
GRAPHIC: constant(uint256) = ((1 << 94) - 1) << 33  # ! to ~
PRINTABLE: constant(uint256) = ((1 << 95) - 1) << 32  # blank to ~


@internal
@pure
def _all_in(text: String[1024], alphabet: uint256) -> bool:
    """
    @notice Whether each byte of `text` is in `alphabet`; true of the empty text.
    """
    raw: Bytes[1024] = convert(text, Bytes[1024])
    for i: uint256 in range(len(raw), bound=1024):
        code: uint256 = convert(slice(raw, i, 1), uint256)
        if (alphabet >> code) & 1 == 0:
            return False
    return True


@internal
@pure
def is_name(text: String[64]) -> bool:
    """
    @notice Whether `text` is [a-z0-9][a-z0-9._-]{0,63}.
    """
    if len(text) == 0:
        return False
    first: uint256 = convert(slice(convert(text, Bytes[64]), 0, 1), uint256)
    if (NAME_FIRST >> first) & 1 == 0:
        return False
    return self._all_in(text, NAME)


@internal
@pure
def is_base58(text: String[64]) -> bool:
    """
    @notice Whether `text` is not empty and base58, as a libp2p peer id is written.
    """
    return len(text) > 0 and self._all_in(text, BASE58)


@internal
@pure
def is_uri(text: String[256]) -> bool:
    """
    @notice Whether `text` is not empty and printable ASCII without blanks.
    """
    return len(text) > 0 and self._all_in(text, GRAPHIC)


@internal
@pure
def is_printable(text: String[1024]) -> bool:
    """
    @notice Whether `text` is printable ASCII, blanks included; true of the empty text.
    """
    return self._all_in(text, PRINTABLE)
