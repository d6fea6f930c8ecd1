// One memory as a canvas: a cell per block. The canvas is one stop of the tab order; arrow keys move within it.

import { CACHED, FIRST_OWNER, FREE, PINNED } from "./model.js";

const SIZES = [22, 18, 15, 12, 10, 9, 8, 7, 6, 5, 4, 3, 2];
const TALLEST = { kv_pool: 480, host_arena: 150 };
const NAMES = { kv_pool: "GPU memory", host_arena: "Host memory" };
const dark = matchMedia("(prefers-color-scheme: dark)");

// A request's colour: the golden angle keeps neighbours apart.
const hues = new Map();
let nextHue = 0;
export function hueOf(requestId) {
  if (!hues.has(requestId)) {
    if (hues.size > 5000) hues.clear();
    hues.set(requestId, (210 + 137.508 * nextHue++) % 360);
  }
  return hues.get(requestId);
}

export function colourOf(requestId, index = 0) {
  const light = (dark.matches ? 58 : 50) + ((index * 7) % 21) - (index ? 7 : 0);
  return `hsl(${hueOf(requestId).toFixed(1)} ${dark.matches ? 55 : 60}% ${light}%)`;
}

export class BlockMap {
  // tell(text) says what the pointed or focused block is; choose(requestId | null) selects a request.
  constructor(pool, model, tell, choose) {
    this.pool = pool;
    this.model = model;
    this.tell = tell;
    this.choose = choose;
    this.focus = 0;
    this.chosen = null;
    this.element = document.createElement("article");
    this.element.className = "pool";
    this.element.innerHTML = "<h3></h3><p class='figures'></p><div class='canvas'><canvas></canvas><div class='cursor' hidden></div></div>";
    const title = this.element.querySelector("h3");
    title.textContent = `${NAMES[pool.memory]} of ${pool.workerId}`;
    this.figures = this.element.querySelector(".figures");
    this.canvas = this.element.querySelector("canvas");
    this.cursor = this.element.querySelector(".cursor");
    this.context = this.canvas.getContext("2d");
    Object.assign(this.canvas, { tabIndex: 0 });
    this.canvas.setAttribute("role", "application");
    this.canvas.setAttribute("aria-roledescription", "block map");
    this.canvas.setAttribute("aria-describedby", "block");
    this.canvas.addEventListener("keydown", (event) => this.#key(event));
    this.canvas.addEventListener("focus", () => this.#show(this.focus, true));
    this.canvas.addEventListener("blur", () => (this.cursor.hidden = true));
    this.canvas.addEventListener("pointermove", (event) => this.#point(event));
    this.canvas.addEventListener("pointerleave", () => {
      if (document.activeElement === this.canvas) this.#show(this.focus, true);
      else this.cursor.hidden = true;
    });
    this.canvas.addEventListener("click", (event) => {
      const block = this.#blockAt(event);
      if (block !== null) {
        this.focus = block;
        this.#choose();
      }
    });
    this.resizing = new ResizeObserver(() => this.layout());
    this.resizing.observe(this.element);
    this.summarise();
  }

  close() {
    this.resizing.disconnect();
    this.element.remove();
  }

  // The largest cells with which the pool is no taller than it may be.
  layout() {
    const width = Math.floor(this.element.clientWidth);
    if (!width) return;
    const rowsOf = (size) => Math.ceil(this.pool.size / Math.floor(width / size));
    const size = SIZES.find((one) => rowsOf(one) * one <= TALLEST[this.pool.memory]) ?? SIZES.at(-1);
    const columns = Math.floor(width / size);
    const height = Math.ceil(this.pool.size / columns) * size;
    const ratio = devicePixelRatio || 1;
    Object.assign(this, { size, columns, ratio });
    this.canvas.width = columns * size * ratio;
    this.canvas.height = height * ratio;
    this.canvas.style.width = `${columns * size}px`;
    this.canvas.style.height = `${height}px`;
    this.draw();
  }

  draw() {
    if (!this.columns) return;
    const style = getComputedStyle(this.element);
    this.plain = {
      [FREE]: style.getPropertyValue("--free"),
      [CACHED]: style.getPropertyValue("--cached"),
      [PINNED]: style.getPropertyValue("--pinned"),
    };
    this.mark = style.getPropertyValue("--mark");
    this.colours = new Map();
    this.context.setTransform(this.ratio, 0, 0, this.ratio, 0, 0);
    this.context.clearRect(0, 0, this.canvas.width, this.canvas.height);
    this.drawBlocks(0, this.pool.size);
  }

  #colour(owner) {
    if (owner < FIRST_OWNER) return this.plain[owner];
    let colour = this.colours.get(owner);
    if (colour === undefined) {
      const sequence = this.model.owners.get(owner);
      colour = sequence ? colourOf(sequence.requestId, sequence.index) : this.plain[CACHED];
      if (this.colours.size > 5000) this.colours.clear();
      this.colours.set(owner, colour);
    }
    return colour;
  }

  drawBlocks(first, end) {
    if (!this.columns) return;
    const { context, size, columns, pool } = this;
    const side = size > 4 ? size - 1 : size > 2 ? size - 0.5 : size;
    for (let block = first; block < end; block++) {
      const owner = pool.owners[block];
      const x = (block % columns) * size, y = Math.floor(block / columns) * size;
      context.clearRect(x, y, size, size);
      context.globalAlpha = this.chosen && owner >= FIRST_OWNER && this.model.owners.get(owner)?.requestId !== this.chosen ? 0.22 : 1;
      context.fillStyle = this.#colour(owner);
      context.fillRect(x, y, side, side);
      const count = pool.references[block];
      if (count > 1) {
        const mark = size >= 15 ? side - 4 : Math.max(1, Math.round(size / 3));
        const left = x + (side - mark) / 2, top = y + (side - mark) / 2;
        if (size >= 15) {
          // White on a dark ground: readable on every hue.
          context.fillStyle = "rgb(0 0 0 / 0.6)";
          context.fillRect(left, top, mark, mark);
          context.fillStyle = this.mark;
          context.font = `600 ${mark - 3}px system-ui, sans-serif`;
          context.textAlign = "center";
          context.textBaseline = "middle";
          context.fillText(count > 9 ? "+" : count, x + side / 2, y + side / 2 + 0.5);
        } else {
          context.fillStyle = this.mark;
          context.fillRect(left, top, mark, mark);
        }
      }
    }
    context.globalAlpha = 1;
  }

  changed() {
    this.summarise();
    if (!this.cursor.hidden && this.shown !== undefined) this.tell(this.describe(this.shown));
  }

  summarise() {
    const counts = this.pool.count();
    const text = (number) => number.toLocaleString("en");
    const parts = [`${text(counts.used)} of ${text(this.pool.size)} used`];
    if (counts.shared) parts.push(`${text(counts.shared)} shared`);
    if (counts.cached || counts.pinned) parts.push(`${text(counts.cached + counts.pinned)} cached`);
    parts.push(`${text(counts.free)} free`);
    this.figures.textContent = parts.join(" · ");
    this.canvas.setAttribute("aria-label", `${NAMES[this.pool.memory]} of ${this.pool.workerId}: ${parts.join(", ")}`);
  }

  choosing(requestId) {
    if (requestId === this.chosen) return;
    this.chosen = requestId;
    this.draw();
  }

  describe(block) {
    const owner = this.pool.owners[block], count = this.pool.references[block];
    const name = `Block ${block.toLocaleString("en")}`;
    if (owner === FREE) return `${name}: free`;
    if (owner === CACHED) return `${name}: cached, can be taken when needed`;
    if (owner === PINNED) return `${name}: cached and pinned`;
    const sequence = this.model.owners.get(owner);
    const where = this.pool.memory === "host_arena" ? ", swapped out" : "";
    const sharing = count > 1 ? `, shared by ${count} sequences` : "";
    return `${name}: ${sequence?.requestId ?? "?"}, sequence ${sequence?.index ?? "?"}${sharing}${where}`;
  }

  #blockAt(event) {
    const box = this.canvas.getBoundingClientRect();
    const column = Math.floor((event.clientX - box.left) / this.size), row = Math.floor((event.clientY - box.top) / this.size);
    const block = row * this.columns + column;
    return column >= 0 && column < this.columns && block >= 0 && block < this.pool.size ? block : null;
  }

  #point(event) {
    const block = this.#blockAt(event);
    if (block !== null) this.#show(block, false);
  }

  #show(block, scroll) {
    this.shown = block;
    const side = Math.max(this.size, 6);
    const x = (block % this.columns) * this.size, y = Math.floor(block / this.columns) * this.size;
    Object.assign(this.cursor.style, { left: `${x}px`, top: `${y}px`, width: `${side}px`, height: `${side}px` });
    this.cursor.hidden = false;
    if (scroll) this.cursor.scrollIntoView({ block: "nearest", inline: "nearest" });
    this.tell(this.describe(block));
  }

  #choose() {
    const owner = this.pool.owners[this.focus];
    this.choose(owner >= FIRST_OWNER ? this.model.owners.get(owner)?.requestId ?? null : null);
  }

  // The next block with another owner, that way.
  #edge(step) {
    const { owners } = this.pool;
    let block = this.focus;
    while (block + step >= 0 && block + step < owners.length && owners[block + step] === owners[this.focus]) block += step;
    return block + step;
  }

  #key(event) {
    const jump = event.ctrlKey || event.altKey;
    const moves = {
      ArrowLeft: () => (jump ? this.#edge(-1) : this.focus - 1),
      ArrowRight: () => (jump ? this.#edge(1) : this.focus + 1),
      ArrowUp: () => this.focus - this.columns,
      ArrowDown: () => this.focus + this.columns,
      PageUp: () => this.focus - 10 * this.columns,
      PageDown: () => this.focus + 10 * this.columns,
      Home: () => 0,
      End: () => this.pool.size - 1,
    };
    if (event.key === "Enter" || event.key === " ") this.#choose();
    else if (event.key === "Escape") this.choose(null);
    else if (moves[event.key]) {
      const block = moves[event.key]();
      if (block >= 0 && block < this.pool.size) this.focus = block;
      this.#show(this.focus, true);
    } else return;
    event.preventDefault();
  }
}

dark.addEventListener("change", () => dispatchEvent(new Event("theme")));
