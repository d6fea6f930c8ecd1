// The prompt box: a streamed completion through the OpenAI door.

import { events } from "./events.js";

export class PromptBox {
  // headers() gives the request's headers; refused(error) is told of an API key that is missing.
  constructor(section, headers, refused) {
    this.headers = headers;
    this.refused = refused;
    this.form = section.querySelector("form");
    this.text = section.querySelector("#text");
    this.answer = section.querySelector("#answer");
    this.note = section.querySelector("#answer-note");
    this.sendButton = section.querySelector("#send");
    this.stopButton = section.querySelector("#stop");
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    this.text.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.form.requestSubmit();
    });
    this.stopButton.addEventListener("click", () => this.running?.abort());
  }

  async send() {
    if (this.running) return;
    const running = (this.running = new AbortController());
    this.sendButton.disabled = true;
    this.stopButton.disabled = false;
    this.answer.textContent = "";
    this.note.textContent = "Waiting for the first token…";
    const begun = performance.now();
    let first = null, usage = null, failed = null;
    try {
      const body = {
        model: this.model,
        prompt: this.text.value,
        max_tokens: Number(this.form.querySelector("#max-tokens").value) || 128,
        temperature: Number(this.form.querySelector("#temperature").value) || 0,
        stream: true,
        stream_options: { include_usage: true },
      };
      const stream = events("v1/completions", {
        method: "POST",
        headers: { ...this.headers(), "content-type": "application/json" },
        body: JSON.stringify(body),
        signal: running.signal,
      });
      for await (const { data } of stream) {
        if (data === "[DONE]") break;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new Error(chunk.error.message);
        usage = chunk.usage ?? usage;
        const text = chunk.choices?.[0]?.text;
        if (text) {
          first ??= performance.now();
          this.#append(text);
          if (first !== null) this.note.textContent = "Streaming…";
        }
      }
    } catch (error) {
      failed = error;
    }
    this.running = null;
    this.sendButton.disabled = false;
    this.stopButton.disabled = true;
    if (running.signal.aborted) this.note.textContent = "Stopped.";
    else if (failed) {
      if (failed.status === 401) this.refused(failed);
      this.note.textContent = failed instanceof TypeError ? "The gateway cannot be reached." : failed.message;
    } else this.note.textContent = this.#summary(usage, begun, first ?? performance.now());
  }

  #append(text) {
    const { answer } = this;
    const follows = answer.scrollTop + answer.clientHeight >= answer.scrollHeight - 4;
    answer.append(text);
    if (follows) answer.scrollTop = answer.scrollHeight;
  }

  #summary(usage, begun, first) {
    const tokens = usage?.completion_tokens ?? 0;
    const seconds = (performance.now() - first) / 1000;
    const rate = tokens > 1 && seconds > 0 ? `, ${Math.round((tokens - 1) / seconds)} tokens/s` : "";
    const cached = usage?.prompt_tokens_details?.cached_tokens;
    const prompt = usage ? `${usage.prompt_tokens} prompt tokens${cached ? ` (${cached} cached)` : ""}, ` : "";
    return `${prompt}${tokens} tokens, the first after ${Math.round(first - begun)} ms${rate}`;
  }
}
