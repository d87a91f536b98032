"""`aigen chat`: a conversation on the terminal, streamed as it is made."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from contracts.errors import BadInput
from node.cli import common


@click.command("chat")
@click.argument("model_id")
@click.argument("question", required=False)
@click.option("--version", "version", help="Default: the newest.")
@click.option("--system", help="An instruction before the conversation.")
@click.option("--max-tokens", type=int, default=512, show_default=True, help="Tokens of an answer at most.")
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0: always the likeliest token.")
@click.option(
    "--top-p", type=float, default=1.0, show_default=True, help="Sample from the likeliest that make this sum."
)
@click.option("--top-k", type=int, default=0, show_default=True, help="Sample from this many; 0: from all.")
@click.option(
    "--min-p", type=float, default=0.0, show_default=True, help="Sample from this part of the likeliest and more."
)
@click.option("--seed", type=int, help="The same seed gives the same sample.")
@click.option(
    "--schema",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A file with a JSON schema: the answer is JSON that fits it.",
)
@click.option("--receipt", "shows_receipt", is_flag=True, help="Say the id of each answer's receipt (`aigen receipt`).")
@common.rpc_options
@common.json_option
def chat(
    model_id: str,
    question: str | None,
    version: str | None,
    system: str | None,
    max_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    min_p: float,
    seed: int | None,
    schema: Path | None,
    shows_receipt: bool,
    rpc_url: str,
    token: str | None,
    as_json: bool,
) -> None:
    """Ask MODEL_ID one QUESTION, or talk with it line by line when there is none."""
    given = {
        "model_id": model_id,
        "version": version,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "seed": seed,
        "json_schema": None if schema is None else _read_schema(schema),
    }
    params = {name: value for name, value in given.items() if value is not None}
    messages = [{"role": "system", "content": system}] if system else []
    rpc = common.client(rpc_url, token, timeout_s=None)
    if question is not None:
        messages.append({"role": "user", "content": question})
        _answer(rpc, params, messages, as_json, shows_receipt)
        return
    for line in _lines():
        messages.append({"role": "user", "content": line})
        answer = _answer(rpc, params, messages, as_json, shows_receipt)
        messages.append(answer["message"])


def _read_schema(path: Path) -> dict[str, Any]:
    import json

    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise BadInput(f"{path} holds no JSON object, and a JSON schema is one")
    return found


def _lines() -> Any:
    """What the user types, until the end of input."""
    while True:
        if sys.stdin.isatty():
            click.echo("> ", nl=False, err=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


def _answer(
    rpc: Any, params: dict[str, Any], messages: list[dict[str, str]], as_json: bool, shows_receipt: bool
) -> dict[str, Any]:
    if as_json:
        answer: dict[str, Any] = rpc.call("chatCompletion", messages=messages, **params)
        common.show_json(answer)
        return answer
    stream = rpc.stream("chatCompletion", messages=messages, **params)
    for notification in stream:
        if notification.method == "chatCompletionChunk":
            click.echo(notification.params["content"], nl=False)
        else:
            state = notification.params
            click.echo(f"{state['state']} {state['model_id']}: {common.progress(state)}", err=True)
    click.echo()
    result: dict[str, Any] = stream.result
    if shows_receipt:
        receipt = result.get("receipt")
        click.echo(f"receipt {receipt['receipt_id']}" if receipt else "no receipt: this node gives none", err=True)
    return result
