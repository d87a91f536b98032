"""Imports without a look for garbage."""

import gc
import subprocess
import sys

import pytest

from node.importing import importing


def test_nobody_looks_for_garbage_until_it_is_over() -> None:
    frozen = gc.get_freeze_count()
    with importing():
        assert not gc.isenabled()
        made = [[] for _ in range(1000)]
    assert gc.isenabled()
    assert gc.get_freeze_count() >= frozen + len(made), "nor at what is there already, later"


def test_an_import_that_fails_is_over_too() -> None:
    with pytest.raises(ImportError), importing():
        raise ImportError
    assert gc.isenabled()


def test_who_does_not_look_for_garbage_does_not_begin_to() -> None:
    gc.disable()
    try:
        with importing():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.parametrize("module", ["node.importing", "node.inference"])
def test_it_is_had_before_anything_large(module: str) -> None:
    program = f"import sys, {module}\nprint(*sorted({{'torch', 'transformers', 'trio'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
