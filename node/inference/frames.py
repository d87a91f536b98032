"""The language between the node and its engine process: commands down, replies up, msgpack frames with their lengths.

Owns the frame format and its limit. Knows nothing of how either side acts on a frame.
"""

import struct

import msgspec

from contracts.errors import BadInput, Refused, refused
from node.inference.precision import Precision
from node.inference.spec import Chunk, LoadedModel, LoadStep, ModelSpec, Parameters, Prompt

FRAME_BYTES_MAX = 32 << 20
"""One frame: the largest prompt with four bytes a character, or the largest spec, and room to spare."""

HEADER = struct.Struct(">I")
"""The length that goes before each frame."""


class Measure(msgspec.Struct, frozen=True, tag=True):
    """Say what the model would take quantised."""

    request: int
    spec: ModelSpec


class Load(msgspec.Struct, frozen=True, tag=True):
    """Quantise the model's weights if that is asked and not done yet, map them and make it ready."""

    request: int
    spec: ModelSpec
    precision: Precision = "stored"


class Unload(msgspec.Struct, frozen=True, tag=True):
    """Give the model's memory back; unknown keys are fine."""

    request: int
    key: str


class Generate(msgspec.Struct, frozen=True, tag=True):
    """Answer a prompt, chunk by chunk. Whose turn it is is fair among accounts, whatever their names, by weight."""

    request: int
    key: str
    prompt: Prompt
    parameters: Parameters
    account: str = ""
    weight: int = 1


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """Nobody waits for this answer any more."""

    request: int


class Resize(msgspec.Struct, frozen=True, tag=True):
    """All conversations together may take this many bytes from now on."""

    request: int
    answers_bytes: int


Command = Measure | Load | Unload | Generate | Cancel | Resize


class Hello(msgspec.Struct, frozen=True, tag=True):
    """The process is up: torch is imported and its threads are set."""

    pid: int
    threads: int
    torch: str


class Measured(msgspec.Struct, frozen=True, tag=True):
    """Bytes by precision."""

    request: int
    sizes: dict[str, int]


class Loading(msgspec.Struct, frozen=True, tag=True):
    """A load goes on."""

    request: int
    step: LoadStep


class Loaded(msgspec.Struct, frozen=True, tag=True):
    """The model is ready."""

    request: int
    model: LoadedModel


class Unloaded(msgspec.Struct, frozen=True, tag=True):
    """The memory is back; `leaked` tensors still hold theirs (a bug worth a line in the log)."""

    request: int
    leaked: int


class Begun(msgspec.Struct, frozen=True, tag=True):
    """An answer waits no longer. `tokens` has its prompt."""

    request: int
    tokens: int


class Delta(msgspec.Struct, frozen=True, tag=True):
    """The next chunk of an answer. `tokens` are those of the prompt and of the answer so far, shown or not."""

    request: int
    chunk: Chunk
    tokens: int


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The command was refused; the code names the kind of error."""

    request: int
    code: int
    message: str


class Resized(msgspec.Struct, frozen=True, tag=True):
    """They take no more than that by now."""

    request: int


Reply = Hello | Measured | Loading | Loaded | Unloaded | Begun | Delta | Failed | Resized

_encoder = msgspec.msgpack.Encoder()
_commands = msgspec.msgpack.Decoder(Command)
_replies = msgspec.msgpack.Decoder(Reply)


def encode(frame: Command | Reply) -> bytes:
    """The frame with its length before it."""
    body = _encoder.encode(frame)
    if len(body) > FRAME_BYTES_MAX:
        raise BadInput(f"the request has {len(body)} bytes for the engine; at most {FRAME_BYTES_MAX} are taken")
    return HEADER.pack(len(body)) + body


def decode_command(body: bytes) -> Command:
    """What the node wants; anything else is a bug on our own side."""
    return _commands.decode(body)


def decode_reply(body: bytes) -> Reply:
    """What the engine says."""
    return _replies.decode(body)


def body_size(header: bytes) -> int:
    """The size of the body that follows this header."""
    (size,) = HEADER.unpack(header)
    assert size <= FRAME_BYTES_MAX, f"a frame of {size} bytes"
    return int(size)


def failed(request: int, error: Refused) -> Failed:
    """An expected error, ready to travel."""
    return Failed(request, error.code, str(error))


def error_of(failure: Failed) -> Refused:
    """The error that travelled, as its own kind again."""
    return refused(failure.code, failure.message)
