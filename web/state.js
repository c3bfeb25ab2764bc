/**
 * The drags of the Drag Points node as plain data: reading and writing the JSON text, edits, hit testing, history.
 *
 * A drag is {from: [x, y], to: [x, y]}, x and y in 0..1 of the picture, y down. Lists of drags are never changed in
 * place. A selection is {index, part}: part "from" or "to" is an end, "both" the whole arrow. No DOM in this file.
 */

const VERSION = 1;
export const EMPTY = '{"version": 1, "drags": []}';

/** The drags of a text, and what is wrong with it if it can't be read. Takes what the node's Python takes. */
export function parse(text) {
  if (!text.trim()) return { drags: [], error: null };
  let value;
  try {
    value = JSON.parse(text);
  } catch {
    return unreadable("they are not JSON");
  }
  if (!Array.isArray(value?.drags)) return unreadable("they have no list of drags");
  if (value.version !== VERSION) return unreadable("their version is not 1");
  const wrong = value.drags.findIndex((drag) => !isPoint(drag?.from) || !isPoint(drag?.to));
  if (wrong >= 0) return unreadable(`drag ${wrong + 1} is not two points of the picture`);
  return { drags: value.drags.map(({ from, to }) => ({ from, to })), error: null };
}

function unreadable(why) {
  return { drags: [], error: `The points can't be shown: ${why}.` };
}

function isPoint(point) {
  return Array.isArray(point) && point.length === 2 && point.every((v) => typeof v === "number" && v >= 0 && v <= 1);
}

/** One line of JSON; a ten thousandth of the picture is less than half a pixel of a 4k one. */
export function serialize(drags) {
  const point = (p) => `[${p.map((v) => Math.round(v * 1e4) / 1e4).join(", ")}]`;
  const items = drags.map(({ from, to }) => `{"from": ${point(from)}, "to": ${point(to)}}`);
  return `{"version": ${VERSION}, "drags": [${items.join(", ")}]}`;
}

const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

export function clampPoint([x, y]) {
  return [clamp(x, 0, 1), clamp(y, 0, 1)];
}

/** A drag without length: an anchor, which says that what is there stays there. */
export function isAnchor({ from, to }) {
  return from[0] === to[0] && from[1] === to[1];
}

export function add(drags, from, to) {
  return [...drags, { from: clampPoint(from), to: clampPoint(to) }];
}

export function remove(drags, index) {
  return drags.filter((_, i) => i !== index);
}

/** A part moved by (dx, dy), kept inside the picture; a whole arrow keeps its shape and stops at the border. */
export function move(drags, { index, part }, [dx, dy]) {
  const { from, to } = drags[index];
  const shifted = ([x, y]) => clampPoint([x + dx, y + dy]);
  let moved;
  if (part === "both") {
    dx = clamp(dx, -Math.min(from[0], to[0]), 1 - Math.max(from[0], to[0]));
    dy = clamp(dy, -Math.min(from[1], to[1]), 1 - Math.max(from[1], to[1]));
    moved = { from: shifted(from), to: shifted(to) };
  } else {
    moved = { from, to, [part]: shifted(part === "from" ? from : to) };
  }
  return drags.map((drag, i) => (i === index ? moved : drag));
}

/**
 * What lies under a point, as a selection, or null: the nearest end within `radius`, else the nearest shaft. Ends of the
 * `selected` arrow come first, so that it can be taken out of a crowd. `at`, `size` (of the picture), `radius` in pixels.
 */
export function hit(drags, at, size, radius, selected = null) {
  const pixels = (p) => [p[0] * size[0], p[1] * size[1]];
  const distance = (a, b) => Math.hypot(a[0] - b[0], a[1] - b[1]);
  const nearest = (candidates, reach) => {
    const near = candidates.filter((c) => c.distance <= reach);
    return near.reduce((best, c) => (best === null || c.distance <= best.distance ? c : best), null);
  };
  const ends = (drag, index) =>
    isAnchor(drag)
      ? [{ index, part: "both", distance: distance(at, pixels(drag.from)) }]
      : ["from", "to"].map((part) => ({ index, part, distance: distance(at, pixels(drag[part])) }));
  const shaft = (drag, index) => {
    const [a, b] = [pixels(drag.from), pixels(drag.to)];
    const [dx, dy] = [b[0] - a[0], b[1] - a[1]];
    const t = clamp(((at[0] - a[0]) * dx + (at[1] - a[1]) * dy) / (dx * dx + dy * dy || 1), 0, 1);
    return { index, part: "both", distance: distance(at, [a[0] + t * dx, a[1] + t * dy]) };
  };
  const first = selected && drags[selected.index] ? nearest(ends(drags[selected.index], selected.index), radius) : null;
  const found = first ?? nearest(drags.flatMap(ends), radius) ?? nearest(drags.map(shaft), radius / 2);
  return found && { index: found.index, part: found.part };
}

/** Where Tab goes from a selection: through the ends of all arrows, then out of the editor (null). */
export function nextStop(drags, selected, backwards) {
  const parts = (drag) => (isAnchor(drag) ? ["both"] : ["from", "to"]);
  const stops = drags.flatMap((drag, index) => parts(drag).map((part) => ({ index, part })));
  if (!selected) return (backwards ? stops.at(-1) : stops[0]) ?? null;
  let at = stops.findIndex((stop) => stop.index === selected.index && stop.part === selected.part);
  if (at < 0) at = stops.findIndex((stop) => stop.index === selected.index) - (backwards ? 0 : 1); // a whole arrow
  return stops[at + (backwards ? -1 : 1)] ?? null;
}

/** The state in words, for the status line and screen readers. */
export function describe(drags, selected) {
  const place = (p) => p.map((v) => `${Math.round(v * 100)}%`).join(", ");
  if (!selected) return drags.length === 1 ? "1 arrow" : drags.length ? `${drags.length} arrows` : "No arrows";
  const drag = drags[selected.index];
  const which = `${selected.index + 1} of ${drags.length}`;
  if (isAnchor(drag)) return `Anchor ${which}, at ${place(drag.from)}`;
  if (selected.part === "both") return `Arrow ${which}, from ${place(drag.from)} to ${place(drag.to)}`;
  return `Arrow ${which}, ${selected.part === "from" ? "start" : "end"} at ${place(drag[selected.part])}`;
}

/** The texts an editor had, and which of them it has now. */
export class History {
  static LIMIT = 100;

  constructor(text) {
    this.texts = [text];
    this.now = 0;
  }

  get canUndo() {
    return this.now > 0;
  }

  get canRedo() {
    return this.now < this.texts.length - 1;
  }

  push(text) {
    if (text === this.texts[this.now]) return;
    this.texts = [...this.texts.slice(0, this.now + 1), text].slice(-History.LIMIT);
    this.now = this.texts.length - 1;
  }

  /** Step back; the text to show. */
  undo() {
    if (this.canUndo) this.now -= 1;
    return this.texts[this.now];
  }

  redo() {
    if (this.canRedo) this.now += 1;
    return this.texts[this.now];
  }

  /** The text was changed from outside (ComfyUI's undo, a loaded workflow): go to where it was had, or start anew. */
  follow(text) {
    const distance = (i) => Math.abs(i - this.now);
    const same = this.texts.flatMap((t, i) => (t === text ? [i] : [])).sort((a, b) => distance(a) - distance(b));
    if (same.length) {
      this.now = same[0];
    } else {
      this.texts = [text];
      this.now = 0;
    }
  }
}
