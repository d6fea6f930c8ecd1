// What the page knows: the blocks as the events told them, and rates over the last seconds.

export const FREE = 0, CACHED = 1, PINNED = 2, FIRST_OWNER = 16;
const WINDOW_NS = 2e9;
export const HISTORY_S = 120;

export class Pool {
  constructor(workerId, memory, totalBlocks) {
    this.workerId = workerId;
    this.memory = memory;
    this.owners = new Uint32Array(totalBlocks);
    this.references = new Uint32Array(totalBlocks);
  }

  get size() {
    return this.owners.length;
  }

  // Applies a change; calls touched(first, end) for each run.
  apply(change, touched) {
    let end = 0;
    for (let run = 0; run < change.lengths.length; run++) {
      const first = end + change.skips[run];
      end = first + change.lengths[run];
      this.owners.fill(change.owners[run], first, end);
      this.references.fill(change.references[run], first, end);
      touched(first, end);
    }
  }

  count() {
    const counts = { free: 0, cached: 0, pinned: 0, used: 0, shared: 0 };
    for (let block = 0; block < this.size; block++) {
      const owner = this.owners[block];
      if (owner === FREE) counts.free++;
      else if (owner === CACHED) counts.cached++;
      else if (owner === PINNED) counts.pinned++;
      else {
        counts.used++;
        if (this.references[block] > 1) counts.shared++;
      }
    }
    return counts;
  }
}

// A counter's rate over the last two seconds.
class Rate {
  constructor() {
    this.samples = [];
  }

  add(ns, value) {
    const { samples } = this;
    const last = samples.at(-1);
    if (last && (value < last[1] || ns <= last[0])) samples.length = 0;
    samples.push([ns, value]);
    while (samples.length > 2 && samples[1][0] <= ns - WINDOW_NS) samples.shift();
  }

  // Per second; 0 until there are two samples.
  get perSecond() {
    const first = this.samples[0], last = this.samples.at(-1);
    return this.samples.length < 2 ? 0 : ((last[1] - first[1]) * 1e9) / (last[0] - first[0]);
  }
}

class Rates {
  constructor() {
    this.byName = new Map();
  }

  update(ns, values) {
    for (const name of this.byName.keys()) if (!values.has(name)) this.byName.delete(name);
    for (const [name, value] of values) {
      if (!this.byName.has(name)) this.byName.set(name, new Rate());
      this.byName.get(name).add(ns, value);
    }
  }

  of(name) {
    return this.byName.get(name)?.perSecond ?? 0;
  }

  get sum() {
    return [...this.byName.values()].reduce((sum, rate) => sum + rate.perSecond, 0);
  }
}

export class Model {
  constructor() {
    this.pools = new Map();
    this.owners = new Map();
    this.workers = [];
    this.requests = [];
    this.outputRates = new Rates();
    this.tokenRates = new Rates();
    this.busyRates = new Rates();
    this.preempted = new Map();
    this.history = [];
    this.preemptions = [];
  }

  // Applies an event's content; calls changed(pool, first, end) for each run of a pool that was there before.
  apply(message, changed) {
    if (message.snapshot) {
      this.pools.clear();
      this.owners.clear();
    }
    for (const worker of message.gone_workers) {
      for (const [name, pool] of this.pools) if (pool.workerId === worker) this.pools.delete(name);
    }
    for (const [number, requestId, index] of message.owners) this.owners.set(number, { requestId, index });
    for (const change of message.pools) {
      const name = `${change.worker_id}\n${change.memory}`;
      if (change.total_blocks !== undefined) {
        this.pools.set(name, new Pool(change.worker_id, change.memory, change.total_blocks));
      }
      const pool = this.pools.get(name);
      if (change.total_blocks !== undefined) {
        pool.apply(change, () => {});
      } else {
        pool.apply(change, (first, end) => changed(pool, first, end));
      }
    }
    for (const number of message.ended_owners) this.owners.delete(number);
    this.#note(message);
  }

  #note(message) {
    const ns = message.now_ns;
    Object.assign(this, {
      workers: message.workers,
      requests: message.requests,
      liveRequests: message.live_requests,
      unassigned: message.unassigned_requests,
      draining: message.draining,
    });
    const life = (worker) => `${worker.worker_id} ${worker.epoch}`;
    this.outputRates.update(ns, new Map(message.requests.map((one) => [one.request_id, one.output_tokens])));
    this.tokenRates.update(ns, new Map(message.workers.map((one) => [life(one), one.generation_tokens])));
    this.busyRates.update(ns, new Map(message.workers.map((one) => [life(one), one.busy_ns])));
    const at = Date.now();
    for (const worker of message.workers) {
      const before = this.preempted.get(life(worker));
      for (const mode of ["swap", "recompute"]) {
        const count = worker[`preemptions_${mode}`] - (before?.[mode] ?? worker[`preemptions_${mode}`]);
        if (count > 0) this.preemptions.push({ at, mode, count, workerId: worker.worker_id });
      }
      this.preempted.set(life(worker), { swap: worker.preemptions_swap, recompute: worker.preemptions_recompute });
    }
    this.history.push({ at, rate: this.tokenRate, running: this.running, waiting: this.waiting, idle: this.idle });
    const old = at - HISTORY_S * 1000;
    while (this.history[0].at < old) this.history.shift();
    while (this.preemptions.length && this.preemptions[0].at < old) this.preemptions.shift();
  }

  #sum(field) {
    return this.workers.reduce((sum, worker) => sum + worker[field], 0);
  }

  get tokenRate() {
    return this.tokenRates.sum;
  }

  get running() {
    return this.#sum("running");
  }

  get waiting() {
    return this.#sum("waiting") + (this.unassigned ?? 0);
  }

  get swapped() {
    return this.#sum("swapped");
  }

  get usedShare() {
    const total = this.#sum("total_blocks");
    return total ? 1 - this.#sum("free_blocks") / total : 0;
  }

  get preemptionsTotal() {
    return this.#sum("preemptions_swap") + this.#sum("preemptions_recompute");
  }

  get hitShare() {
    const queries = this.#sum("prefix_cache_queries");
    return queries ? (this.#sum("prefix_cache_hits") + this.#sum("prefix_cache_host_hits")) / queries : null;
  }

  // Share of the time in which the devices computed and copied nothing, over all workers; null without workers.
  get idle() {
    if (!this.workers.length) return null;
    return Math.min(1, Math.max(0, 1 - this.busyRates.sum / 1e9 / this.workers.length));
  }
}
