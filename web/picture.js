/**
 * Which picture the arrows are drawn on: the file that a connected Load Image node names, also before anything ran;
 * otherwise what came in at the node's last run. Pictures are only ever named here, so none gets into a workflow.
 */

import { comesFromOutside, hostOf, linkInto, linkOf } from "./subgraph.js";

const MOST_HOPS = 100;

/**
 * {source, missing}: what /view takes, or null; and what to say where there is no picture. `host` is the subgraph's node
 * that shows the node's widget, if one does.
 */
export function pictureOf(node, nodeOutputs, host = null) {
  const link = linkInto(node, node.inputs?.findIndex((input) => input.name === "image"));
  if (!link) return { source: null, missing: "Connect a picture, or draw on the empty ground" };
  const source = fileOf(originOf(node.graph, link, host)) ?? lastRun(node, nodeOutputs);
  return { source, missing: "The connected picture shows here after a run" };
}

/** The node that a link's value comes from, through reroutes and into or out of subgraphs. */
function originOf(graph, link, host) {
  for (let hop = 0; hop < MOST_HOPS && graph && link; hop++) {
    if (comesFromOutside(link)) {
      const outer = hostOf(graph, host);
      link = linkInto(outer, link.origin_slot);
      graph = outer?.graph;
      continue;
    }
    const origin = graph.getNodeById(link.origin_id);
    if (origin?.subgraph) {
      graph = origin.subgraph;
      link = linkOf(graph, graph.outputs?.[link.origin_slot]?.linkIds?.[0]);
    } else if (origin?.type === "Reroute") {
      link = linkInto(origin, 0);
    } else {
      return origin;
    }
  }
  return null;
}

/** The file that a loader of uploaded pictures names: "name.png", "folder/name.png" or "name.png [output]". */
function fileOf(node) {
  const options = node?.constructor?.nodeData?.input?.required?.image?.[1];
  const value = options?.image_upload && node.widgets?.find((widget) => widget.name === "image")?.value;
  if (typeof value !== "string" || !value) return null;
  const [, path, type] = value.match(/^(.*?)(?: \[(input|output|temp)\])?$/);
  const cut = Math.max(path.lastIndexOf("/"), path.lastIndexOf("\\")) + 1;
  const subfolder = path.slice(0, Math.max(0, cut - 1));
  return { filename: path.slice(cut), subfolder, type: type ?? options.image_folder ?? "input" };
}

/** What the node reported at its last run; the page keeps that for each open workflow. */
function lastRun(node, nodeOutputs) {
  const inSubgraph = node.graph && node.graph !== node.graph.rootGraph;
  const output = nodeOutputs?.[inSubgraph ? `${node.graph.id}:${node.id}` : node.id];
  return output?.drag_picture?.[0] ?? null;
}
