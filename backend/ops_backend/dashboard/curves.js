/** The curves of one operation or of several, in one view: the same zoom, smoothing and scale for all. */

import { Away, get } from "./api.js";
import { colour, prepare } from "./canvas.js";
import { Chart } from "./chart.js";
import { Curve } from "./curve.js";
import { h, render } from "./dom.js";
import { plural } from "./format.js";
import { problem, say } from "./notice.js";

const KEY = "relight.curves";
const SHOWN = 12; // charts at first: thousands of metrics are not thousands of charts
const DRAW_MS = 1000;
const AGAIN_MS = 3000;
const STREAM_MS = 1000;

/**
 * @param {HTMLElement} root
 * @param {{id: string, label: string}[]} operations
 * @param {boolean} now whether to begin, or to wait a moment for the stream to stand: what is read before is read again
 */
export function curves(root, operations, now) {
  const gone = new AbortController();
  const charts = new Map(); // by metric
  const known = new Map(); // Curve by metric and operation
  let metrics = null; // names
  let most = SHOWN;
  let named = ""; // what their names are filtered by
  let range = null; // of steps, that is looked at
  let failed = null;
  let refreshing = false; // whether a curve has to be read anew
  let timer;
  let again;
  const view = { smoothing: 0, log: false, calm: false, ...JSON.parse(localStorage.getItem(KEY) ?? "{}") };

  const curveOf = (name, { id }) => {
    const key = `${name}\n${id}`;
    if (!known.has(key)) known.set(key, new Curve(id, name));
    return known.get(key);
  };
  const wanted = () => metrics.filter(name => name.toLowerCase().includes(named.toLowerCase())).slice(0, most);

  /** Everything anew: at first, and when a stream stands again. */
  async function load() {
    clearTimeout(first);
    for (const curve of known.values()) curve.loaded = false;
    await fill(true);
  }

  /** Reads what is wanted and not there yet, again and again while the server does not answer. */
  async function fill(names = false) {
    clearTimeout(again);
    try {
      if (names || !metrics) {
        const all = await Promise.all(operations.map(({ id }) => get(`/operations/${id}/metrics`, gone.signal)));
        metrics = [...new Set(all.flatMap(body => body.names))].sort(byImportance);
        draw();
      }
      await Promise.all(wanted().flatMap(name => operations.map(operation => read(name, operation))));
      failed = null;
    } catch (error) {
      if (error.name === "AbortError") return;
      failed = error;
      if (error instanceof Away) again = setTimeout(fill, AGAIN_MS);
    }
    draw();
  }

  async function read(name, operation) {
    const curve = curveOf(name, operation);
    if (curve.loaded) return;
    await curve.load(gone.signal);
    paint(name);
    await curve.look(range, gone.signal);
    paint(name);
  }

  function paint(name) {
    const lines = operations.map((operation, index) => ({
      label: operation.label,
      index,
      curve: curveOf(name, operation),
    }));
    charts.get(name)?.draw(lines, { ...view, range });
  }

  const paintAll = () => wanted().forEach(paint);

  async function zoom(to) {
    range = to && to[1] - to[0] >= 1 ? to : null;
    draw();
    paintAll();
    try {
      await Promise.all([...known.values()].filter(curve => curve.loaded).map(curve => curve.look(range, gone.signal)));
      paintAll();
    } catch (error) {
      if (error.name !== "AbortError") say(`Not drawn finer: ${error.message}`);
    }
  }

  function change(values) {
    Object.assign(view, values);
    localStorage.setItem(KEY, JSON.stringify(view));
    draw();
    paintAll();
  }

  /** What the stream brings: drawn together, once a second at most. */
  function take(id, report) {
    if (!metrics) return;
    const fresh = report.series.map(({ name }) => name).filter(name => !metrics.includes(name));
    if (fresh.length) {
      metrics = [...metrics, ...fresh].sort(byImportance);
      draw();
      fill();
    }
    for (const curve of known.values()) {
      if (curve.operationId === id && curve.take(report)) {
        curve.loaded = false;
        refreshing = true;
      }
    }
    timer ??= setTimeout(() => {
      timer = null;
      if (refreshing) {
        refreshing = false;
        fill();
      }
      paintAll();
    }, DRAW_MS);
  }

  function draw() {
    if (failed && !metrics)
      return render(
        root,
        problem(failed, () => fill(true)),
      );
    if (!metrics) return render(root, h("p", { class: "quiet" }, "Loading…"));
    if (!metrics.length)
      return render(
        root,
        h("p", { class: "empty" }, "No metric has been reported. What comes appears here by itself."),
      );
    for (const name of wanted()) if (!charts.has(name)) charts.set(name, new Chart(name, zoom));
    const found = metrics.filter(name => name.toLowerCase().includes(named.toLowerCase())).length;
    render(
      root,
      tools(),
      operations.length > 1 && legend(),
      failed && problem(failed, () => fill()),
      h(
        "div",
        { class: "charts" },
        wanted().map(name => charts.get(name).element),
      ),
      found > most &&
        h(
          "p",
          {},
          h(
            "button",
            {
              type: "button",
              onclick: () => {
                most += SHOWN;
                draw();
                fill();
              },
            },
            `Show more; ${plural(found - most, "metric")} not shown`,
          ),
        ),
    );
  }

  function tools() {
    const typed = index => event => {
      const value = Number(event.target.value);
      const to = range ? [...range] : [0, lastStep()];
      to[index] = value;
      zoom(event.target.value === "" ? null : to);
    };
    const step = index =>
      h("input", {
        inputmode: "numeric",
        size: 8,
        "aria-label": index ? "Until step" : "From step",
        placeholder: index ? "last" : "first",
        value: range ? String(Math.round(range[index])) : "",
        onchange: typed(index),
      });
    return h(
      "div",
      { class: "curve-tools", role: "group", "aria-label": "How curves are drawn" },
      metrics.length > 4 &&
        h("input", {
          type: "search",
          "aria-label": "Filter metrics",
          placeholder: "Filter metrics",
          oninput: event => {
            named = event.target.value;
            draw();
            fill();
            paintAll();
          },
        }),
      h(
        "label",
        {},
        "Smoothing",
        h("input", {
          type: "range",
          min: 0,
          max: 0.99,
          step: 0.01,
          value: String(view.smoothing),
          oninput: event => change({ smoothing: Number(event.target.value) }),
        }),
        h("output", {}, view.smoothing.toFixed(2)),
      ),
      h(
        "label",
        { class: "check" },
        h("input", { type: "checkbox", checked: view.log, onchange: event => change({ log: event.target.checked }) }),
        "Log scale",
      ),
      h(
        "label",
        { class: "check" },
        h("input", { type: "checkbox", checked: view.calm, onchange: event => change({ calm: event.target.checked }) }),
        "Ignore outliers",
      ),
      h("span", { class: "steps" }, "Steps", step(0), "to", step(1)),
      range && h("button", { type: "button", class: "plain", onclick: () => zoom(null) }, "Whole curve"),
    );
  }

  function legend() {
    return h(
      "ul",
      { class: "legend" },
      operations.map(({ id, label }, index) =>
        h(
          "li",
          {},
          h("span", { class: "swatch", style: { background: colour(index) }, "aria-hidden": "true" }),
          h("a", { href: `#/operations/${id}` }, label),
        ),
      ),
    );
  }

  const lastStep = () => Math.max(0, ...[...known.values()].map(curve => curve.whole.steps.at(-1) ?? 0));
  const themed = () => {
    if (metrics) {
      draw();
      paintAll();
    }
  };
  addEventListener("theme", themed);

  /** Of these operations what has come since, where no stream tells it. */
  async function more(ids) {
    if (!metrics) return;
    try {
      await Promise.all(
        wanted().flatMap(name =>
          ids
            .map(id => curveOf(name, { id }))
            .filter(curve => curve.loaded)
            .map(curve => curve.refresh(gone.signal)),
        ),
      );
      paintAll();
    } catch (error) {
      if (!(error instanceof Away) && error.name !== "AbortError") say(error.message);
    }
  }

  prepare();
  draw();
  const first = setTimeout(load, now ? 0 : STREAM_MS);
  return {
    load,
    more,
    take,
    stop() {
      gone.abort();
      clearTimeout(first);
      clearTimeout(timer);
      clearTimeout(again);
      removeEventListener("theme", themed);
      for (const chart of charts.values()) chart.stop();
    },
  };
}

/** What people look at first; `epoch` is what they look at last. */
function byImportance(a, b) {
  const rank = name =>
    name === "loss" ? 0 : name === "val_loss" ? 1 : name.startsWith("val") ? 2 : name === "epoch" ? 4 : 3;
  return rank(a) - rank(b) || a.localeCompare(b);
}
