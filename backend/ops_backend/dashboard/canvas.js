/** Where plotly draws, which is loaded when the first drawing is wanted. What is not seen is not drawn. */

import { h, render } from "./dom.js";

let loading;

function plotly() {
  loading ??= new Promise((resolve, reject) => {
    const script = h("script", { src: document.documentElement.dataset.plotly });
    script.onload = () => resolve(window.Plotly);
    script.onerror = () => {
      loading = null;
      script.remove();
      reject(new Error("the file that draws curves could not be loaded"));
    };
    document.head.append(script);
  });
  return loading;
}

/** Begins to load what draws, while the points are on their way; a failure is said where something is drawn. */
export function prepare() {
  plotly().catch(() => {});
}

/** Told apart in both themes, and by their dashes. */
export const LINES = ["solid", "dash", "dot", "dashdot", "longdash"];
export const COLOURS = 8;
export const colour = index => style(`--line-${index % COLOURS}`);
export const style = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

export const CONFIG = { displayModeBar: false, responsive: true, doubleClick: false };

/** A figure with its name above and a note below; whoever extends it says in `paint` how it is drawn. */
export class Canvas {
  constructor(name, ...above) {
    this.canvas = h("div", { class: "canvas", keep: true, role: "img", "aria-label": `${name}, not drawn yet` });
    this.note = h("p", { class: "note", keep: true });
    this.element = h(
      "figure",
      { class: "chart", key: name, keep: true },
      h("figcaption", {}, h("h3", {}, name)),
      above,
      this.canvas,
      this.note,
    );
    this.name = name;
    this.visible = false;
    this.watcher = new IntersectionObserver(
      ([entry]) => {
        this.visible = entry.isIntersecting;
        if (this.visible && this.wanted) this.draw(...this.wanted);
      },
      { rootMargin: "200px" },
    );
    this.watcher.observe(this.element);
  }

  /** Draws what is seen, as it was wanted last; the rest when it is scrolled to. */
  async draw(...wanted) {
    this.wanted = wanted;
    if (!this.visible || this.drawing) return;
    this.drawing = true;
    try {
      const Plotly = await plotly();
      while (this.wanted && this.visible) {
        const now = this.wanted;
        this.wanted = null;
        await this.paint(Plotly, ...now);
        this.painted = true;
      }
    } catch (error) {
      render(this.note, error.message);
    }
    this.drawing = false;
  }

  stop() {
    this.watcher.disconnect();
    this.visible = false;
    if (this.painted) window.Plotly?.purge(this.canvas);
  }
}

/** What every drawing looks like, and its axes. */
export function looks() {
  const grid = style("--line");
  return {
    layout: {
      margin: { l: 8, r: 12, t: 14, b: 8 },
      height: 240,
      paper_bgcolor: "transparent",
      plot_bgcolor: "transparent",
      font: { family: style("--sans"), size: 11, color: style("--quiet") },
      hoverlabel: { bgcolor: style("--raised"), bordercolor: grid, font: { color: style("--ink") } },
      showlegend: false,
    },
    axis: { gridcolor: grid, zeroline: false, linecolor: grid, tickcolor: grid, automargin: true },
  };
}

/** Plotly reads a few tags in the names it is given. */
export function escaped(text) {
  return text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll("%", "&#37;");
}
