"""Which precision a model is loaded in: a table."""

import pytest

from node.config import Quantization
from node.inference.precision import choose, described, needs_sizes

SIZES = {"int8": 60, "int4": 45}


@pytest.mark.parametrize(
    ("setting", "room", "expected"),
    [
        ("auto", 101, "stored"),
        ("auto", 100, "stored"),
        ("auto", 99, "int8"),
        ("auto", 60, "int8"),
        ("auto", 59, "int4"),
        ("auto", 45, "int4"),
        ("auto", 44, "int4"),
        ("auto", 0, "int4"),
        ("auto", -5, "int4"),
        ("none", 101, "stored"),
        ("none", 99, "stored"),
        ("none", 0, "stored"),
        ("int8", 101, "int8"),
        ("int8", 0, "int8"),
        ("int4", 101, "int4"),
        ("int4", 0, "int4"),
    ],
)
def test_the_best_that_fits(setting: Quantization, room: int, expected: str) -> None:
    assert choose(setting, 100, SIZES, room) == expected


def test_what_is_smaller_as_it_is_stays_so_when_nothing_fits() -> None:
    assert choose("auto", 100, {"int8": 60, "int4": 60}, 10) == "int8", "int4 would save nothing"


@pytest.mark.parametrize(
    ("setting", "room", "expected"),
    [("auto", 100, False), ("auto", 99, True), ("none", 0, False), ("int8", 1000, True), ("int4", 1000, True)],
)
def test_sizes_are_asked_for_only_when_they_matter(setting: Quantization, room: int, expected: bool) -> None:
    assert needs_sizes(setting, 100, room) is expected


def test_a_refusal_names_the_other_sizes() -> None:
    assert described("int4", 100, SIZES) == " as int4 (100 as stored, 60 as int8)"
    assert described("stored", 100, SIZES) == ""
