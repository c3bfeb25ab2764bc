/** What the editor has to know of subgraphs: links that come into one, and widgets that are promoted to its node. */

const FROM_OUTSIDE = -10; // the origin of links that come into a subgraph

export function linkOf(graph, id) {
  return graph.getLink?.(id) ?? graph.links?.get?.(id) ?? graph.links?.[id];
}

/**
 * The link into an input of a node, by the input's place, if there is one. Looked for among the graph's links: newer pages
 * warn of an input's own `link`, and a subgraph's node answers getInputLink for its outputs.
 */
export function linkInto(node, place) {
  const links = [...(node?.graph?.links.values() ?? [])];
  return links.find((link) => String(link.target_id) === String(node.id) && link.target_slot === place);
}

export function comesFromOutside(link) {
  return Number(link.origin_id) === FROM_OUTSIDE;
}

/** The node that stands for a subgraph; where there are several, `preferred` if it is one of them, else the first. */
export function hostOf(subgraph, preferred = null) {
  if (preferred?.subgraph === subgraph) return preferred;
  const root = subgraph.rootGraph;
  const graphs = [root, ...(root?.subgraphs?.values() ?? [])];
  return graphs.flatMap((graph) => graph?.nodes ?? []).find((node) => node.subgraph === subgraph);
}

/** The node that shows a node's widget in the graph on the screen: itself, or that of a subgraph around it. */
export function nodeShowing(node, shown) {
  let outer = node;
  while (outer && outer.graph !== shown && outer.graph !== outer.graph?.rootGraph) outer = hostOf(outer.graph);
  return outer ?? node;
}

/** Whether the value of a node's widget comes over a link, so that it can't be edited. */
export function comesOverLink(node, name, element) {
  const link = linkInto(node, node.inputs?.findIndex((input) => input.widget?.name === name));
  if (!link) return false;
  if (!comesFromOutside(link)) return true;
  // It is an input of the subgraph's node. Older pages show the widget's own element there: then it is edited there.
  const host = hostOf(node.graph);
  const promoted = host?.widgets?.some((widget) => widget.element === element);
  return !promoted || comesOverLink(host, host.inputs[link.origin_slot]?.widget?.name, element);
}

/**
 * Newer pages keep the value of a promoted widget on the subgraph's node and show only their own kinds of widgets there.
 * `make(name, stored, source)` makes a DOM widget of `type` for that node: `stored.value` is the value, `source` the
 * widget inside.
 */
export function showPromoted(host, type, make) {
  const inherited = host.createPromotedHostWidget;
  if (!inherited || !host._projectPromotedWidget) return;
  host.createPromotedHostWidget = (input, id, source) => {
    const placed = host.graph?.getNodeById(host.id) === host; // not a passing copy
    if (source.type !== type || !placed) return inherited.call(host, input, id, source);
    const stored = host._projectPromotedWidget(input);
    host.addCustomWidget = (widget) => widget; // the page puts it in the place of `stored`: no second one
    try {
      return make(input.name, stored, source);
    } catch (error) {
      console.error("Readout Guidance shows no editor on the subgraph's node:", error);
      return inherited.call(host, input, id, source);
    } finally {
      delete host.addCustomWidget;
    }
  };
}
