// The console: keeps the connection, hands events to the model, draws.

import { lines, marks } from "./charts.js";
import { HttpError, events } from "./events.js";
import { BlockMap, colourOf } from "./map.js";
import { Model } from "./model.js";
import { PromptBox } from "./prompt.js";

const RETRY_MS = 1000;
const SILENCE_MS = 8000; // the scheduler says something every second
const find = (selector) => document.querySelector(selector);
const model = new Model();
const maps = new Map();
let chosen = null;

const headers = () => {
  const key = sessionStorage.getItem("pagewire-api-key");
  return key ? { authorization: `Bearer ${key}` } : {};
};

// ---- what is shown

function connection(state, text) {
  const element = find("#connection");
  if (element.dataset.state === state && element.textContent === text) return;
  element.dataset.state = state;
  element.textContent = text;
  document.body.classList.toggle("stale", state === "lost");
}

function choose(requestId) {
  chosen = chosen === requestId ? null : requestId;
  for (const map of maps.values()) map.choosing(chosen);
  drawRequests();
}

function placeMaps() {
  const pools = [...model.pools.values()].filter((pool) => pool.size);
  for (const [pool, map] of maps) {
    if (!pools.includes(pool)) {
      map.close();
      maps.delete(pool);
    }
  }
  const place = find("#maps");
  place.querySelector(".empty").hidden = pools.length > 0;
  for (const pool of pools) {
    if (maps.has(pool)) continue;
    const map = new BlockMap(pool, model, (text) => (find("#block").textContent = text), choose);
    maps.set(pool, map);
    place.append(map.element);
    map.layout();
    map.choosing(chosen);
  }
}

const percent = (share) => `${(share * 100).toFixed(share > 0 && share < 0.1 ? 1 : 0)} %`;
const number = (value) => Math.round(value).toLocaleString("en");

function drawTotals() {
  const tiles = [
    ["Tokens/s", number(model.tokenRate)],
    ["Running", number(model.running)],
    ["Queue", number(model.waiting)],
    ["Swapped", number(model.swapped)],
    ["GPU memory used", percent(model.usedShare)],
    ["GPU idle", model.idle === null ? "–" : percent(model.idle)],
    ["Prefix cache hits", model.hitShare === null ? "–" : percent(model.hitShare)],
    ["Preemptions", number(model.preemptionsTotal)],
  ];
  const list = find("#totals dl");
  if (!list.children.length) {
    for (const [name] of tiles) {
      const tile = document.createElement("div");
      tile.append(document.createElement("dt"), document.createElement("dd"));
      tile.firstChild.textContent = name;
      list.append(tile);
    }
  }
  tiles.forEach(([, value], at) => {
    const place = list.children[at].lastChild;
    if (place.textContent !== value) place.textContent = value;
  });
}

function age(ns) {
  const seconds = ns / 1e9;
  if (seconds < 60) return `${seconds.toFixed(1)} s`;
  const minutes = Math.floor(seconds / 60);
  return minutes < 60 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

const rows = new Map();

// Rows are kept and changed in place, so that focus and selection survive.
function drawRequests() {
  const body = find("#requests tbody");
  const present = new Set();
  let place = 0, queued = 0;
  for (const request of model.requests) {
    const name = request.request_id;
    present.add(name);
    let row = rows.get(name);
    if (!row) {
      row = document.createElement("tr");
      row.innerHTML = "<th scope='row'><button type='button'><span class='swatch'></span><span class='name'></span></button></th><td class='state'></td>" +
        "<td class='number'></td>".repeat(6) + "<td></td>";
      row.querySelector(".name").textContent = name;
      row.querySelector(".swatch").style.background = colourOf(name);
      row.querySelector("button").addEventListener("click", () => choose(name));
      row.querySelector("button").title = name;
      rows.set(name, row);
    }
    const waits = request.state === "waiting";
    if (waits) queued++;
    const button = row.querySelector("button");
    button.setAttribute("aria-pressed", String(name === chosen));
    const cached = request.cached_tokens ? ` (${number(request.cached_tokens)} cached)` : "";
    const sequences = request.sequences > 1 ? ` ×${request.sequences}` : "";
    const texts = [
      (waits ? `waiting, ${queued}.` : request.state) + sequences,
      request.state === "running" ? model.outputRates.of(name).toFixed(1) : "",
      number(request.output_tokens), number(request.prompt_tokens) + cached, number(request.blocks),
      request.preemptions ? number(request.preemptions) : "", age(request.age_ns), request.worker_id,
    ];
    texts.forEach((text, at) => {
      const cell = row.cells[at + 1];
      if (cell.textContent !== text) cell.textContent = text;
    });
    row.cells[1].dataset.state = request.state;
    if (body.children[place] !== row) body.insertBefore(row, body.children[place] ?? null);
    place++;
  }
  for (const [name, row] of rows) {
    if (!present.has(name)) {
      row.remove();
      rows.delete(name);
    }
  }
  if (chosen !== null && !present.has(chosen) && ![...model.owners.values()].some((one) => one.requestId === chosen)) choose(chosen);
  const more = (model.liveRequests ?? 0) - model.requests.length;
  const draining = model.draining ? " The scheduler drains: it takes no new requests." : "";
  find("#requests-note").textContent = (model.requests.length ? (more > 0 ? `and ${number(more)} more` : "") : "None now.") + draining;
}

function drawHistory() {
  lines(find("#rate"), model.history, [{ of: (one) => one.rate, name: "--accent", filled: true }]);
  lines(find("#queue"), model.history, [
    { of: (one) => one.running, name: "--running", filled: true },
    { of: (one) => one.waiting, name: "--waiting" },
  ]);
  lines(find("#idle"), model.history, [{ of: (one) => one.idle, name: "--idle", filled: true }], { most: 1, label: () => "100 %" });
  marks(find("#preemptions"), model.preemptions);
  find("#now-rate").textContent = number(model.tokenRate);
  find("#now-idle").textContent = model.idle === null ? "" : percent(model.idle);
  const list = find("#preemption-list");
  const latest = model.preemptions.slice(-4).reverse().map(({ at, mode, count, workerId }) =>
    `${new Date(at).toLocaleTimeString("en-GB")} ${mode}${count > 1 ? ` ×${count}` : ""} on ${workerId}`);
  if (list.dataset.text !== latest.join()) {
    list.dataset.text = latest.join();
    list.replaceChildren(...latest.map((text) => Object.assign(document.createElement("li"), { textContent: text })));
  }
}

let due = false;

function draw() {
  due = false;
  for (const map of maps.values()) map.changed();
  drawTotals();
  drawRequests();
  drawHistory();
}

function apply(message) {
  model.apply(message, (pool, first, end) => maps.get(pool)?.drawBlocks(first, end));
  placeMaps();
  if (!due) {
    due = true;
    // Not requestAnimationFrame: a page in the background draws none, and would show old figures when it comes back.
    setTimeout(draw, 0);
  }
}

// ---- the connection

async function nameModel() {
  const response = await fetch("v1/models", { headers: headers() });
  const served = response.ok ? (await response.json()).data[0] : null;
  find("#model").textContent = served?.id ?? "";
  prompt.model = served?.id;
}

function askForKey(message) {
  find("#key-form").hidden = false;
  connection("lost", message);
}

async function listen() {
  const control = new AbortController();
  let watchdog = 0;
  const heard = () => {
    clearTimeout(watchdog);
    watchdog = setTimeout(() => control.abort(), SILENCE_MS);
  };
  heard();
  try {
    for await (const { event, data } of events("console/events", { headers: headers(), signal: control.signal })) {
      heard();
      const content = JSON.parse(data);
      if (event === "problem") connection("lost", `${content.message[0].toUpperCase()}${content.message.slice(1)}; trying again…`);
      else {
        if (content.snapshot) await nameModel().catch(() => {});
        find("#key-form").hidden = true;
        apply(content);
        connection("live", "Live");
      }
    }
    connection("lost", "The gateway has closed the connection; trying again…");
  } catch (error) {
    if (error instanceof HttpError && error.status === 401) askForKey(error.message);
    else if (error instanceof HttpError) connection("lost", `${error.message}; trying again…`);
    else connection("lost", "The gateway cannot be reached; trying again…");
  } finally {
    clearTimeout(watchdog);
    control.abort();
  }
}

const pause = () => new Promise((done) => setTimeout(done, RETRY_MS));
const prompt = new PromptBox(find("#prompt"), headers, (error) => askForKey(error.message));

find("#key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("pagewire-api-key", find("#key").value.trim());
  connection("connecting", "Connecting…");
});
addEventListener("theme", () => {
  for (const map of maps.values()) map.draw();
  for (const [name, row] of rows) row.querySelector(".swatch").style.background = colourOf(name);
  drawHistory();
});
addEventListener("resize", drawHistory);
drawTotals();
drawRequests();

async function keepListening() {
  for (;;) {
    await listen();
    await pause();
  }
}

keepListening(); // not awaited: the page has loaded
