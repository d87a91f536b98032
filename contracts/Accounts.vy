# pragma version 0.4.3
# pragma evm-version cancun
"""
@title Who may send transactions, who may change the rules, and who makes the blocks
@notice Owns three sets of accounts: the enrolled, the admins and the authorities. Admins and authorities are enrolled
        as they are added and stay enrolled when they are removed; `expel` is a step of its own.
        Knows no other contract.
"""

ACCOUNTS_PER_CALL_MAX: constant(uint256) = 256
AUTHORITIES_MAX: constant(uint256) = 31

event Enrolled:
    account: indexed(address)

event Expelled:
    account: indexed(address)

event AdminAdded:
    account: indexed(address)

event AdminRemoved:
    account: indexed(address)

event AuthorityAdded:
    account: indexed(address)

event AuthorityRemoved:
    account: indexed(address)
    evidence: bytes32

is_enrolled: public(HashMap[address, bool])
is_admin: public(HashMap[address, bool])
is_authority: public(HashMap[address, bool])
admin_count: public(uint256)
_authorities: DynArray[address, AUTHORITIES_MAX]


@deploy
def __init__(first_admin: address):
    """
    @notice Begin with one admin, who does the rest by ordinary calls.
    """
    self._add_admin(first_admin)


@external
def enrol(accounts: DynArray[address, ACCOUNTS_PER_CALL_MAX]):
    """
    @notice Let accounts send transactions. All or none: one that is enrolled already refuses the whole call.
    """
    self._require_admin()
    assert len(accounts) > 0, "no accounts given"
    for account: address in accounts:
        assert not self.is_enrolled[account], "account is already enrolled"
        self._enrol(account)


@external
def expel(account: address):
    """
    @notice Take back an account's right to send transactions. Its tier is a matter of its own (Tiers.revoke).
    """
    self._require_admin()
    assert self.is_enrolled[account], "account is not enrolled"
    assert not self.is_admin[account], "account is an admin, remove it as one first"
    assert not self.is_authority[account], "account is an authority, remove it as one first"
    self.is_enrolled[account] = False
    log Expelled(account=account)


@external
def add_admin(account: address):
    """
    @notice Make an account an admin, enrolling it when it is not.
    """
    self._require_admin()
    self._add_admin(account)


@external
def remove_admin(account: address):
    """
    @notice Take an admin's rights back. The last admin stays: without one nothing could ever change again.
    """
    self._require_admin()
    assert self.is_admin[account], "account is not an admin"
    assert self.admin_count > 1, "the last admin cannot be removed"
    self.is_admin[account] = False
    self.admin_count -= 1
    log AdminRemoved(account=account)


@external
def add_authority(account: address):
    """
    @notice Let an account propose blocks and vote on them, enrolling it when it is not.
    """
    self._require_admin()
    assert not self.is_authority[account], "account is already an authority"
    assert len(self._authorities) < AUTHORITIES_MAX, "there are already 31 authorities"
    if not self.is_enrolled[account]:
        self._enrol(account)
    self.is_authority[account] = True
    self._authorities.append(account)
    log AuthorityAdded(account=account)


@external
def remove_authority(account: address, evidence: bytes32):
    """
    @notice Take an account's vote back. The last authority stays: without one there is no next block.
    @param evidence The hash of two statements of this account that contradict each other; zero for any other reason.
           It stands in the log for everyone to check; the rules do not depend on it.
    """
    self._require_admin()
    assert self.is_authority[account], "account is not an authority"
    assert len(self._authorities) > 1, "the last authority cannot be removed"
    self.is_authority[account] = False
    # Closing the gap instead of moving the last one into it keeps the order in which they were added, which is
    # also what appending and removing by events gives.
    found: bool = False
    last: uint256 = len(self._authorities) - 1
    for i: uint256 in range(last, bound=AUTHORITIES_MAX):
        if self._authorities[i] == account:
            found = True
        if found:
            self._authorities[i] = self._authorities[i + 1]
    self._authorities.pop()
    log AuthorityRemoved(account=account, evidence=evidence)


@external
@view
def authorities() -> DynArray[address, AUTHORITIES_MAX]:
    """
    @notice All authorities in the order they were added.
    """
    return self._authorities


@internal
@view
def _require_admin():
    assert self.is_admin[msg.sender], "sender is not an admin"


@internal
def _enrol(account: address):
    assert account != empty(address), "account is zero"
    self.is_enrolled[account] = True
    log Enrolled(account=account)


@internal
def _add_admin(account: address):
    assert not self.is_admin[account], "account is already an admin"
    if not self.is_enrolled[account]:
        self._enrol(account)
    self.is_admin[account] = True
    self.admin_count += 1
    log AdminAdded(account=account)
