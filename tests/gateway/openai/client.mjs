// What an application does with npm's `openai`, printed as JSON. Usage: node client.mjs BASE_URL
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0 });
const model = "tiny";
const messages = [{ role: "user", content: "hello" }];
const said = {};

const completion = await client.completions.create({ model, prompt: "x", max_tokens: 3 });
said.completion = {
  text: completion.choices[0].text,
  finish: completion.choices[0].finish_reason,
  total: completion.usage.total_tokens,
};

said.stream = [];
for await (const chunk of await client.completions.create({ model, prompt: "x", max_tokens: 4, stream: true })) {
  if (chunk.choices[0].text) said.stream.push(chunk.choices[0].text);
}

const chat = await client.chat.completions.create({ model, messages, max_completion_tokens: 2, logprobs: true });
const [choice] = chat.choices;
said.chat = { ...choice.message, token: choice.logprobs.content[0].token };
delete said.chat.refusal;

const stream = client.chat.completions.stream({ model, messages, stream_options: { include_usage: true } });
said.chatStream = { text: "" };
for await (const chunk of stream) {
  said.chatStream.text += chunk.choices[0]?.delta.content ?? "";
  if (chunk.usage) said.chatStream.usage = chunk.usage.completion_tokens;
}

try {
  await client.completions.create({ model, prompt: "x", temperature: 101 });
} catch (error) {
  said.bad = { name: error.constructor.name, status: error.status, param: error.param, code: error.code };
}
try {
  await client.chat.completions.create({ model: "gpt-4", messages });
} catch (error) {
  said.unknown = { name: error.constructor.name, code: error.code };
}

said.models = (await client.models.list()).data.map((entry) => entry.id);
console.log(JSON.stringify(said));
