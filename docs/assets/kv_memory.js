/* How many sequences fit: the arithmetic of worker/kv_pool.py and kernels/kv_layout.py, and the form of memory.md.
   A test runs the functions beside the Python ones. */
"use strict";

const GIB = 2 ** 30;

/** Bytes of one block over all layers: keys and values. */
function blockBytes({ layers, kvHeads, headSize, dtypeBytes, blockSize }) {
  return layers * 2 * kvHeads * headSize * dtypeBytes * blockSize;
}

/** Blocks that hold `tokens` tokens of one sequence. */
function blocksFor(tokens, blockSize) {
  return Math.ceil(tokens / blockSize);
}

/** Bytes that KV blocks may take. `free`: bytes left after loading; `reserved`: bytes that steps need. */
function allowedBytes({ device, free, utilization, reserved }) {
  return device === "cpu" ? Math.min(free * 0.25, 16 * GIB) : Math.max(0, free * utilization - reserved);
}

/** Blocks of the pool that a worker takes by itself, or null where not even one sequence of the full context fits. */
function poolBlocks(model, { maxModelLen, maxNumSeqs }, memory) {
  const oneSequence = blocksFor(maxModelLen, model.blockSize);
  const fitting = Math.floor(Math.trunc(allowedBytes(memory)) / blockBytes(model));
  const blocks = Math.min(fitting, oneSequence * maxNumSeqs);
  return blocks < oneSequence ? null : blocks;
}

/** What a pool of `blocks` blocks means for sequences of `tokens` tokens. */
function fit(blocks, { blockSize }, { maxModelLen, maxNumSeqs }, tokens) {
  const each = blocksFor(tokens, blockSize);
  return {
    blocksEach: each,
    sequences: Math.min(maxNumSeqs, Math.floor(blocks / each)),
    // Slots of the last block that hold no token, over the slots of the sequence.
    waste: 1 - tokens / (each * blockSize),
    // The same memory cut into one piece of the full context per sequence.
    contiguous: Math.min(maxNumSeqs, Math.floor((blocks * blockSize) / maxModelLen)),
    contiguousWaste: 1 - tokens / maxModelLen,
  };
}

if (typeof module !== "undefined") {
  module.exports = { GIB, allowedBytes, blockBytes, blocksFor, fit, poolBlocks };
} else {
  document.addEventListener("DOMContentLoaded", () => {
    const form = document.getElementById("kv-calculator");
    if (form) startCalculator(form);
  });
}

/** Keeps the output of the form up to date. */
function startCalculator(form) {
  const number = (name) => Number(form.elements[name].value);
  const out = (name, text) => { form.querySelector(`[data-out="${name}"]`).textContent = text; };
  const count = (value) => value.toLocaleString("en");
  const percent = (value) => `${(100 * value).toFixed(1)} %`;
  const size = (bytes) => {
    const [unit, name] = bytes >= GIB ? [GIB, "GiB"] : bytes >= 2 ** 20 ? [2 ** 20, "MiB"] : [2 ** 10, "KiB"];
    return `${Number((bytes / unit).toFixed(2))} ${name}`;
  };

  function update() {
    const model = {
      layers: number("layers"),
      kvHeads: number("kvHeads"),
      headSize: number("headSize"),
      dtypeBytes: number("dtypeBytes"),
      blockSize: number("blockSize"),
    };
    const limits = { maxModelLen: number("maxModelLen"), maxNumSeqs: number("maxNumSeqs") };
    const device = form.elements.device.value;
    const weights = number("parameters") * 1e9 * model.dtypeBytes;
    const memory = {
      device,
      free: Math.max(0, number("memory") * GIB - weights),
      utilization: number("utilization"),
      reserved: number("reserved") * GIB,
    };
    for (const element of form.querySelectorAll("[data-gpu-only]")) element.hidden = device === "cpu";
    const wrong = [...form.elements].find((element) => element.willValidate && !element.checkValidity());
    const tokens = number("tokens");
    const blocks = wrong ? null : poolBlocks(model, limits, memory);
    form.querySelector("[data-results]").hidden = blocks === null;
    const message = form.querySelector("[data-message]");
    message.hidden = blocks !== null;
    if (wrong) {
      message.textContent = `${wrong.labels[0].textContent.trim()}: ${wrong.validationMessage}`;
      return;
    }
    if (blocks === null) {
      if (memory.free === 0) {
        message.textContent = `The weights alone take ${size(weights)}.`;
        return;
      }
      const needed = blocksFor(limits.maxModelLen, model.blockSize) * blockBytes(model);
      const allowed = allowedBytes(memory);
      message.textContent =
        `Too little memory for one sequence of ${count(limits.maxModelLen)} tokens: it needs ${size(needed)}, KV blocks ` +
        `may take ${size(allowed)}. Lower the context limit (--max-model-len).`;
      return;
    }
    if (tokens > limits.maxModelLen) {
      message.hidden = false;
      message.textContent = "A sequence cannot be longer than the context limit.";
      return;
    }
    const one = fit(blocks, model, limits, tokens);
    out("weights", size(weights));
    out("token", size(blockBytes(model) / model.blockSize));
    out("block", size(blockBytes(model)));
    out("blocks", count(blocks));
    out("pool", `${size(blocks * blockBytes(model))}, ${count(blocks * model.blockSize)} tokens`);
    out("each", count(one.blocksEach));
    out("sequences", count(one.sequences));
    out("waste", percent(one.waste));
    out("contiguous", count(one.contiguous));
    out("contiguousWaste", percent(one.contiguousWaste));
    const full = one.sequences >= limits.maxNumSeqs;
    out("limit", full ? "--max-num-seqs: there is memory for more" : "memory");
  }

  form.elements.preset.addEventListener("change", () => {
    const values = form.elements.preset.selectedOptions[0].dataset;
    for (const [name, value] of Object.entries(values)) form.elements[name].value = value;
    update();
  });
  form.addEventListener("input", update);
  form.addEventListener("submit", (event) => event.preventDefault());
  update();
}
