"""Where a key's password comes from: a file, AIGEN_PASSWORD, a prompt, in this order."""

from __future__ import annotations

from pathlib import Path

import pytest

from node.cli.common import PASSWORD_BYTES_MAX
from node.cli.machines import PASSWORD
from tests.node.cluster import Cluster, Done, aigen


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    made = Cluster(tmp_path)
    made.new_key("alice")
    return made


def opened(cluster: Cluster, content: str | None, password: str | None = None) -> Done:
    """A command that decrypts alice's key with a password file of this content; None: there is no such file."""
    file = cluster.path / "password"
    if content is not None:
        file.write_bytes(content.encode())
    key = ("--key", cluster.key("alice"))
    return aigen("token", *key, "--chain-id", 1, "--password-file", file, "--json", password=password)


@pytest.mark.parametrize("content", [PASSWORD, f"{PASSWORD}\n", f"{PASSWORD}\nanother line\n\n"])
def test_the_first_line_of_the_file_is_the_password(cluster: Cluster, content: str) -> None:
    assert opened(cluster, content).json["account"] == cluster.accounts["alice"]


@pytest.mark.parametrize("content", ["", f"\n{PASSWORD}", f" {PASSWORD}", f"{PASSWORD} "])
def test_nothing_else_in_the_file_is(cluster: Cluster, content: str) -> None:
    opened(cluster, content).refused("wrong password", str(cluster.key("alice")))


def test_the_file_wins_over_the_environment(cluster: Cluster) -> None:
    assert opened(cluster, PASSWORD, password="guess").json["account"] == cluster.accounts["alice"]
    opened(cluster, "guess", password=PASSWORD).refused("wrong password")


def test_a_file_that_is_missing_is_named_and_nothing_takes_its_place(cluster: Cluster) -> None:
    opened(cluster, None, password=PASSWORD).refused("password file", str(cluster.path / "password"), "No such file")


def test_a_file_too_long_for_a_password_is_refused_with_the_numbers(cluster: Cluster) -> None:
    most = f"{PASSWORD}\n".ljust(PASSWORD_BYTES_MAX, "x")
    assert opened(cluster, most).json["account"] == cluster.accounts["alice"]
    opened(cluster, f"{most}x").refused(str(cluster.path / "password"), "4097", "4096")


def test_without_a_file_a_variable_or_a_terminal_it_says_what_to_give(cluster: Cluster) -> None:
    done = aigen("token", "--key", cluster.key("alice"), "--chain-id", 1, password=None, typed=f"{PASSWORD}\n")
    done.refused("no password", "AIGEN_PASSWORD", "--password-file")


def test_a_new_key_opens_with_the_password_of_its_file(cluster: Cluster) -> None:
    file, path = cluster.path / "secret", cluster.path / "new.json"
    file.write_text("of the new key\n")
    made = aigen("account", "new", path, "--password-file", file, "--json").json
    words = ("token", "--key", path, "--chain-id", 1, "--json")
    assert aigen(*words, password="of the new key").json["account"] == made["account"]
    aigen(*words).refused("wrong password")
