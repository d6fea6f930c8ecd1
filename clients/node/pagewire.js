// A client of pagewire.v1.InferenceService made from its protocol alone: @grpc/grpc-js and the .proto files.
//
//   const client = new Client('127.0.0.1:50051');
//   for await (const response of client.stream({text: 'The function returns', stop: {max_tokens: 64}})) {
//     process.stdout.write(response.text);
//   }
//
// generate and attach are the calls as they are. stream adds what gRPC does not do: it goes on after a broken connection,
// without a gap and without a repeat.
// @ts-check
'use strict';

const {randomUUID} = require('node:crypto');
const path = require('node:path');
const {setTimeout: sleep} = require('node:timers/promises');
const grpc = require('@grpc/grpc-js');
const protoLoader = require('@grpc/proto-loader');

/**
 * Messages are plain objects with the names of the .proto file; 64-bit numbers and enum values are strings.
 * @typedef {{index: number, first_token: number, token_ids: number[], text: string, prompt: {prompt_tokens: number,
 *   cached_tokens: number} | null, finish: {reason: string, usage: Record<string, any>} | null}} GenerateResponse
 * @typedef {Record<string, any>} GenerateRequest
 */

const REPOSITORY = path.resolve(process.env.PAGEWIRE_ROOT ?? path.join(__dirname, '..', '..'));
const definition = protoLoader.loadSync(
  ['pagewire/v1/inference.proto', 'google/rpc/status.proto', 'google/rpc/error_details.proto'],
  {
    includeDirs: [path.join(REPOSITORY, 'protos'), path.join(REPOSITORY, 'clients', 'protos')],
    keepCase: true,
    longs: String,
    enums: String,
    defaults: true,
    oneofs: true,
  },
);
/** @type {any} */
const {InferenceService} = /** @type {any} */ (grpc.loadPackageDefinition(definition)).pagewire.v1;

const FIRST_DELAY_MS = 50;
const LONGEST_DELAY_MS = 2000;

/** A call's status with its details. */
class ServiceError extends Error {
  /**
   * @param {string} code name of the gRPC status code, such as INVALID_ARGUMENT
   * @param {string} message
   */
  constructor(code, message) {
    super(message);
    this.name = 'ServiceError';
    this.code = code;
    /** ErrorInfo.reason, one of docs/errors.md; empty where no server answered. */
    this.reason = '';
    /** @type {{field: string, description: string}[]} the wrong fields, from BadRequest */
    this.violations = [];
    /** @type {number | null} from RetryInfo; null: a retry does not help */
    this.retryAfterMs = null;
  }
}

/**
 * Decodes one message of the loaded .proto files.
 * @param {string} type
 * @param {Buffer} bytes
 * @returns {any}
 */
function decode(type, bytes) {
  return /** @type {any} */ (definition[type]).deserialize(bytes);
}

/**
 * Reads the details out of grpc-status-details-bin, a serialized google.rpc.Status.
 * @param {any} error what grpc-js gives
 */
function serviceError(error) {
  if (!(error instanceof Error) || typeof (/** @type {any} */ (error).code) !== 'number') return error;
  const {code, details, metadata} = /** @type {grpc.ServiceError} */ (error);
  const result = new ServiceError(grpc.status[code], details);
  const [bytes] = metadata?.get('grpc-status-details-bin') ?? [];
  if (!Buffer.isBuffer(bytes)) return result;
  for (const detail of decode('google.rpc.Status', bytes).details) {
    const type = detail.type_url.split('/').pop();
    if (type === 'google.rpc.ErrorInfo') {
      result.reason = decode(type, detail.value).reason;
    } else if (type === 'google.rpc.BadRequest') {
      result.violations = decode(type, detail.value).field_violations;
    } else if (type === 'google.rpc.RetryInfo') {
      const delay = decode(type, detail.value).retry_delay;
      result.retryAfterMs = Number(delay.seconds) * 1000 + delay.nanos / 1e6;
    }
  }
  return result;
}

/** The responses of one Generate or Attach call. Leaving before the end must drop it. */
class Stream {
  /** @param {grpc.ClientReadableStream<GenerateResponse>} call */
  constructor(call) {
    this.call = call;
    this.responses = call[Symbol.asyncIterator]();
  }

  /**
   * Leaving a loop over it does not end the call: a later loop goes on where that one left.
   * @returns {AsyncIterator<GenerateResponse>}
   */
  [Symbol.asyncIterator]() {
    return {
      next: () =>
        this.responses.next().catch((error) => {
          throw serviceError(error);
        }),
    };
  }

  /** Ends the call at once. The server cancels the request unless it was opened detached. */
  drop() {
    this.call.cancel();
  }
}

/** What has arrived of a request's sequences. `positions` is what Attach needs to go on. */
class Progress {
  /** @param {number} sequences */
  constructor(sequences) {
    this.sequences = sequences;
    /** @type {Map<number, number>} first token wanted, by index */
    this.positions = new Map();
    /** @type {Set<number>} */
    this.finished = new Set();
  }

  get done() {
    return this.finished.size === this.sequences;
  }

  /**
   * Takes a response. False: it only repeats the end of a sequence that had finished before a break.
   * @param {GenerateResponse} response
   */
  accept(response) {
    if (this.finished.has(response.index)) return false;
    const expected = this.positions.get(response.index) ?? 0;
    if (response.first_token !== expected) {
      throw new Error(`sequence ${response.index}: token ${response.first_token} instead of ${expected}`);
    }
    this.positions.set(response.index, expected + response.token_ids.length);
    if (response.finish) this.finished.add(response.index);
    return true;
  }
}

/** One channel to a gateway. */
class Client {
  /** @param {string} address host:port of a gateway, plaintext */
  constructor(address) {
    this.stub = new InferenceService(address, grpc.credentials.createInsecure());
    /** @type {((error: ServiceError) => void) | null} called by stream before it tries to go on after a break */
    this.onBreak = null;
  }

  close() {
    this.stub.close();
  }

  /**
   * @param {string} method
   * @param {object} request
   * @returns {Promise<any>} rejects with ServiceError, as every call does
   */
  unary(method, request) {
    return new Promise((resolve, reject) => {
      this.stub[method](request, (/** @type {any} */ error, /** @type {any} */ response) =>
        error ? reject(serviceError(error)) : resolve(response),
      );
    });
  }

  /** What is served. */
  async listModels() {
    return (await this.unary('ListModels', {})).models;
  }

  /**
   * Token ids of a text.
   * @param {string} text
   * @returns {Promise<number[]>}
   */
  async tokenize(text) {
    return (await this.unary('Tokenize', {text})).token_ids;
  }

  /**
   * Text of token ids.
   * @param {number[]} tokenIds
   * @returns {Promise<string>}
   */
  async detokenize(tokenIds) {
    return (await this.unary('Detokenize', {token_ids: tokenIds})).text;
  }

  /**
   * Ends a request by name. Resolves to whether it was live.
   * @param {string} requestId
   * @returns {Promise<boolean>}
   */
  async cancel(requestId) {
    return (await this.unary('Cancel', {request_id: requestId})).found;
  }

  /**
   * Starts a request.
   * @param {GenerateRequest} request
   * @param {{timeoutMs?: number, detached?: boolean}} options the call's deadline, from now; whether the request lives on
   *   when the stream is dropped (it is not bound to the deadline then)
   */
  generate(request, {timeoutMs, detached = false} = {}) {
    const metadata = new grpc.Metadata();
    if (detached) metadata.set('pagewire-detach', 'true');
    const options = timeoutMs === undefined ? {} : {deadline: Date.now() + timeoutMs};
    return new Stream(this.stub.Generate(request, metadata, options));
  }

  /**
   * Continues a request's stream.
   * @param {string} requestId
   * @param {Map<number, number>} positions first token wanted, by index; an index not named: from token 0
   */
  attach(requestId, positions = new Map()) {
    const wanted = [...positions].map(([index, first]) => ({index, first_token: first}));
    return new Stream(this.stub.Attach({request_id: requestId, positions: wanted}));
  }

  /**
   * Generate that survives broken connections. Leaving the loop early cancels the request.
   *
   * The request is opened detached under an id of its own. After UNAVAILABLE, Attach asks for the first tokens that have
   * not arrived.
   * @param {GenerateRequest} request
   * @param {{resumeMs?: number}} options how long to try without any progress
   * @returns {AsyncGenerator<GenerateResponse>}
   */
  async *stream(request, {resumeMs = 30_000} = {}) {
    const opened = {...request, request_id: request.request_id || randomUUID()};
    const progress = new Progress(request.sampling?.n || 1);
    let attaching = false;
    let retrying = false;
    let delay = FIRST_DELAY_MS;
    let since = performance.now();
    /** @type {Stream | null} */
    let call = null;
    try {
      while (!progress.done) {
        call = attaching
          ? this.attach(opened.request_id, progress.positions)
          : this.generate(opened, {detached: true});
        try {
          for await (const response of call) {
            delay = FIRST_DELAY_MS;
            since = performance.now();
            if (progress.accept(response)) yield response;
          }
          if (!progress.done) throw new ServiceError('UNAVAILABLE', 'the stream ended before its last token');
        } catch (/** @type {any} */ error) {
          if (progress.done && error.code === 'UNAVAILABLE') return; // nothing is missing
          attaching = attachNext(error, {attaching, retrying, arrived: progress.positions.size > 0});
          retrying = true;
          if (performance.now() - since > resumeMs) throw error;
          this.onBreak?.(error);
          await sleep(Math.max(delay, error.retryAfterMs ?? 0));
          delay = Math.min(2 * delay, LONGEST_DELAY_MS);
        }
      }
    } finally {
      if (call && !progress.done) {
        call.drop();
        await this.cancel(opened.request_id).catch(() => {}); // if nobody answers, nobody is there to cancel it either
      }
    }
  }
}

/**
 * What follows a call of `stream` that failed: Attach (true) or Generate (false). Throws the error if neither helps.
 * @param {any} error
 * @param {{attaching: boolean, retrying: boolean, arrived: boolean}} state the failed call was Attach; a call had failed
 *   before it, so the server may know the request already; some tokens have arrived
 */
function attachNext(error, {attaching, retrying, arrived}) {
  if (error.code === 'UNAVAILABLE' && (retrying || arrived || !error.reason)) return true;
  if (error.reason === 'SLOW_CONSUMER') return true;
  if (error.code === 'ALREADY_EXISTS' && retrying) return true; // the first Generate had reached the server after all
  if (error.code === 'NOT_FOUND' && attaching && !arrived) return false; // it had not
  throw error;
}

module.exports = {Client, Progress, ServiceError, Stream};
