// The last two minutes, drawn from the model's history.

import { HISTORY_S } from "./model.js";

const HEIGHT = 56;

function prepared(canvas, height = HEIGHT) {
  const ratio = devicePixelRatio || 1, width = canvas.clientWidth;
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== height * ratio) {
    canvas.width = Math.round(width * ratio);
    canvas.height = height * ratio;
  }
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  const style = getComputedStyle(canvas);
  const colour = (name) => style.getPropertyValue(name);
  const from = Date.now() - HISTORY_S * 1000;
  return { context, width, height, colour, x: (at) => ((at - from) / (HISTORY_S * 1000)) * width };
}

function frame({ context, width, height, colour }, most) {
  context.strokeStyle = colour("--line");
  context.lineWidth = 1;
  context.beginPath();
  context.moveTo(0, height - 0.5);
  context.lineTo(width, height - 0.5);
  context.stroke();
  if (most) {
    context.fillStyle = colour("--muted");
    context.font = "11px system-ui, sans-serif";
    context.textBaseline = "top";
    context.fillText(most, 2, 1);
  }
}

// A nice number not below `value`.
function roof(value) {
  const power = 10 ** Math.floor(Math.log10(Math.max(value, 1)));
  return [1, 2, 5, 10].map((one) => one * power).find((one) => one >= value);
}

export function lines(canvas, history, series, { most = null, label = (value) => value.toLocaleString("en") } = {}) {
  const place = prepared(canvas);
  const { context, height, colour, x } = place;
  const top = most ?? roof(Math.max(1, ...history.flatMap((one) => series.map(({ of }) => of(one) ?? 0))));
  frame(place, label(top));
  for (const { of, name, filled } of series) {
    const points = history.filter((one) => of(one) !== null).map((one) => [x(one.at), height - 1 - (of(one) / top) * (height - 16)]);
    if (points.length < 2) continue;
    context.beginPath();
    points.forEach(([px, py], at) => (at ? context.lineTo(px, py) : context.moveTo(px, py)));
    context.strokeStyle = colour(name);
    context.lineWidth = 1.5;
    context.lineJoin = "round";
    context.stroke();
    if (filled) {
      context.lineTo(points.at(-1)[0], height - 1);
      context.lineTo(points[0][0], height - 1);
      context.globalAlpha = 0.15;
      context.fillStyle = colour(name);
      context.fill();
      context.globalAlpha = 1;
    }
  }
}

// Swaps are triangles, recomputations crosses, so that colour is not needed to tell them apart.
export function marks(canvas, preemptions) {
  const place = prepared(canvas, 32);
  const { context, colour, x } = place;
  frame(place, "");
  for (const { at, mode } of preemptions) {
    const px = x(at), py = mode === "swap" ? 11 : 22;
    context.strokeStyle = context.fillStyle = colour(mode === "swap" ? "--swap" : "--recompute");
    context.lineWidth = 2;
    context.beginPath();
    if (mode === "swap") {
      context.moveTo(px, py - 5);
      context.lineTo(px + 5, py + 4);
      context.lineTo(px - 5, py + 4);
      context.fill();
    } else {
      context.moveTo(px - 4, py - 4);
      context.lineTo(px + 4, py + 4);
      context.moveTo(px + 4, py - 4);
      context.lineTo(px - 4, py + 4);
      context.stroke();
    }
  }
}
