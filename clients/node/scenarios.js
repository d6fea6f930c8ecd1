// Runs the scenarios of clients/scenarios.json: node scenarios.js ../scenarios.json service=127.0.0.1:50051
//
// Prints one JSON object per scenario (id, verdict, observed); exits with 1 if one failed.
// @ts-check
'use strict';

const {randomUUID} = require('node:crypto');
const fs = require('node:fs');
const {isDeepStrictEqual} = require('node:util');
const {Client, Progress, ServiceError} = require('./pagewire.js');

/** @typedef {Record<string, any>} Json */

/**
 * The scenario's request (proto3 JSON), under an id that no other run uses.
 * @param {Json} scenario
 */
function requestOf(scenario) {
  const request = structuredClone(scenario.request);
  if (request.sampling?.temperature === 'NaN') request.sampling.temperature = NaN; // proto3 JSON's spelling
  return {...request, request_id: `${scenario.id}-${randomUUID()}`};
}

/** Gathers responses into what a scenario observes, and checks that there is no gap and no repeat. */
class Collector {
  /** @param {Json} request */
  constructor(request) {
    this.progress = new Progress(request.sampling?.n || 1);
    /** @type {Json[]} */
    this.sequences = [];
    this.promptTokens = 0;
  }

  /**
   * Reads to the end, or until the first sequence has `afterTokens` tokens.
   * @param {AsyncIterable<import('./pagewire.js').GenerateResponse>} responses
   */
  async take(responses, afterTokens = 0) {
    for await (const response of responses) {
      if (response.prompt) this.promptTokens = response.prompt.prompt_tokens;
      if (!this.progress.accept(response)) continue;
      const sequence = (this.sequences[response.index] ??= {token_ids: [], text: '', finish: ''});
      sequence.token_ids.push(...response.token_ids);
      sequence.text += response.text;
      if (response.finish) sequence.finish = response.finish.reason;
      if (afterTokens && (this.progress.positions.get(0) ?? 0) >= afterTokens) return;
    }
  }

  observed() {
    const indices = Object.keys(this.sequences).map(Number);
    return {code: 'OK', prompt_tokens: this.promptTokens, indices, sequences: this.sequences};
  }
}

/** @type {Record<string, (client: Client, scenario: Json) => Promise<Json>>} */
const ACTIONS = {
  async list_models(client) {
    const models = await client.listModels();
    return {
      models: models.map((/** @type {Json} */ {name, ready, max_model_len, vocab_size}) => ({
        name, ready, max_model_len, vocab_size,
      })),
    };
  },

  async tokenize(client, {text}) {
    const tokenIds = await client.tokenize(text);
    return {token_ids: tokenIds, text: await client.detokenize(tokenIds)};
  },

  async generate(client, scenario) {
    const request = requestOf(scenario);
    const collector = new Collector(request);
    await collector.take(client.generate(request, {timeoutMs: scenario.timeout_ms}));
    return collector.observed();
  },

  async repeat(client, scenario) {
    const first = await ACTIONS.generate(client, scenario);
    const second = await ACTIONS.generate(client, scenario);
    return {...first, equal: isDeepStrictEqual(first.sequences, second.sequences)};
  },

  async cancel(client, scenario) {
    const request = requestOf(scenario);
    const collector = new Collector(request);
    const call = client.generate(request);
    await collector.take(call, scenario.after_tokens);
    const found = await client.cancel(request.request_id);
    await collector.take(call);
    return {found, finish: collector.sequences[0].finish, found_again: await client.cancel(request.request_id)};
  },

  async drop(client, scenario) {
    const request = requestOf(scenario);
    const collector = new Collector(request);
    const call = client.generate(request);
    await collector.take(call, scenario.after_tokens);
    call.drop();
    await client.listModels(); // once it is answered, the drop has arrived too: an Attach would keep the request alive
    await collector.take(client.attach(request.request_id, collector.progress.positions));
    return {finish: collector.sequences[0].finish};
  },

  async duplicate(client, scenario) {
    const request = requestOf(scenario);
    const call = client.generate(request);
    await new Collector(request).take(call, scenario.after_tokens);
    try {
      await new Collector(request).take(client.generate(request));
      return {code: 'OK'};
    } finally {
      call.drop();
    }
  },

  async attach(client, scenario) {
    const request = requestOf(scenario);
    const collector = new Collector(request);
    const call = client.generate(request, {detached: true});
    await collector.take(call, scenario.after_tokens);
    call.drop();
    await collector.take(client.attach(request.request_id, collector.progress.positions));
    const again = new Collector(request);
    await again.take(client.attach(request.request_id));
    return {...collector.observed(), whole_again: isDeepStrictEqual(again.sequences, collector.sequences)};
  },

  async attach_unknown(client) {
    await new Collector({}).take(client.attach(`nobody-${randomUUID()}`));
    return {code: 'OK'};
  },

  async resume(client, scenario) {
    const request = requestOf(scenario);
    const collector = new Collector(request);
    let breaks = 0;
    client.onBreak = () => (breaks += 1);
    await collector.take(client.stream(request));
    return {...collector.observed(), resumed: breaks > 0};
  },

  async leave(client, scenario) {
    const request = requestOf(scenario);
    const collector = new Collector(request);
    await collector.take(client.stream(request), scenario.after_tokens); // leaving the loop closes the generator
    await collector.take(client.attach(request.request_id, collector.progress.positions));
    return {finish: collector.sequences[0].finish};
  },
};

/**
 * What the action shows; an error with its details is an observation too.
 * @param {Client} client
 * @param {Json} scenario
 * @returns {Promise<Json>}
 */
async function observe(client, scenario) {
  try {
    return await ACTIONS[scenario.action](client, scenario);
  } catch (error) {
    if (!(error instanceof ServiceError)) throw error;
    const fields = error.violations.map(({field}) => field);
    return {code: error.code, reason: error.reason, fields, retry: error.retryAfterMs !== null};
  }
}

async function main() {
  const [file, ...pairs] = process.argv.slice(2);
  const addresses = Object.fromEntries(pairs.map((pair) => pair.split('=')));
  /** @type {Record<string, Json>} */
  const earlier = {};
  for (const scenario of JSON.parse(fs.readFileSync(file, 'utf8')).scenarios) {
    const address = addresses[scenario.at ?? 'service'];
    if (address === undefined) {
      console.log(JSON.stringify({id: scenario.id, verdict: 'skipped', observed: {}}));
      continue;
    }
    const client = new Client(address);
    const observed = await observe(client, scenario);
    client.close();
    earlier[scenario.id] = observed;
    let good = Object.entries(scenario.expect).every(([key, value]) => isDeepStrictEqual(observed[key], value));
    const same = scenario.same_sequences_as;
    if (same) good &&= isDeepStrictEqual(observed.sequences, earlier[same].sequences);
    if (!good) process.exitCode = 1;
    console.log(JSON.stringify({id: scenario.id, verdict: good ? 'pass' : 'fail', observed}));
  }
}

main();
