/** The drag editor as the widget of `points` on the Drag Points node, and its ties to ComfyUI's page. */

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { DragEditor } from "./canvas.js";
import { pictureOf } from "./picture.js";
import { EMPTY, History } from "./state.js";
import { comesOverLink, nodeShowing, showPromoted } from "./subgraph.js";

const NODE = "RG_DragPoints";
const WIDGET = "RG_DRAG_POINTS";
const MIN_SIZE = { width: 340, height: 340 };

/** The editors on the page: refresh() shows the picture that is connected now. */
const editors = new Set();
/** By graph and node: ComfyUI's undo makes every node anew, and an editor's history has to outlive that. */
const histories = new Map();

app.registerExtension({
  name: "ReadoutGuidance.DragPoints",

  // Here rather than in the node's schema: without this file the input stays a text box.
  beforeRegisterNodeDef(nodeType, nodeData) {
    const points = nodeData.name === NODE && nodeData.input?.required?.points;
    if (points) points[1] = { ...points[1], widgetType: WIDGET };
  },

  getCustomWidgets() {
    return {
      [WIDGET]: (node, name, spec) => ({
        widget: addEditor(node, name, spec[1]?.default ?? EMPTY),
        minWidth: MIN_SIZE.width + 20,
        minHeight: MIN_SIZE.height + 100,
      }),
    };
  },

  nodeCreated(node) {
    if (node.subgraph) showPromoted(node, WIDGET, (...promoted) => addPromoted(node, ...promoted));
  },

  setup() {
    api.addEventListener("graphChanged", refreshAll); // another file chosen, a link made, undone
    const drawn = app.canvas.onDrawForeground;
    app.canvas.onDrawForeground = function (...args) {
      drawn?.apply(this, args);
      for (const { editor } of editors) editor.zoomed(this.ds.scale);
    };
  },

  afterConfigureGraph() {
    refreshAll();
    setTimeout(refreshAll, 300); // a tab's outputs are put back after its graph
  },
});

function refreshAll() {
  for (const { refresh } of editors) refresh();
}

function addEditor(node, name, text) {
  const { entry, widget } = addWidget(node, name, text, {});
  chain(node, "onAdded", () => editors.add(entry));
  chain(node, "onRemoved", () => editors.delete(entry));
  return widget;
}

/** An editor of its own on a subgraph's node, for the points of a node inside: `stored` holds their text. */
function addPromoted(host, name, stored, source) {
  return addWidget(host, name, textOf(stored.value), { inner: source.node, stored }).widget;
}

function addWidget(node, name, text, { inner = node, stored = null }) {
  const editor = new DragEditor(text, {
    history: (text) => historyOf(node, name, text),
    changed: () => {
      widget.value = editor.text;
      capture();
    },
    stepped: (direction) => {
      widget.value = editor.text;
      step(direction);
    },
    focused: () => app.canvas.selectNode(nodeShowing(node, app.canvas.graph)),
    wheel: (event) => app.canvas.processMouseWheel(event),
    pan: (event) => forwardToCanvas(event),
    locked: () => app.canvas.read_only,
  });
  const widget = node.addDOMWidget(name, WIDGET, editor.element, {
    getValue: () => (stored ? textOf(stored.value) : editor.text),
    setValue: (value) => {
      editor.load(textOf(value));
      if (stored) stored.value = editor.text;
    },
    getMinHeight: () => MIN_SIZE.height,
    hideOnZoom: false,
    serialize: true,
  });
  const follow = () => {
    if (stored) editor.load(textOf(stored.value));
    refresh(node, name, editor, inner);
  };
  const entry = { editor, refresh: follow };
  const later = () => requestAnimationFrame(() => editors.has(entry) && follow());
  editors.add(entry);
  chain(node, "onConfigure", later);
  chain(node, "onConnectionsChange", later);
  chain(inner, "onExecuted", later);
  chain(widget, "onRemove", () => editors.delete(entry));
  later();
  return { entry, widget };
}

function textOf(value) {
  return typeof value === "string" ? value : EMPTY;
}

function chain(node, method, then) {
  const before = node[method];
  node[method] = function (...args) {
    const result = before?.apply(this, args);
    then();
    return result;
  };
}

function refresh(node, name, editor, inner) {
  if (!node.graph || !inner.graph) return;
  takeOver(node, editor.element);
  const linked = comesOverLink(node, name, editor.element);
  const { source, missing } = pictureOf(inner, app.nodeOutputs, node);
  const { filename, subfolder = "", type = "input" } = source ?? {};
  const url = source && api.apiURL(`/view?${new URLSearchParams({ filename, subfolder, type })}`);
  editor.show(url, missing, linked);
}

/** Vue nodes go on showing the element of the node that had this id before a workflow was loaded or a step undone. */
function takeOver(node, element) {
  if (element.isConnected || node.graph !== app.canvas.graph) return;
  document.querySelector(`[data-node-id="${CSS.escape(node.id)}"] .rg-drag`)?.replaceWith(element);
}

/** Middle button or space: the press belongs to the graph, which is panned. */
function forwardToCanvas(event) {
  const handlers = { pointerdown: "processMouseDown", pointermove: "processMouseMove", pointerup: "processMouseUp" };
  app.canvas[handlers[event.type]](event);
}

function historyOf(node, name, text) {
  if (!node.graph) return new History(text); // the node is being made
  const key = `${node.graph?.rootGraph?.id} ${node.graph?.id} ${node.id} ${name}`;
  if (!histories.has(key)) histories.set(key, new History(text));
  const history = histories.get(key);
  history.follow(text);
  return history;
}

/** What ComfyUI keeps of the workflow in the open tab. */
function tracker() {
  return app.extensionManager?.workflow?.activeWorkflow?.changeTracker;
}

/** One step in ComfyUI's history, if the graph has changed. */
function capture() {
  const changes = tracker();
  if (changes?.captureCanvasState) changes.captureCanvasState();
  else changes?.checkState?.();
}

/**
 * After a step in the editor's own history. If the graph is now what it was one step ago in ComfyUI's, that step is
 * taken there as well, so that both go on from the same place; otherwise this is a new step of ComfyUI's.
 */
function step(direction) {
  const changes = tracker();
  const { undoQueue, redoQueue } = changes ?? {};
  const [from, to] = direction === "undo" ? [undoQueue, redoQueue] : [redoQueue, undoQueue];
  const graphEqual = changes?.constructor?.graphEqual;
  // Vue nodes measure themselves: sizes may differ by a fraction although nobody changed them.
  const withoutSizes = (graph) => JSON.parse(JSON.stringify(graph, (key, value) => (key === "size" ? undefined : value)));
  const graph = (app.rootGraph ?? app.graph).serialize();
  if (from?.length && to && graphEqual?.(withoutSizes(from.at(-1)), withoutSizes(graph))) {
    const before = changes.activeState;
    from.pop();
    to.push(before);
    changes.activeState = JSON.parse(JSON.stringify(graph));
    changes.updateModified?.(before);
  } else {
    capture();
  }
}
