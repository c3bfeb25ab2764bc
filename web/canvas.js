/** The drag editor: one element that shows a picture with arrows and edits them by mouse, pen, touch and keyboard. */

import { drawArrows, svg } from "./arrows.js";
import { addStyle } from "./style.js";
import { add, clampPoint, describe, hit, isAnchor, move, nextStop, parse, remove, serialize } from "./state.js";

const MARGIN_PX = 10; // around the picture, so that ends at its border can be seen and taken
const REACH_PX = { mouse: 10, pen: 14, touch: 24 }; // on the screen, at any zoom
const STILL_PX = { mouse: 3, pen: 5, touch: 8 }; // a press that moves less is a click
const KEY_STEP = 0.005;
const KEY_STEPS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const NEW_BY_KEY = { from: [0.45, 0.5], to: [0.55, 0.5] };
const HELP =
  "Tab goes through the ends of the arrows, arrow keys move the chosen one, with Shift ten times as far. " +
  "Enter adds an arrow, Delete removes one, Control Z undoes, Escape lets go.";
const ICONS = {
  undo: "M6 3 2.5 6.5 6 10 M3 6.5 h6.5 a3.5 3.5 0 0 1 0 7 H6",
  redo: "M10 3 13.5 6.5 10 10 M13 6.5 H6.5 a3.5 3.5 0 0 0 0 7 H10",
  delete: "M4 4 12 12 M12 4 4 12",
  clear: "M2.5 4.5 h11 M6 4.5 V2.5 h4 v2 M4 4.5 l.7 9 h6.6 l.7 -9 M6.7 7 v4.5 M9.3 7 v4.5",
};

let count = 0;

export class DragEditor {
  /**
   * `host` ties the editor to its page: history(text) gives the History to use, at `text`; changed() and
   * stepped("undo" | "redo") tell that `text` was edited; focused(), wheel(event), pan(event) and locked() are the
   * graph's part.
   */
  constructor(text, host) {
    this.host = host;
    this.text = text;
    ({ drags: this.drags, error: this.error } = parse(text));
    this.selected = null;
    this.gesture = null; // a press that goes on: what it does and where it began
    this.keyMoved = false; // arrow keys have moved something that is not in the text yet
    this.linked = false;
    this.picture = { url: null, missing: "" };
    this.zoom = 1;
    this.build();
    this.listen();
    this.draw();
  }

  // The value

  /** Take a text from outside: a loaded workflow, ComfyUI's undo, another extension. */
  load(text) {
    if (text === this.text) return;
    this.text = text;
    this.gesture = null;
    this.keyMoved = false;
    ({ drags: this.drags, error: this.error } = parse(text));
    if (this.selected && !this.drags[this.selected.index]) this.selected = null;
    this.draw();
  }

  /** An edit is done: the one place where the text changes by hand. */
  commit(drags, selected) {
    this.drags = drags;
    this.selected = selected;
    this.keyMoved = false;
    const text = serialize(drags);
    if (this.error || text !== serialize(parse(this.text).drags)) {
      this.host.history(this.text).push(text);
      this.text = text;
      this.error = null;
      this.host.changed();
    }
    this.draw();
  }

  step(direction) {
    if (this.linked) return;
    this.finishKeys();
    const history = this.host.history(this.text);
    if (!(direction === "undo" ? history.canUndo : history.canRedo)) return;
    this.load(history[direction]());
    this.host.stepped(direction);
    this.draw();
  }

  deleteSelected() {
    if (this.selected && !this.linked) this.commit(remove(this.drags, this.selected.index), null);
  }

  clear() {
    if (!this.linked) this.commit([], null);
  }

  // The picture

  /** Show the picture at a URL (null: none, `missing` says why); `linked`: the points come over a link. */
  show(url, missing, linked) {
    this.linked = linked;
    if (url !== this.picture.url) {
      if (url) this.image.src = url;
      else this.image.removeAttribute("src");
    }
    this.picture = { url, missing };
    this.draw();
  }

  /** The graph's zoom: lines and handles keep about the same size on the screen when it is small. */
  zoomed(scale) {
    if (Math.abs(scale - this.zoom) < 1e-3) return;
    this.zoom = scale;
    this.draw();
  }

  // The element

  build() {
    addStyle();
    const id = `rg-drag-${count++}`;
    this.image = element("img", { alt: "", draggable: false });
    this.svg = svg("svg", { "aria-hidden": "true", class: "rg-drag-arrows" });
    this.note = element("div", { className: "rg-drag-note" });
    // An input has the keys to itself in ComfyUI's page; a button leaves copying the node to ComfyUI.
    this.pad = element("input", { type: "button", className: "rg-drag-pad" });
    this.pad.setAttribute("aria-describedby", `${id}-help`);
    this.pad.setAttribute("aria-roledescription", "arrow editor");
    this.stage = element("div", { className: "rg-drag-stage" }, this.image, this.note, this.svg, this.pad);
    this.buttons = {
      undo: this.button("undo", "Undo", "Undo (Ctrl+Z)", () => this.step("undo")),
      redo: this.button("redo", "Redo", "Redo (Ctrl+Y)", () => this.step("redo")),
      delete: this.button("delete", "Delete arrow", "Delete the chosen arrow (Delete)", () => this.deleteSelected()),
      clear: this.button("clear", "Clear all arrows", "Clear all arrows", () => this.clear()),
    };
    this.status = element("div", { className: "rg-drag-status" });
    this.status.setAttribute("role", "status");
    const bar = element("div", { className: "rg-drag-bar" }, ...Object.values(this.buttons), this.status);
    bar.setAttribute("role", "toolbar");
    bar.setAttribute("aria-label", "Arrows");
    const help = element("div", { id: `${id}-help`, hidden: true, textContent: HELP });
    this.element = element("div", { className: "rg-drag widget-expands" }, this.stage, bar, help);
    this.element.setAttribute("role", "application");
    this.element.setAttribute("aria-label", "Drag points editor");
  }

  button(name, label, title, action) {
    const button = element("button", { type: "button", title, className: `rg-drag-${name}` });
    button.setAttribute("aria-label", label);
    const icon = svg("svg", { viewBox: "0 0 16 16", "aria-hidden": "true" });
    icon.append(svg("path", { d: ICONS[name] }));
    button.append(icon);
    button.addEventListener("click", () => button.getAttribute("aria-disabled") !== "true" && action());
    return button;
  }

  listen() {
    const on = (target, handlers) => {
      for (const [type, handler] of Object.entries(handlers)) target.addEventListener(type, handler, { passive: false });
    };
    on(this.stage, {
      pointerdown: (event) => this.pressed(event),
      pointermove: (event) => this.moved(event),
      pointerup: (event) => this.released(event),
      pointercancel: () => this.cancel(),
      contextmenu: (event) => this.deleteAt(event),
      dblclick: (event) => this.deleteAt(event),
      wheel: (event) => {
        event.preventDefault();
        event.stopPropagation();
        this.host.wheel(event);
      },
      mousedown: (event) => event.preventDefault(), // the focus stays where pressed() puts it
      dragstart: (event) => event.preventDefault(),
    });
    on(this.element, {
      pointerdown: (event) => event.stopPropagation(), // in Vue nodes it would drag the node
      keydown: (event) => this.keyDown(event),
      keyup: (event) => event.key in KEY_STEPS && this.finishKeys(),
    });
    const pressedOutside = ({ target }) => {
      if (!this.stage.contains(target)) this.cancel(); // another finger beside the picture: a pinch of the graph
      if (!this.element.contains(target)) this.pad.blur();
    };
    on(this.pad, {
      focus: () => {
        document.addEventListener("pointerdown", pressedOutside, true);
        this.host.focused();
      },
      blur: () => {
        document.removeEventListener("pointerdown", pressedOutside, true);
        this.finishKeys();
      },
    });
    on(this.image, { load: () => this.draw(), error: () => this.draw() });
    new ResizeObserver(() => this.draw()).observe(this.stage);
  }

  // Geometry. Pixels are CSS pixels of the stage; the zoom of the graph is on top of them.

  /** Where the picture is in the stage: as large as fits, a square while there is none. */
  box() {
    const { clientWidth, clientHeight } = this.stage;
    const { naturalWidth, naturalHeight } = this.image;
    const [w, h] = naturalWidth && this.picture.url ? [naturalWidth, naturalHeight] : [1, 1];
    const scale = Math.max(0, Math.min((clientWidth - 2 * MARGIN_PX) / w, (clientHeight - 2 * MARGIN_PX) / h));
    const [width, height] = [w * scale, h * scale];
    return { x: (clientWidth - width) / 2, y: (clientHeight - height) / 2, width, height };
  }

  /** A pointer's place in the picture (0..1, beyond it outside), and its reach in pixels. */
  locate(event) {
    const box = this.box();
    const bounds = this.stage.getBoundingClientRect();
    const scale = bounds.width / this.stage.offsetWidth || 1;
    const border = this.stage.clientLeft;
    const x = (event.clientX - bounds.left) / scale - border - box.x;
    const y = (event.clientY - bounds.top) / scale - border - box.y;
    const reach = Math.min((REACH_PX[event.pointerType] ?? REACH_PX.mouse) / scale, Math.max(box.width, box.height) / 8);
    return { point: [x / box.width, y / box.height], pixels: [x, y], size: [box.width, box.height], reach };
  }

  under({ pixels, size, reach }) {
    return hit(this.drags, pixels, size, reach, this.selected);
  }

  // Mouse, pen, touch

  pressed(event) {
    event.stopPropagation();
    if (event.button === 1 || this.host.locked()) return this.host.pan(event);
    if (this.gesture) return this.cancel(); // a second finger: not meant for the arrows
    if (event.button !== 0 || !event.isPrimary) return;
    this.finishKeys();
    this.pad.focus({ preventScroll: true });
    const at = this.locate(event);
    const found = event.shiftKey ? null : this.under(at);
    const slack = at.reach / Math.min(...at.size);
    const outside = at.point.some((v) => v < -slack || v > 1 + slack);
    if (this.linked || (!found && outside)) return this.select(found);
    this.stage.setPointerCapture(event.pointerId);
    const start = found ? at.point : clampPoint(at.point);
    const { drags, selected } = this;
    const client = [event.clientX, event.clientY];
    this.gesture = { id: event.pointerId, client, start, part: found, drags, selected, moving: false };
    this.select(found);
  }

  moved(event) {
    const { gesture } = this;
    if (!gesture) {
      const pans = event.buttons & 4 || (event.buttons && this.host.locked());
      return pans ? this.host.pan(event) : this.hover(event);
    }
    if (event.pointerId !== gesture.id) return;
    event.stopPropagation();
    const way = Math.hypot(event.clientX - gesture.client[0], event.clientY - gesture.client[1]);
    gesture.moving ||= way > (STILL_PX[event.pointerType] ?? STILL_PX.mouse);
    if (!gesture.moving) return;
    const { point } = this.locate(event);
    const by = [point[0] - gesture.start[0], point[1] - gesture.start[1]];
    if (gesture.part) {
      this.drags = move(gesture.drags, gesture.part, by);
    } else {
      this.drags = add(gesture.drags, gesture.start, point);
      this.selected = { index: gesture.drags.length, part: "to" };
    }
    this.draw();
  }

  released(event) {
    const { gesture } = this;
    if (!gesture) return event.button === 1 || this.host.locked() ? this.host.pan(event) : undefined;
    if (event.pointerId !== gesture.id) return;
    event.stopPropagation();
    this.gesture = null;
    if (gesture.moving) return this.commit(this.drags, this.selected);
    if (gesture.part) return this.draw();
    this.commit(add(gesture.drags, gesture.start, gesture.start), { index: gesture.drags.length, part: "both" });
  }

  /** Give a press up, as if it had not been. */
  cancel() {
    if (!this.gesture) return;
    ({ drags: this.drags, selected: this.selected } = this.gesture);
    this.gesture = null;
    this.draw();
  }

  hover(event) {
    const found = this.under(this.locate(event));
    this.stage.style.cursor = this.linked ? "default" : !found ? "crosshair" : found.part === "both" ? "move" : "grab";
  }

  /** Right click, double click. */
  deleteAt(event) {
    event.stopPropagation();
    const found = this.under(this.locate(event));
    if (event.type === "contextmenu" && (found || this.gesture)) event.preventDefault();
    if (!found || this.linked || this.gesture) return;
    if (found.part !== "both" || isAnchor(this.drags[found.index])) this.commit(remove(this.drags, found.index), null);
  }

  // Keyboard

  keyDown(event) {
    const shortcut = (event.ctrlKey || event.metaKey) && !event.altKey && event.key.toLowerCase();
    if (shortcut === "z" || shortcut === "y") {
      this.take(event);
      // With "queue on change" ComfyUI undoes from inputs too, when it gets to this event a moment later.
      Object.defineProperty(event, "key", { value: "Undo" });
      return this.step(shortcut === "y" || event.shiftKey ? "redo" : "undo");
    }
    if (shortcut || event.altKey || event.target !== this.pad) return;
    if (event.key === "Tab") {
      this.finishKeys();
      const next = nextStop(this.drags, this.selected, event.shiftKey);
      if (next) this.take(event);
      this.select(next);
    } else if (event.key in KEY_STEPS) {
      this.take(event);
      this.moveByKey(KEY_STEPS[event.key], event.shiftKey ? 10 * KEY_STEP : KEY_STEP);
    } else if (event.key === "Delete" || event.key === "Backspace") {
      this.take(event);
      this.deleteSelected();
    } else if (event.key === "Enter") {
      this.take(event);
      const { from, to } = NEW_BY_KEY;
      if (!this.linked) this.commit(add(this.drags, from, to), { index: this.drags.length, part: "to" });
    } else if (event.key === "Escape") {
      this.take(event);
      if (this.gesture) this.cancel();
      else if (this.selected) this.select(null);
      else this.pad.blur();
    }
  }

  take(event) {
    event.preventDefault();
    event.stopPropagation();
  }

  moveByKey([dx, dy], step) {
    if (!this.selected || this.linked || this.gesture) return;
    this.drags = move(this.drags, this.selected, [dx * step, dy * step]);
    this.keyMoved = true;
    this.draw();
  }

  /** What arrow keys moved while they were held down is one edit. */
  finishKeys() {
    if (this.keyMoved) this.commit(this.drags, this.selected);
  }

  select(selected) {
    this.selected = selected;
    this.draw();
  }

  // Drawing

  draw() {
    const box = this.box();
    const loaded = this.picture.url && this.image.naturalWidth > 0;
    this.image.hidden = !loaded;
    const [left, top, width, height] = [box.x, box.y, box.width, box.height].map((v) => `${v}px`);
    Object.assign(this.image.style, { left, top, width, height });
    const failed = this.picture.url && this.image.complete && !loaded;
    const none = this.picture.url ? "" : this.picture.missing;
    const missing = failed ? "The picture is not there any more: run again" : none;
    this.note.textContent = this.error ?? missing;
    this.note.classList.toggle("rg-drag-error", Boolean(this.error));
    drawArrows(this.svg, this.drags, this.selected, box, this.zoom);
    const said = this.linked ? "The points come over a link" : describe(this.drags, this.selected);
    if (this.status.textContent !== said) this.status.textContent = said;
    this.pad.setAttribute("aria-label", said);
    this.element.classList.toggle("rg-drag-linked", this.linked);
    const history = this.host.history(this.text);
    const enabled = {
      undo: history.canUndo,
      redo: history.canRedo,
      delete: Boolean(this.selected),
      clear: this.drags.length > 0 || Boolean(this.error),
    };
    for (const [name, button] of Object.entries(this.buttons)) {
      button.setAttribute("aria-disabled", String(this.linked || !enabled[name]));
    }
  }
}

function element(tag, properties, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}
