// OpenAI's client for Node: answer, stream, helper, second turn, JSON by schema, models, errors. BASE and PICTURE are in the environment.
import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

const { BASE, PICTURE } = process.env;
const bytes = await readFile(PICTURE);
const url = `data:image/jpeg;base64,${bytes.toString("base64")}`;
const client = new OpenAI({ baseURL: BASE, apiKey: "none", maxRetries: 0 });
const question = [{ type: "image_url", image_url: { url } }, { type: "text", text: "What is the date?" }];
const messages = [{ role: "user", content: question }];

const first = await client.chat.completions.create({ model: "tiny", messages });
const answer = first.choices[0].message;
assert.ok(answer.content);
assert.ok(answer.qzoom.gate);
const more = { role: "user", content: "And the total amount?" };
const second = await client.chat.completions.create({ model: "tiny", messages: [...messages, answer, more] });
assert.ok(second.choices[0].message.content);

let text = "";
for await (const chunk of await client.chat.completions.create({ model: "tiny", messages, stream: true })) {
  text += chunk.choices[0]?.delta.content ?? "";
}
assert.equal(text, answer.content);
const helper = client.chat.completions.stream({ model: "tiny", messages, stream_options: { include_usage: true } });
const final = await helper.finalChatCompletion();
assert.equal(final.choices[0].message.content, answer.content);
assert.ok(final.usage.completion_tokens > 0);

const form = zodResponseFormat(z.object({ date: z.string().max(12), kind: z.enum(["receipt", "page"]) }), "page");
const options = { model: "tiny", messages, response_format: form, n: 2, logprobs: true, top_logprobs: 2 };
const parsed = await client.chat.completions.parse(options);
assert.equal(parsed.choices.length, 2);
assert.ok(["receipt", "page"].includes(parsed.choices[1].message.parsed.kind));
assert.equal(parsed.choices[0].logprobs.content[0].top_logprobs.length, 2);
assert.ok(parsed._request_id);

const { data } = await client.models.list();
assert.equal(data[0].id, "tiny");
await assert.rejects(client.chat.completions.create({ model: "other", messages }), OpenAI.NotFoundError);
const tools = [{ type: "function", function: { name: "f", parameters: {} } }];
await assert.rejects(client.chat.completions.create({ model: "tiny", messages, tools }), /calls no tools/);
