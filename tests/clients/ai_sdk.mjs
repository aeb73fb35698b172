// Vercel's AI SDK: image and file parts, stream, abort, a history with reasoning, JSON by schema. BASE and PICTURE are in the environment.
import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, Output, streamText } from "ai";
import { z } from "zod";

const { BASE, PICTURE } = process.env;
const bytes = await readFile(PICTURE);
const url = `data:image/jpeg;base64,${bytes.toString("base64")}`;
const model = createOpenAICompatible({ name: "qzoom", baseURL: BASE }).chatModel("tiny");
const exact = createOpenAICompatible({ name: "qzoom", baseURL: BASE, supportsStructuredOutputs: true }).chatModel("tiny");
const ask = (part) => ({ role: "user", content: [part, { type: "text", text: "What is the date?" }] });
const messages = [ask({ type: "image", image: url })];

const first = await generateText({ model, messages });
assert.ok(first.text);
const file = ask({ type: "file", data: bytes, mediaType: "image/jpeg" });
assert.equal((await generateText({ model, messages: [file] })).text, first.text);

const more = { role: "user", content: "And the total amount?" };
const followed = await generateText({ model, messages: [...messages, ...first.response.messages, more] });
assert.ok(followed.text);
const thought = { role: "assistant", content: [{ type: "reasoning", text: "hm" }, { type: "text", text: first.text }] };
assert.equal((await generateText({ model, messages: [...messages, thought, more] })).text, followed.text);

let text = "";
for await (const piece of streamText({ model, messages }).textStream) text += piece;
assert.equal(text, first.text);
const schema = z.object({ kind: z.enum(["receipt", "page"]), pages: z.array(z.enum(["1", "2"])).max(2) });
const made = await generateText({ model: exact, messages, output: Output.object({ schema }) });
assert.ok(["receipt", "page"].includes(made.output.kind));
const stop = new AbortController();
stop.abort();
await assert.rejects(generateText({ model, messages, abortSignal: stop.signal }), { name: "AbortError" });
