// OpenAI's own client asks a node: models, a conversation whole and streamed, a plain text, and what is refused.
import OpenAI from "openai";

const { url, token, model } = JSON.parse(process.env.JOB);

const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: token, maxRetries: 0 });
const messages = [{ role: "user", content: "one two three" }];

const models = [];
for await (const found of client.models.list()) models.push(found.id);

const { data: whole, response } = await client.chat.completions
  .create({ model, messages, max_completion_tokens: 2 })
  .withResponse();

const parts = [];
const stream = await client.chat.completions.create({
  model,
  messages,
  stream: true,
  stream_options: { include_usage: true },
});
let usage;
for await (const chunk of stream) {
  if (chunk.choices.length) parts.push(chunk.choices[0].delta.content ?? null);
  usage = chunk.usage ?? usage;
}

const helped = await client.chat.completions.stream({ model, messages }).finalChatCompletion();
const text = await client.completions.create({ model, prompt: "four five" });

async function refusal(asked) {
  try {
    await asked();
    return null;
  } catch (error) {
    return [error.constructor.name, error.status, error.code, error.param];
  }
}
const stranger = new OpenAI({ baseURL: `${url}/v1`, apiKey: "sk-nobody", maxRetries: 0 });

console.log(
  JSON.stringify({
    models,
    whole: [whole.choices[0].message.content, whole.choices[0].finish_reason, whole.usage.total_tokens],
    parts,
    usage: usage.total_tokens,
    receipt: [response.headers.get("x-aigen-receipt-id") === whole.id.replace("chatcmpl-", ""),
      response.headers.has("x-aigen-receipt")],
    helped: helped.choices[0].message.content,
    text: text.choices[0].text,
    refusals: [
      await refusal(() => client.chat.completions.create({ model: "nobody", messages })),
      await refusal(() => client.chat.completions.create({ model, messages, n: 2 })),
      await refusal(() => stranger.models.list()),
    ],
  }),
);
