/** Points, lines and bands as a drawing, with its legend in words. */

import { Canvas, colour, CONFIG, escaped, looks, style } from "./canvas.js";
import { h, render } from "./dom.js";

// By the index of a colour too, so that no two have to be told apart by it.
const SHAPES = [
  ["circle", "●"],
  ["square", "■"],
  ["triangle-up", "▲"],
  ["diamond", "◆"],
  ["triangle-down", "▼"],
  ["pentagon", "⬟"],
  ["hexagon", "⬢"],
  ["cross", "✚"],
];
const LEGEND = 16; // more names than these hide what they name
const shape = index => SHAPES[index % SHAPES.length];

/** How a point is marked beside its colour. */
const MARKS = {
  run: index => ({ symbol: shape(index)[0], size: 7, opacity: 0.85 }),
  optimum: index => ({ symbol: shape(index)[0], size: 12, line: { color: style("--ink"), width: 1.5 } }),
  extrapolated: index => ({ symbol: `${shape(index)[0]}-open`, size: 11, line: { width: 2 } }),
  flop_optimal: () => ({ symbol: "circle-open", size: 17, line: { width: 2 } }),
  joule_optimal: () => ({ symbol: "star", size: 16, line: { color: style("--ink"), width: 1 } }),
};

/**
 * @typedef {{index: number, points: [number, number][], mark?: keyof MARKS, names?: string[], label?: string,
 *   intervals?: ([number, number] | null)[], xIntervals?: ([number, number] | null)[]}} Points
 * @typedef {{index: number, points: [number, number][], dashed?: boolean}} Line
 * @typedef {{index: number, x: number[], low: number[], high: number[]}} Band
 * @typedef {{x: string, y: string, logX?: boolean, logY?: boolean, ticks?: string[], points: Points[], lines?: Line[],
 *   bands?: Band[], reading?: string, notes?: string[], spoken: string}} Panel
 */

export class Figure extends Canvas {
  constructor(name) {
    const legend = h("ul", { class: "legend small", keep: true });
    super(name, legend);
    this.legend = legend;
  }

  /** @param {Panel} panel */
  async paint(Plotly, panel) {
    const { bands = [], lines = [] } = panel;
    const traces = [...bands.flatMap(band), ...lines.map(line), ...panel.points.map(points)];
    await Plotly.react(this.canvas, traces, laidOut(panel), CONFIG);
    this.canvas.setAttribute("aria-label", `${this.name}. ${panel.spoken}`);
    const labelled = panel.points.filter(({ label }) => label);
    render(
      this.legend,
      labelled.slice(0, LEGEND).map(({ index, label }) => h("li", {}, sign(index), label)),
      labelled.length > LEGEND && h("li", {}, `and ${labelled.length - LEGEND} more`),
      panel.points.some(({ mark }) => mark === "flop_optimal") && h("li", {}, "◯ FLOP-optimal"),
      panel.points.some(({ mark }) => mark === "joule_optimal") && h("li", {}, "★ joule-optimal"),
    );
    render(
      this.note,
      [panel.reading, ...(panel.notes ?? [])].filter(Boolean).map(text => h("span", {}, `${text}. `)),
    );
  }
}

const sign = index =>
  h("span", { class: "sign", style: { color: colour(index) }, "aria-hidden": "true" }, shape(index)[1]);

function points({ index, points, mark = "run", names, label = "", intervals, xIntervals }) {
  const [x, y] = [points.map(([x]) => x), points.map(([, y]) => y)];
  return {
    type: "scatter",
    mode: "markers",
    x,
    y,
    text: (names ?? points.map(() => label)).map(escaped),
    hovertemplate: "%{text}<br>%{x:.4s}, %{y:.5g}<extra></extra>",
    marker: { color: colour(index), ...MARKS[mark](index) },
    error_x: errors(x, xIntervals, index),
    error_y: errors(y, intervals, index),
    cliponaxis: false,
  };
}

function errors(values, intervals, index) {
  const known = intervals?.map((interval, i) => interval ?? [values[i], values[i]]);
  return (
    known && {
      type: "data",
      symmetric: false,
      array: known.map(([, high], i) => high - values[i]),
      arrayminus: known.map(([low], i) => values[i] - low),
      color: colour(index),
      thickness: 1.2,
      width: 4,
    }
  );
}

function line({ index, points, dashed }) {
  return {
    type: "scatter",
    mode: "lines",
    x: points.map(([x]) => x),
    y: points.map(([, y]) => y),
    line: { color: colour(index), width: 1.6, dash: dashed ? "dash" : "solid" },
    hoverinfo: "skip",
  };
}

function band({ index, x, low, high }) {
  const edge = { type: "scatter", mode: "lines", x, line: { width: 0 }, hoverinfo: "skip" };
  return [
    { ...edge, y: low },
    { ...edge, y: high, fill: "tonexty", fillcolor: `${colour(index)}2e` },
  ];
}

function laidOut({ x, y, logX, logY, ticks }) {
  const { layout, axis } = looks();
  const scale = log => ({ ...axis, type: log ? "log" : "linear", exponentformat: "power" });
  const named = ticks?.length && { tickmode: "array", tickvals: ticks.map((_, i) => i), ticktext: ticks.map(escaped) };
  return {
    ...layout,
    height: 300,
    hovermode: "closest",
    dragmode: false,
    xaxis: { ...scale(logX), ...named, fixedrange: true, title: { text: escaped(x), standoff: 4 } },
    yaxis: { ...scale(logY), fixedrange: true, title: { text: escaped(y), standoff: 4 } },
  };
}
