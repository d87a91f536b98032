// An admin with viem: registers a model, reads it back by call and by logs, follows the event over HTTP and WebSocket.
import { createPublicClient, createWalletClient, defineChain, http, webSocket } from "viem";
import { privateKeyToAccount } from "viem/accounts";

const { url, key, strangerKey, abi, address, registration, chainId } = JSON.parse(process.env.JOB);

const chain = defineChain({
  id: chainId,
  name: "AIGEN",
  nativeCurrency: { name: "none", symbol: "NONE", decimals: 18 },
  rpcUrls: { default: { http: [url] } },
});
const account = privateKeyToAccount(key);
// viem watches behind its back: these two only look on, and tell when the filter is there.
let newFilterAsked = false;
let filterAnswered;
const filterIsThere = new Promise((resolve) => (filterAnswered = resolve));
const transport = http(undefined, {
  onFetchRequest: (_, init) => {
    newFilterAsked ||= String(init.body).includes("eth_newFilter");
  },
  onFetchResponse: () => {
    if (newFilterAsked) filterAnswered();
  },
});
const client = createPublicClient({ chain, transport, pollingInterval: 50 });
const socket = createPublicClient({ chain, transport: webSocket(url.replace("http", "ws")) });
const wallet = createWalletClient({ account, chain, transport: http() });
const model = { address, abi };

const until = (follow) => {
  let unwatch;
  const first = new Promise((resolve, reject) => {
    unwatch = follow((logs) => resolve(logs[0].args.model_id), reject);
  });
  return first.finally(() => unwatch());
};
const polled = until((onLogs, onError) =>
  client.watchContractEvent({ ...model, eventName: "ModelRegistered", onLogs, onError }),
);
await filterIsThere;
const pushed = until((onLogs, onError) =>
  socket.watchContractEvent({ ...model, eventName: "ModelRegistered", onLogs, onError }),
);
await new Promise((resolve) => setImmediate(resolve));
await socket.getBlockNumber();

const fees = await client.estimateFeesPerGas();
const { request } = await client.simulateContract({ ...model, functionName: "register", args: registration, account });
const hash = await wallet.writeContract(request);
const receipt = await client.waitForTransactionReceipt({ hash });

const names = [registration[0], registration[1]];
const found = await client.readContract({ ...model, functionName: "model", args: names });
const before = await client.readContract({ ...model, functionName: "model", args: names, blockNumber: 0n });
const logs = await client.getContractEvents({ ...model, eventName: "ModelRegistered", fromBlock: 0n });
const block = await client.getBlock({ blockNumber: receipt.blockNumber, includeTransactions: true });
const proof = await client.getProof({ address, storageKeys: [`0x${"00".repeat(32)}`] });

let refused;
try {
  const stranger = privateKeyToAccount(strangerKey);
  await client.simulateContract({ ...model, functionName: "register", args: registration, account: stranger });
} catch (error) {
  refused = { name: error.cause.name, reason: error.cause.reason };
}

const result = {
  fees,
  hash,
  type: receipt.type,
  status: receipt.status,
  effectiveGasPrice: receipt.effectiveGasPrice,
  shardCount: found.shard_count,
  manifestHash: found.manifest_hash,
  shardCountBefore: before.shard_count,
  logs: logs.map((log) => ({ modelId: log.args.model_id, hashes: log.args.shard_hashes, hash: log.transactionHash })),
  polled: await polled,
  pushed: await pushed,
  blockHash: block.hash,
  blockTransactions: block.transactions.map((transaction) => transaction.hash),
  proofNodes: proof.accountProof.length,
  refused,
};
console.log(JSON.stringify(result, (_, value) => (typeof value === "bigint" ? Number(value) : value)));
(await socket.transport.getRpcClient()).close();
