/** Curves over steps as a drawing. */

import { Canvas, colour, COLOURS, CONFIG, escaped, LINES, looks, style } from "./canvas.js";
import { smoothed } from "./curve.js";
import { h, render } from "./dom.js";
import { count, measured, plural } from "./format.js";

const FEW = 60; // points that are drawn as points

export class Chart extends Canvas {
  /** @param {string} name @param {(range: [number, number] | null) => void} zoomed */
  constructor(name, zoomed) {
    super(name);
    this.zoomed = zoomed;
  }

  /**
   * @param {{label: string, index: number, curve: import("./curve.js").Curve}[]} lines
   * @param {{smoothing: number, log: boolean, range: [number, number] | null}} view
   */
  async paint(Plotly, lines, view) {
    const drawn = lines.filter(({ curve }) => curve.points.steps.length);
    await Plotly.react(
      this.canvas,
      drawn.flatMap(line => traces(line, view, lines.length > 1)),
      laidOut(drawn, view),
      CONFIG,
    );
    if (!this.listening) {
      this.listening = true;
      this.canvas.on("plotly_relayout", change => {
        const [from, to] = [change["xaxis.range[0]"], change["xaxis.range[1]"]];
        if (from !== undefined) this.zoomed([from, to]);
      });
      this.canvas.on("plotly_doubleclick", () => {
        this.zoomed(null);
        return false;
      });
    }
    this.canvas.setAttribute("aria-label", `${this.name}. ${drawn.map(spoken).join(" ")}`);
    render(this.note, notes(drawn, view));
  }
}

function traces({ label, index, curve }, { smoothing, log }, several) {
  const { steps, values } = curve.points;
  const finite = values.map(value => (Number.isFinite(value) && (!log || value > 0) ? value : null));
  const line = {
    color: colour(index),
    width: steps.length > 500 ? 1.2 : 1.8,
    dash: LINES[Math.floor(index / COLOURS) % LINES.length],
  };
  const name = several ? label : "";
  const few = steps.length < FEW;
  const raw = {
    x: steps,
    y: finite,
    mode: few ? "lines+markers" : "lines",
    marker: { size: 4 },
    line,
    name,
    hovertemplate: `%{y:.5g}<extra>${escaped(name)}</extra>`,
  };
  // A handful of values has no noise to take out; an average of them is a lag.
  const drawn =
    smoothing && !few
      ? [
          { ...raw, mode: "lines", opacity: 0.3, hoverinfo: "skip", hovertemplate: null, showlegend: false },
          {
            ...raw,
            mode: "lines",
            y: smoothed(
              finite.map(y => y ?? NaN),
              smoothing,
            ),
            customdata: finite,
            hovertemplate: `%{y:.5g} smoothed, %{customdata:.5g}<extra>${escaped(name)}</extra>`,
          },
        ]
      : [raw];
  return [...drawn, ...odd(steps, values, index)].map(trace => ({ type: "scatter", showlegend: false, ...trace }));
}

/** NaN and the infinities, where they are: at the edges, since no height is theirs. */
function odd(steps, values, index) {
  const kinds = [
    ["NaN", Number.isNaN, 0.03, "x"],
    ["∞", x => x === Infinity, 0.97, "triangle-up"],
    ["−∞", x => x === -Infinity, 0.03, "triangle-down"],
  ];
  return kinds
    .map(([name, is, y, symbol]) => {
      const x = steps.filter((_, i) => is(values[i]));
      return {
        x,
        y: x.map(() => y),
        yaxis: "y2",
        mode: "markers",
        marker: { symbol, size: 8, color: style("--bad"), line: { color: colour(index), width: 1 } },
        hovertemplate: `${name}<extra></extra>`,
      };
    })
    .filter(({ x }) => x.length);
}

function laidOut(lines, view) {
  const { log, range } = view;
  const ink = style("--quiet");
  const { layout, axis } = looks();
  const starts = lines.flatMap(({ curve, index }) =>
    curve.starts.slice(1).map(([step, attempt]) => ({ step, attempt, index })),
  );
  return {
    ...layout,
    hovermode: "x unified",
    dragmode: "zoom",
    xaxis: {
      ...axis,
      ...(range ? { range: [...range], autorange: false } : { autorange: true }),
      title: { text: "step", standoff: 4 },
      exponentformat: "none",
      separatethousands: true,
    },
    yaxis: {
      ...axis,
      type: log ? "log" : "linear",
      fixedrange: true,
      exponentformat: "power",
      ...heights(lines, view),
    },
    yaxis2: { overlaying: "y", range: [0, 1], visible: false, fixedrange: true },
    shapes: starts.map(({ step, index }) => ({
      type: "line",
      x0: step,
      x1: step,
      yref: "paper",
      y0: 0,
      y1: 1,
      line: { color: lines.length > 1 ? colour(index) : ink, width: 1, dash: "dot" },
    })),
    annotations:
      lines.length > 1
        ? []
        : starts
            .slice(-20)
            .map(({ step, attempt }) => ({
              x: step,
              y: 1,
              yref: "paper",
              yanchor: "bottom",
              text: `attempt ${attempt}`,
              showarrow: false,
              font: { size: 10, color: ink },
            })),
  };
}

/** How high the drawing is, where plotly should not decide it. */
function heights(lines, { log, calm }) {
  const values = lines
    .flatMap(({ curve }) => curve.points.values.filter(value => Number.isFinite(value) && (!log || value > 0)))
    .sort((a, b) => a - b);
  const last = values.length - 1;
  const between = (low, high) => ({ range: log ? [Math.log10(low), Math.log10(high)] : [low, high], autorange: false });
  // Plotly would draw what is constant at 0.001 between −1 and 1.
  if (values[0] && values[0] === values[last])
    return between(...[values[0] / 2, values[0] * 1.5].sort((a, b) => a - b));
  if (!calm || last < 20) return { autorange: true };
  const low = values[Math.floor(last * 0.02)];
  const high = values[Math.ceil(last * 0.98)];
  const room = log ? 0 : (high - low) * 0.08;
  return low < high ? between(low - room, high + room) : { autorange: true };
}

function notes(lines, { log }) {
  return lines.flatMap(({ label, curve }) => {
    const { steps, values } = curve.points;
    const whose = lines.length > 1 ? `${label}: ` : "";
    const atLeast = curve.thinned ? "at least " : "";
    const said = [
      ["NaN", Number.isNaN],
      ["∞", x => x === Infinity],
      ["−∞", x => x === -Infinity],
    ].map(([name, is]) => {
      const where = steps.filter((_, i) => is(values[i]));
      return (
        where.length > 0 &&
        h(
          "span",
          { class: "bad" },
          `${whose}${name} at ${atLeast}${plural(where.length, "step")}, first at ${count(where[0])}. `,
        )
      );
    });
    const hidden = log ? values.filter(value => Number.isFinite(value) && value <= 0).length : 0;
    const thinned =
      curve.thinned && `${whose}Drawn with ${count(steps.length)} points, every spike kept; zoom in for more. `;
    return [...said, hidden > 0 && `${whose}${plural(hidden, "value")} ≤ 0 cannot be drawn on a log scale. `, thinned];
  });
}

function spoken({ label, curve }) {
  const { steps, values } = curve.points;
  const last = steps.length - 1;
  return `${label}: ${measured(values[0])} at step ${count(steps[0])}, ${measured(values[last])} at step ${count(steps[last])}.`;
}
