/** Arrows as SVG: sharp at any zoom, legible on any picture (dark under light). */

const COLOURS = {
  dark: "rgba(0, 0, 0, 0.8)",
  light: "#ffffff",
  start: "#409cff",
  end: "#ff5c5c",
  selected: "#ffd166",
  halo: "rgba(255, 209, 102, 0.35)",
};
const SMALLEST_ZOOM = 0.3; // below it, arrows get smaller on the screen too

export function svg(tag, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

/** Draw drags into an <svg>; `box` is the picture's {x, y, width, height} in it, `zoom` the graph's. */
export function drawArrows(target, drags, selected, box, zoom) {
  const unit = 1 / Math.min(1, Math.max(SMALLEST_ZOOM, zoom));
  const pixels = ([x, y]) => [box.x + x * box.width, box.y + y * box.height];
  const order = drags.map((_, index) => index);
  if (selected) order.push(...order.splice(selected.index, 1)); // the selected one on top
  target.replaceChildren(
    ...order.map((index) => {
      const chosen = selected?.index === index ? selected.part : null;
      return arrow(pixels(drags[index].from), pixels(drags[index].to), chosen, unit, index);
    }),
  );
}

function arrow(from, to, chosen, unit, index) {
  const group = svg("g", { "data-index": index, class: chosen ? "rg-drag-selected" : "" });
  const [dx, dy] = [to[0] - from[0], to[1] - from[1]];
  const length = Math.hypot(dx, dy);
  const colour = chosen ? COLOURS.selected : COLOURS.light;
  const rim = { "stroke-width": 1.5 * unit };
  const halo = (at) => group.append(circle(at, 11 * unit, { fill: COLOURS.halo, stroke: COLOURS.selected, ...rim }));
  if (chosen && (chosen !== "to" || !length)) halo(from);
  if (chosen && chosen !== "from" && length) halo(to);
  if (length) {
    const [ux, uy] = [dx / length, dy / length];
    const head = Math.min(15 * unit, Math.max(6 * unit, length * 0.6));
    const neck = [to[0] - ux * head * 0.8, to[1] - uy * head * 0.8];
    const [x1, y1, x2, y2] = [...from, ...neck];
    const line = (stroke, width) =>
      svg("line", { x1, y1, x2, y2, stroke, "stroke-width": width * unit, "stroke-linecap": "round" });
    group.append(line(COLOURS.dark, 5), line(colour, 2.5));
    const side = (sign) => [to[0] - ux * head - sign * uy * head * 0.4, to[1] - uy * head + sign * ux * head * 0.4];
    group.append(
      svg("polygon", {
        points: [to, side(1), side(-1)].join(" "),
        fill: COLOURS.end,
        stroke: COLOURS.dark,
        "stroke-linejoin": "round",
        ...rim,
      }),
    );
  }
  group.append(circle(from, 6.5 * unit, { fill: COLOURS.dark }));
  group.append(circle(from, 5 * unit, { fill: COLOURS.start, stroke: colour, ...rim }));
  if (!length) group.append(circle(from, 2 * unit, { fill: colour }));
  return group;
}

function circle([cx, cy], r, attributes) {
  return svg("circle", { cx, cy, r, ...attributes });
}
