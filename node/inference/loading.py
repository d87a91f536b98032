"""A model from its spec: mapped, built, its tokenizer read; and its end, with every byte given back."""

import gc
import time
from collections.abc import Generator
from pathlib import Path
from typing import Literal

import torch

from contracts.errors import BadInput
from node.inference.codegen import CodeGenDecoder
from node.inference.decoder import Decoder
from node.inference.files import ArtifactFiles
from node.inference.generation import RunnableModel
from node.inference.layout import lay_out
from node.inference.llama import LlamaDecoder
from node.inference.mapping import ShardMapping
from node.inference.precision import QUANTISED, Precision
from node.inference.quantised import HEADER_BYTES, QuantisedFile
from node.inference.quantising import machine_packing
from node.inference.spec import LoadedModel, LoadStep, ModelSpec
from node.inference.tokenizing import Tokenizer
from node.inference.weights import BuiltModel, CheckedModel, build, build_quantised, check

PRECISION_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
"""As people write them."""


class MappedModel:
    """A loaded model. Nothing is left of one that could not be loaded.

    Quantised weights must be there: `prepared` sees to that.
    """

    def __init__(self, spec: ModelSpec, precision: Precision = "stored") -> None:
        started = time.perf_counter()
        shards = _mapped(spec)
        try:
            self._mapping, self._runnable, self.about = _assemble(spec, shards, precision, started)
        except BaseException as error:
            _forget_frames(error)
            gc.collect()
            shards.close()
            raise
        if self._mapping is not shards:
            shards.close()

    @property
    def runnable(self) -> RunnableModel:
        """What answers are made with; do not keep it."""
        return self._runnable

    def close(self) -> int:
        """Give the memory back; the number of tensors somebody still holds, which keep all of it."""
        del self._runnable
        # transformers' modules refer to one another in circles; only the collector frees them.
        gc.collect()
        return self._mapping.close()


def _forget_frames(error: BaseException) -> None:
    """The frames an error remembers hold the half-built model, and with it the mapping."""
    link: BaseException | None = error
    while link is not None:
        link.__traceback__ = None
        link = link.__cause__ or link.__context__


def measured(spec: ModelSpec) -> dict[str, int]:
    """The bytes that the model takes in each precision of fewer bits."""
    shards = _mapped(spec)
    try:
        entries = check(spec.key, ArtifactFiles(spec, shards)).entries
        return {name: HEADER_BYTES + lay_out(entries, name).size_bytes for name in QUANTISED}
    finally:
        shards.close()


def prepared(spec: ModelSpec, precision: Precision) -> Generator[LoadStep, None, None]:
    """Have what has to be there before the model can be mapped; yields now and then so that others get their turn."""
    if precision == "stored":
        return
    shards = _mapped(spec)
    try:
        checked = check(spec.key, ArtifactFiles(spec, shards))
        yield from _quantised_file(spec, checked, precision).ensure(shards, checked.entries)
    finally:
        shards.close()


def _mapped(spec: ModelSpec) -> ShardMapping:
    spec.check()
    return ShardMapping([Path(path) for path in spec.shards], spec.shard_size, spec.total_size)


def _quantised_file(spec: ModelSpec, checked: CheckedModel, precision: Literal["int8", "int4"]) -> QuantisedFile:
    if spec.quantised is None:
        raise BadInput(f"there is no place for the quantised weights of {spec.key}; load it as it is stored")
    packing = machine_packing() if precision == "int4" else None
    return QuantisedFile(spec.quantised, lay_out(checked.entries, precision), packing)


def _assemble(
    spec: ModelSpec, shards: ShardMapping, precision: Precision, started: float
) -> tuple[ShardMapping, RunnableModel, LoadedModel]:
    files = ArtifactFiles(spec, shards)
    if precision == "stored":
        mapping, built = shards, build(spec.key, files, shards)
    else:
        mapping, built = _quantised(spec, files, precision)
    tokenizer = Tokenizer(spec.key, files, built.config, built.context_length)
    about = LoadedModel(
        key=spec.key,
        architecture=built.architecture,
        precision=PRECISION_NAMES[built.precision] if precision == "stored" else precision,
        parameters=built.parameters,
        context_length=built.context_length,
        mapped_bytes=mapping.total_size - mapping.private_bytes,
        private_bytes=built.private_bytes + mapping.private_bytes,
        load_s=time.perf_counter() - started,
    )
    return mapping, RunnableModel(tokenizer, _decoder(built)), about


def _quantised(
    spec: ModelSpec, files: ArtifactFiles, precision: Literal["int8", "int4"]
) -> tuple[ShardMapping, BuiltModel]:
    checked = check(spec.key, files)
    file = _quantised_file(spec, checked, precision)
    mapping = file.map()
    return mapping, build_quantised(checked, file, mapping)


def _decoder(built: BuiltModel) -> Decoder:
    match built.architecture:
        case "LlamaForCausalLM" | "MistralForCausalLM":
            return LlamaDecoder(built)
        case "CodeGenForCausalLM":
            return CodeGenDecoder(built)
        case other:
            raise BadInput(f"there is no decoder for {other}")
