/** A study: what its children have given so far, as a table and as plots, and what it came to. It lives by polling. */

import { get, query } from "./api.js";
import { prepare } from "./canvas.js";
import { h, render } from "./dom.js";
import { Figure } from "./figure.js";
import { big, count, duration, flops, joules, measured, plural, toNumber, UNKNOWN, words } from "./format.js";
import { problem } from "./notice.js";
import { poll } from "./poll.js";
import { link } from "./router.js";
import { chip, STATUSES, TERMINAL } from "./status.js";
import { fits, predictions, remarks, section } from "./study_facts.js";
import * as plots from "./study_plots.js";
import { empty, loading, number, table } from "./tables.js";

const POLL_MS = 3000;
const PAGE = 500;
const SHOWN = 100; // rows at first
const COMPARED = 20; // as many as that page takes

/**
 * @param {HTMLElement} root
 * @param {() => object} now the operation as it is known
 */
export function study(root, now) {
  const { id } = now();
  const path = `/operations/${id}`;
  const gone = new AbortController();
  const figures = new Map();
  const view = { status: "", most: SHOWN, metric: null, axis: null, sort: null, falls: false };
  let children = null;
  let monitor = null; // the metric that is a sweep's loss
  let said = null; // what its attempts said of it: what is skipped with the plan, and rows once it is reduced
  let whyUnknown = null; // of measurements: why no joules are known
  let seen = ""; // what was read last
  let readAt = 0;
  let failed = null;

  /** Of a large study seldom: a page of children is read as often as one of a small one. */
  async function ask() {
    const { status, attempt, children: counts } = now();
    const state = JSON.stringify([status, attempt, counts]);
    if (state === seen && TERMINAL.has(status)) return;
    if (children && Date.now() - readAt < (POLL_MS * children.length) / PAGE) return;
    const [found, { items }] = await Promise.all([allChildren(), get(`${path}/results`, gone.signal)]);
    [children, said] = [found, items[0]?.content ?? null];
    if (monitor === null && children.length && children[0].about.budget)
      monitor =
        (await get(`/operations/${children[0].operation_id}`, gone.signal)).job.execution.checkpoint_monitor ?? "loss";
    whyUnknown ??= await whyNoJoules();
    [seen, readAt, failed] = [state, Date.now(), null];
    draw();
  }

  /** As the first of the measurements that have completed has it; null where joules are known, or nothing is. */
  async function whyNoJoules() {
    const done = now().workload === "measurement" ? children.filter(each => each.status === "completed") : [];
    if (!done.length || done.some(({ final }) => plots.ENERGY in final)) return null;
    const { items } = await get(`/operations/${done[0].operation_id}/results`, gone.signal);
    return items[0]?.content.figures?.[plots.ENERGY]?.reason ?? "no run says why";
  }

  async function allChildren() {
    const found = [];
    for (let cursor = null; ; ) {
      const page = await get(`${path}/children${query({ limit: PAGE, cursor })}`, gone.signal);
      found.push(...page.items);
      cursor = page.next_cursor;
      if (cursor === null) return found;
    }
  }

  const polling = poll(ask, POLL_MS, error => {
    failed = error;
    draw();
  });

  function change(values) {
    Object.assign(view, values);
    draw();
  }

  function draw() {
    if (!children) return render(root, failed ? problem(failed, polling.now) : loading());
    const isSweep = now().job.study.type === "isoflop";
    const reduced = said?.rows.length > 0;
    const known = reduced ? said : { ...said, ...soFar(children, monitor, isSweep) };
    render(
      root,
      h(
        "div",
        { class: "job study" },
        failed && problem(failed, polling.now),
        !children.length ? empty(unplanned()) : counts(),
        children.length > 0 && (isSweep ? sweepParts(known, reduced) : gridParts(known, reduced)),
        remarks(known),
        children.length > 0 && section("Children", childrenTable(isSweep)),
      ),
    );
  }

  function unplanned() {
    return TERMINAL.has(now().status)
      ? "It has no children: its plan was never made. Its events say why."
      : "It is being planned. Its children appear here by themselves.";
  }

  function counts() {
    const states = STATUSES.map(status => [status, children.filter(each => each.status === status).length]);
    const begun = children.filter(each => each.status !== "pending");
    const known = begun.filter(each => each.energy_j !== null);
    const energy_j = known.reduce((sum, each) => sum + each.energy_j, 0);
    const unknown = begun.filter(each => each.energy_j === null);
    const reasons = [...new Set(unknown.map(each => words(each.energy_reason ?? "no reason given")))];
    const compared = filtered()
      .filter(each => each.status !== "pending")
      .slice(0, COMPARED)
      .map(each => each.operation_id);
    return h(
      "p",
      { class: "facts", key: "counts" },
      states.filter(([, n]) => n).map(([status, n]) => chip(status, `${count(n)} ${status}`)),
      known.length > 0 && h("span", {}, `${unknown.length ? "at least " : ""}${joules(energy_j)}`),
      unknown.length > 0 &&
        h("span", {}, `energy of ${plural(unknown.length, "child", "children")} unknown: ${reasons.join(", ")}`),
      compared.length > 1 &&
        h("a", { href: link("compare", { ids: compared.join(",") }) }, `Compare ${compared.length} children`),
      h("a", { href: link("", { parent_id: id }) }, "As a list"),
    );
  }

  function sweepParts(sweep, reduced) {
    if (!plots.anyLoss(sweep))
      return section("Plots", empty("No child has a result yet. The plots appear here with the first one."));
    const panels = {
      "IsoFLOP curves": plots.isoflop(sweep),
      ...(sweep.fit && {
        "Scaling laws": plots.scaling(sweep),
        "Tokens per parameter": plots.tokensPerParameter(sweep),
      }),
      "Energy against loss": plots.energy(sweep),
    };
    return [
      section("Plots", drawn(panels), !reduced && later("Parabolas, scaling laws and predictions come")),
      sweep.fit?.predictions.length > 0 && section("Predictions", predictions(sweep.fit.predictions)),
      sweep.fit && (sweep.fit.approach2 || sweep.fit.approach3) && section("Fits", fits(sweep)),
    ];
  }

  function gridParts({ groups }, reduced) {
    const metrics = [...new Set(groups.flatMap(group => Object.keys(group.metrics)))].sort(byInterest);
    const front = plots.paretoFront(groups);
    const panels = front.length ? { "Energy against throughput": plots.throughput(groups) } : {};
    if (!metrics.length)
      return section("Results", empty("No child has a result yet. The table appears here with the first one."));
    const axes = plots.axesOf(groups);
    const metric = metrics.includes(view.metric) ? view.metric : metrics[0];
    const axis = axes.includes(view.axis) ? view.axis : axes[0];
    return [
      section(
        "Results",
        groupsTable(groups, axes, metrics, front),
        front.length > 0 &&
          h("p", { class: "small" }, "★ on the Pareto front: no other has as many tokens per second for as few joules."),
        whyUnknown && !front.length && h("p", { class: "small" }, `No joules per token are known: ${whyUnknown}.`),
        !reduced && later("This is of what has completed so far. Intervals come"),
      ),
      axes.length > 0 &&
        section(
          "Plot",
          h(
            "div",
            { class: "curve-tools", role: "group", "aria-label": "What is drawn" },
            choice("Metric", metrics, metric, value => change({ metric: value })),
            choice("Against", axes, axis, value => change({ axis: value })),
          ),
          drawn({ ...panels, [`${metric} against ${axis}`]: plots.grid(groups, metric, axis) }),
        ),
      axes.length === 0 && front.length > 0 && section("Plot", drawn(panels)),
    ];
  }

  function choice(text, values, chosen, chose) {
    return h(
      "label",
      {},
      text,
      h(
        "select",
        { onchange: event => chose(event.target.value) },
        values.map(value => h("option", { value, selected: value === chosen }, value)),
      ),
    );
  }

  /** @param {Object<string, import("./figure.js").Panel>} panels by name */
  function drawn(panels) {
    for (const [name, figure] of figures)
      if (!(name in panels)) {
        figure.stop();
        figures.delete(name);
      }
    return h(
      "div",
      { class: "charts" },
      Object.entries(panels).map(([name, panel]) => {
        if (!figures.has(name)) figures.set(name, new Figure(name));
        figures.get(name).draw(panel);
        return figures.get(name).element;
      }),
    );
  }

  function groupsTable(groups, axes, metrics, front) {
    const value = ({ point, metrics }) =>
      view.sort in point ? point[view.sort] : view.sort in metrics ? toNumber(metrics[view.sort].mean) : null;
    const sorted = view.sort ? [...groups].sort((a, b) => order(value(a), value(b), view.falls)) : groups;
    const head = (name, isNumber) => [
      h(
        "button",
        {
          type: "button",
          class: "plain sort",
          onclick: () => change({ sort: name, falls: view.sort === name && !view.falls }),
        },
        short(name),
        view.sort === name && h("span", { "aria-hidden": "true" }, view.falls ? " ▼" : " ▲"),
      ),
      isNumber,
      { "aria-sort": view.sort === name ? (view.falls ? "descending" : "ascending") : "none" },
    ];
    return table(
      "Points, over their cycles",
      [
        ...(front.length ? [["Front"]] : []),
        ...axes.map(name => head(name)),
        ["Cycles", true],
        ...metrics.map(name => head(name, true)),
      ],
      sorted.map(group =>
        h(
          "tr",
          { key: JSON.stringify(group.point) },
          front.length > 0 && h("td", {}, front.includes(group) ? "★" : ""),
          axes.map(axis => h("td", {}, axis in group.point ? plots.said(group.point[axis]) : UNKNOWN)),
          number(count(Math.max(0, ...Object.values(group.metrics).map(({ n }) => n)))),
          metrics.map(metric => number(statistic(group.metrics[metric]))),
        ),
      ),
    );
  }

  const filtered = () => children.filter(each => !view.status || each.status === view.status);

  function childrenTable(isSweep) {
    const those = filtered();
    const states = STATUSES.filter(status => children.some(each => each.status === status));
    const heads = [
      ["Child"],
      ["Status"],
      ...(isSweep
        ? [["Budget", true], ["N", true], ["D", true], [monitor, true]]
        : [["Cycle", true], ["Last values"]]),
      ["Ran", true],
      ["Energy", true],
      ["Why"],
    ];
    return [
      h(
        "div",
        { class: "curve-tools" },
        h(
          "label",
          {},
          "Status",
          h(
            "select",
            { onchange: event => change({ status: event.target.value }) },
            h("option", { value: "", selected: view.status === "" }, "every one"),
            states.map(status => h("option", { value: status, selected: view.status === status }, status)),
          ),
        ),
      ),
      table("Children, in the order of the plan", heads, those.slice(0, view.most).map(child => row(child, isSweep))),
      those.length > view.most &&
        h("button", { type: "button", onclick: () => change({ most: Infinity }) }, `Show all ${count(those.length)}`),
    ];
  }

  function row(child, isSweep) {
    const { about, training, final } = child;
    const trained = training?.units ?? null;
    return h(
      "tr",
      { key: child.operation_id },
      h("td", { class: "words" }, h("a", { href: link(`operations/${child.operation_id}`) }, child.name)),
      h("td", {}, chip(child.status)),
      isSweep
        ? [
            number(flops(about.budget)),
            number(big(about.params)),
            number(trained === null ? [h("span", { class: "quiet" }, "planned "), big(about.tokens)] : big(trained)),
            number(measured(final[monitor])),
          ]
        : [number(count(about.cycle)), h("td", { class: "words" }, lastValues(final))],
      number(duration(child.running_s)),
      number(joules(child.energy_j)),
      h(
        "td",
        { class: "words" },
        child.error && child.status !== "completed" && h("p", { class: "bad" }, child.error),
        child.energy_j === null &&
          child.status !== "pending" &&
          h("p", { class: "small quiet" }, `energy unknown: ${words(child.energy_reason ?? "no reason given")}`),
      ),
    );
  }

  const redraw = () => draw();
  addEventListener("theme", redraw);
  prepare();
  draw();
  return {
    stop() {
      gone.abort();
      polling.stop();
      removeEventListener("theme", redraw);
      for (const figure of figures.values()) figure.stop();
    },
  };
}

const later = what => h("p", { class: "small quiet" }, `${what} once all children have ended.`);
const short = field => field.slice(field.lastIndexOf(".") + 1);

/** What the children have given, in the shape of a result: without fits and intervals. */
function soFar(children, monitor, isSweep) {
  if (isSweep)
    return {
      rows: children.map(({ name, about, final, ...rest }) => ({
        ...rest,
        experiment_id: name,
        compute_budget: about.budget,
        model_size: about.params,
        final_loss: final[monitor] ?? null,
      })),
    };
  const groups = new Map();
  for (const { about, final, status } of children) {
    if (status !== "completed") continue;
    const key = JSON.stringify(about.point);
    if (!groups.has(key)) groups.set(key, { point: about.point, values: {} });
    const { values } = groups.get(key);
    for (const [name, value] of Object.entries(final))
      if (Number.isFinite(toNumber(value))) (values[name] ??= []).push(value);
  }
  const mean = all => ({ n: all.length, mean: all.reduce((sum, each) => sum + each, 0) / all.length, low: null });
  return {
    groups: [...groups.values()].map(({ point, values }) => ({
      point,
      metrics: Object.fromEntries(Object.entries(values).map(([name, all]) => [name, mean(all)])),
    })),
  };
}

function statistic(found) {
  if (!found) return UNKNOWN;
  const half = found.low === null || found.low === undefined ? null : (found.high - found.low) / 2;
  return `${measured(found.mean)}${half === null ? "" : ` ± ${measured(Number(half.toPrecision(2)))}`}`;
}

const lastValues = final =>
  Object.entries(final)
    .sort(([a], [b]) => byInterest(a, b))
    .slice(0, 4)
    .map(([name, value]) => `${name} ${measured(value)}`)
    .join(", ") || UNKNOWN;

function byInterest(a, b) {
  const ranks = {
    val_loss: 0,
    loss: 1,
    tokens_per_s: 0,
    j_per_output_token: 0.1,
    j_per_output_token_adjusted: 0.2,
    first_token_p50_s: 0.3,
    mfu: 0.4,
    wall_time_seconds: 4,
    energy_j: 5,
  };
  const rank = name => ranks[name] ?? (name.startsWith("val") ? 2 : 3);
  return rank(a) - rank(b) || a.localeCompare(b);
}

/** What is not known is last either way. */
function order(a, b, falls) {
  if (a === null || b === null) return (a === null) - (b === null);
  const by = typeof a === "number" && typeof b === "number" ? a - b : plots.said(a).localeCompare(plots.said(b));
  return falls ? -by : by;
}
