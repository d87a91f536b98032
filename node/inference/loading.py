"""A model from its spec: mapped, built, its tokenizer read; and its end, with every byte given back."""

import gc
import time
from pathlib import Path

import torch

from contracts.errors import BadInput
from node.inference.codegen import CodeGenDecoder
from node.inference.decoder import Decoder
from node.inference.files import ArtifactFiles
from node.inference.generation import RunnableModel
from node.inference.llama import LlamaDecoder
from node.inference.mapping import ShardMapping
from node.inference.spec import LoadedModel, ModelSpec
from node.inference.tokenizing import Tokenizer
from node.inference.weights import BuiltModel, build

PRECISION_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
"""As people write them."""


class MappedModel:
    """A loaded model. Nothing is left of one that could not be loaded."""

    def __init__(self, spec: ModelSpec) -> None:
        started = time.perf_counter()
        spec.check()
        self._mapping = ShardMapping([Path(path) for path in spec.shards], spec.shard_size, spec.total_size)
        try:
            self._runnable, self.about = _assemble(spec, self._mapping, started)
        except BaseException as error:
            _forget_frames(error)
            gc.collect()
            self._mapping.close()
            raise

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


def _assemble(spec: ModelSpec, mapping: ShardMapping, started: float) -> tuple[RunnableModel, LoadedModel]:
    files = ArtifactFiles(spec, mapping)
    built = build(spec.key, files, mapping)
    tokenizer = Tokenizer(spec.key, files, built.config, built.context_length)
    runnable = RunnableModel(tokenizer, _decoder(built, mapping))
    about = LoadedModel(
        key=spec.key,
        architecture=built.architecture,
        precision=PRECISION_NAMES[built.precision],
        parameters=built.parameters,
        context_length=built.context_length,
        mapped_bytes=spec.total_size - mapping.private_bytes,
        private_bytes=built.private_bytes + mapping.private_bytes,
        load_s=time.perf_counter() - started,
    )
    return runnable, about


def _decoder(built: BuiltModel, mapping: ShardMapping) -> Decoder:
    match built.architecture:
        case "LlamaForCausalLM" | "MistralForCausalLM":
            return LlamaDecoder(built, mapping)
        case "CodeGenForCausalLM":
            return CodeGenDecoder(built)
        case other:
            raise BadInput(f"there is no decoder for {other}")
