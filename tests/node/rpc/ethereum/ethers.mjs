// An admin with ethers: registers a model, reads it back by call and by logs, follows the event over HTTP and WebSocket.
import { Contract, JsonRpcProvider, Wallet, WebSocketProvider } from "ethers";

const { url, key, strangerKey, abi, address, registration } = JSON.parse(process.env.JOB);

// By default ethers takes an answer of the last 250 ms for the present one: here a transaction is final sooner than that.
const provider = new JsonRpcProvider(url, undefined, { cacheTimeout: -1 });
provider.pollingInterval = 50;
const socket = new WebSocketProvider(url.replace("http", "ws"));
const contract = new Contract(address, abi, new Wallet(key, provider));

const filterIsThere = new Promise((resolve) => {
  provider.on("debug", (event) => {
    const asked = event.payload === undefined ? [] : [event.payload].flat();
    if (asked.some((request) => request.method === "eth_newFilter")) {
      provider.on("debug", (other) => other.action === "receiveRpcResult" && resolve());
    }
  });
});
const polled = new Promise((resolve) => contract.once("ModelRegistered", (...values) => resolve(values)));
await filterIsThere;
const listening = new Contract(address, abi, socket);
const pushed = new Promise((resolve) => {
  listening.once("ModelRegistered", (...values) => resolve(values));
});
// ethers subscribes behind its back: the answer to a later call on the same connection tells that it has.
await new Promise((resolve) => setImmediate(resolve));
await socket.getBlockNumber();

const fees = await provider.getFeeData();
const sent = await contract.register(...registration);
const receipt = await sent.wait();
const typed = await contract.set_core(registration[0], registration[1], { type: 2 });
await typed.wait();

const model = await contract.model(registration[0], registration[1]);
const logs = await contract.queryFilter("ModelRegistered", 0);
const block = await provider.getBlock(receipt.blockNumber, true);
const fetched = await provider.getTransaction(sent.hash);

let refused;
try {
  await new Contract(address, abi, new Wallet(strangerKey, provider)).register(...registration);
} catch (error) {
  refused = { code: error.code, reason: error.reason };
}

let late;
try {
  await contract.retire(registration[0], registration[1], { nonce: 0, gasLimit: 1_000_000 });
} catch (error) {
  late = error.code;
}

const result = {
  fees: { gasPrice: fees.gasPrice, maxFeePerGas: fees.maxFeePerGas, maxPriorityFeePerGas: fees.maxPriorityFeePerGas },
  hash: sent.hash,
  type: fetched.type,
  typedHash: typed.hash,
  status: receipt.status,
  gasPrice: receipt.gasPrice,
  shardCount: model.shard_count,
  manifestHash: model.manifest_hash,
  logs: logs.map((log) => ({ modelId: log.args.model_id, hashes: [...log.args.shard_hashes], hash: log.transactionHash })),
  polled: (await polled)[0],
  pushed: (await pushed)[0],
  blockHash: block.hash,
  blockTransactions: block.prefetchedTransactions.map((transaction) => transaction.hash),
  refused,
  late,
};
console.log(JSON.stringify(result, (_, value) => (typeof value === "bigint" ? Number(value) : value)));
provider.destroy();
await socket.destroy();
