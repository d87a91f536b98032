"""Compiles the Vyper sources into artifacts.json: `python -m contracts.compile`, or `--check` to see if it is stale.

Needs vyper, a build-time dependency; nothing else in the house imports this module. The output depends on the sources
and the compiler's version only: no time, no path, no metadata in the bytecode, keys in a fixed order.
"""

import json
import sys
from pathlib import Path
from typing import Any, Final

from contracts.addresses import CONTRACT_NAMES

SOURCES: Final = Path(__file__).parent
ARTIFACTS: Final = SOURCES / "artifacts.json"
VYPER_VERSION: Final = "0.4.3"


def compile_one(name: str, sources: Path) -> dict[str, Any]:
    """The ABI and init code of one contract whose source is in a directory."""
    from vyper.compiler import compile_from_file_input
    from vyper.compiler.input_bundle import FilesystemInputBundle
    from vyper.compiler.settings import Settings

    bundle = FilesystemInputBundle([sources])
    with bundle.search_path(sources):
        source = bundle.load_file(Path(f"{name}.vy"))
        output = compile_from_file_input(
            source,
            input_bundle=bundle,
            settings=Settings(evm_version="cancun"),
            output_formats=["abi", "bytecode"],
            no_bytecode_metadata=True,
        )
    return {"abi": output["abi"], "init_code": output["bytecode"]}


def compile_all(sources: Path = SOURCES) -> str:
    """The text of artifacts.json for the sources in a directory."""
    import vyper

    assert vyper.__version__.split("+")[0] == VYPER_VERSION, f"need vyper {VYPER_VERSION}, have {vyper.__version__}"
    contracts = {name: compile_one(name, sources) for name in CONTRACT_NAMES}
    return json.dumps({"vyper": VYPER_VERSION, "contracts": contracts}, indent=1) + "\n"


def main(arguments: list[str]) -> int:
    """Write artifacts.json, or with `--check` only compare it; returns the exit status."""
    if arguments not in ([], ["--check"]):
        sys.stderr.write("usage: python -m contracts.compile [--check]\n")
        return 2
    fresh = compile_all()
    if not arguments:
        ARTIFACTS.write_text(fresh, encoding="utf-8")
        return 0
    if ARTIFACTS.exists() and ARTIFACTS.read_text(encoding="utf-8") == fresh:
        return 0
    sys.stderr.write(f"{ARTIFACTS.name} is not what the Vyper sources compile to: run `make contracts`, commit it\n")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
