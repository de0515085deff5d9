/** All operations: live, filtered, in pages. */

import { get, query as search } from "./api.js";
import { h, render } from "./dom.js";
import {
  ago,
  count,
  duration,
  measured,
  ofChildren,
  percent,
  secondsBetween,
  short,
  UNKNOWN,
  words,
} from "./format.js";
import { problem } from "./notice.js";
import { poll } from "./poll.js";
import { adjust, go, link } from "./router.js";
import { may } from "./session.js";
import { chip, icon, STATUSES } from "./status.js";

const POLL_MS = 2000;
const PAGE = 50;
const FILTERS = ["status", "kind", "workload", "label", "q", "mine", "parent_id"];
const EVERY = "all"; // parent_id: children too
const TYPING_MS = 250;

export function list(main, _, query) {
  document.title = "Operations · Relight";
  const gone = new AbortController();
  const chosen = new Map(); // to compare: id → name
  let page = null;
  let counts = null;
  let workloads = [];
  let failed = null;
  let typing;

  const ask = async () => {
    const { parent_id = "none", ...wanted } = Object.fromEntries(query);
    if (parent_id !== EVERY) wanted.parent_id = parent_id;
    const [found, counted] = await Promise.all([
      get(`/operations${search({ ...wanted, limit: PAGE })}`, gone.signal),
      get("/counts", gone.signal),
    ]);
    failed = null;
    // Times are relative: what is unchanged still grows older.
    [page, counts] = [found, counted];
    draw();
  };
  const polling = poll(ask, POLL_MS, error => {
    failed = error;
    page ??= { items: [], next_cursor: null };
    draw();
  });
  get("/workloads", gone.signal).then(
    body => {
      workloads = body.items.map(each => each.name);
      draw();
    },
    () => {},
  );

  function narrow(values) {
    adjust({ ...values, cursor: null });
  }

  function toggle(status) {
    const all = new Set((query.get("status") ?? "").split(",").filter(Boolean));
    if (!all.delete(status)) all.add(status);
    narrow({ status: [...all].join(",") });
  }

  function draw() {
    render(
      main,
      h(
        "div",
        { class: "heading" },
        h("h1", {}, "Operations"),
        may("operate") && h("a", { class: "button primary", href: "#/new" }, "New operation"),
      ),
      filters(),
      failed && problem(failed, polling.now),
      ofStudy(),
      page === null ? h("p", { class: "quiet" }, "Loading…") : page.items.length ? table() : nothing(),
      page !== null && paging(),
    );
  }

  function filters() {
    const on = new Set((query.get("status") ?? "").split(","));
    const later = name => event => {
      clearTimeout(typing);
      const { value } = event.target;
      typing = setTimeout(() => narrow({ [name]: value }), TYPING_MS);
    };
    const option = (value, text = value) => h("option", { value, selected: (query.get("kind") ?? "") === value }, text);
    return h(
      "form",
      {
        class: "filters",
        role: "search",
        "aria-label": "Filter operations",
        onsubmit: event => event.preventDefault(),
      },
      h(
        "div",
        { class: "statuses", role: "group", "aria-label": "Status" },
        STATUSES.map(status =>
          h(
            "button",
            {
              type: "button",
              class: `filter is-${status}`,
              "aria-pressed": String(on.has(status)),
              onclick: () => toggle(status),
            },
            icon(status),
            status,
            counts && status in counts && h("span", { class: "count" }, count(counts[status])),
          ),
        ),
      ),
      h(
        "div",
        { class: "fields" },
        h("input", {
          id: "search",
          type: "search",
          placeholder: "Name, or beginning of an id",
          "aria-label": "Search by name or id",
          oninput: later("q"),
          value: typingIn("search") ?? query.get("q") ?? "",
        }),
        h("input", {
          id: "label",
          placeholder: "Label, or key=value",
          "aria-label": "Label",
          oninput: later("label"),
          value: typingIn("label") ?? query.get("label") ?? "",
        }),
        h("input", {
          id: "workload",
          placeholder: "Workload",
          "aria-label": "Workload",
          list: "workloads",
          oninput: later("workload"),
          value: typingIn("workload") ?? query.get("workload") ?? "",
        }),
        h(
          "datalist",
          { id: "workloads" },
          workloads.map(name => h("option", { value: name })),
        ),
        h(
          "select",
          { "aria-label": "Kind", onchange: event => narrow({ kind: event.target.value }) },
          option("", "Every kind"),
          option("training"),
          option("measurement"),
          option("command"),
          option("study"),
        ),
        h(
          "label",
          { class: "check" },
          h("input", {
            type: "checkbox",
            checked: query.has("mine"),
            onchange: event => narrow({ mine: event.target.checked ? "true" : null }),
          }),
          "Mine",
        ),
        h(
          "label",
          { class: "check", title: "What studies have planned is seen on their pages too" },
          h("input", {
            type: "checkbox",
            checked: query.get("parent_id") === EVERY,
            onchange: event => narrow({ parent_id: event.target.checked ? EVERY : null }),
          }),
          "Children of studies",
        ),
        FILTERS.some(name => query.has(name)) &&
          h(
            "button",
            {
              type: "button",
              class: "plain",
              onclick: () => narrow(Object.fromEntries(FILTERS.map(name => [name, null]))),
            },
            "Clear filters",
          ),
      ),
    );
  }

  function ofStudy() {
    const study = query.get("parent_id");
    if (!study || study === EVERY) return null;
    return h(
      "p",
      { class: "remark" },
      "The children of study ",
      h("a", { href: link(`operations/${study}`) }, short(study)),
      ", newest first.",
    );
  }

  function table() {
    return h(
      "div",
      { class: "scroll" },
      h(
        "table",
        { class: "operations" },
        h("caption", { class: "hidden" }, "Operations, newest first"),
        h(
          "thead",
          {},
          h(
            "tr",
            {},
            h("th", { scope: "col" }, h("span", { class: "hidden" }, "Compare")),
            ["Status", "Operation", "Workload"].map(text => h("th", { scope: "col" }, text)),
            h("th", { scope: "col" }, "Progress"),
            ["Loss", "Attempt", "Ran", "Submitted"].map(text => h("th", { scope: "col", class: "number" }, text)),
          ),
        ),
        h("tbody", {}, page.items.map(row)),
      ),
    );
  }

  function row(operation) {
    const { id, name, status, progress, labels } = operation;
    const choose = event => {
      event.target.checked ? chosen.set(id, name) : chosen.delete(id);
      draw();
    };
    return h(
      "tr",
      { key: id },
      h(
        "td",
        { class: "choose" },
        h("input", { type: "checkbox", "aria-label": `Compare ${name}`, checked: chosen.has(id), onchange: choose }),
      ),
      h("td", { class: "status" }, chip(status)),
      h(
        "td",
        { class: "name" },
        h("a", { href: link(`operations/${id}`) }, name),
        " ",
        h("code", { class: "quiet" }, short(id)),
        Object.entries(labels).map(([key, value]) => h("span", { class: "label" }, `${key}=${value}`)),
        operation.error &&
          !["running", "completed"].includes(status) &&
          h("span", { class: "why" }, operation.error.message),
      ),
      h("td", { class: "workload", "data-label": "Workload" }, operation.workload),
      h("td", { class: "progress" }, progressCell(operation)),
      h("td", { class: "number", "data-label": "Loss" }, measured(progress?.loss)),
      h("td", { class: "number", "data-label": "Attempt" }, operation.attempt || UNKNOWN),
      h(
        "td",
        { class: "number", "data-label": "Ran" },
        operation.started_at ? duration(secondsBetween(operation.started_at, operation.ended_at)) : UNKNOWN,
      ),
      h("td", { class: "number", "data-label": "Submitted" }, ago(operation.created_at)),
    );
  }

  function progressCell({ status, kind, progress }) {
    if (!progress) return h("span", { class: "quiet" }, UNKNOWN);
    const eta = status === "running" && progress.eta_s !== null ? `, ${duration(progress.eta_s)} left` : "";
    return [
      progress.percent !== null &&
        h(
          "span",
          { class: `bar is-${status}`, "aria-hidden": "true" },
          h("span", { style: { width: `${progress.percent}%` } }),
        ),
      h(
        "span",
        { class: "small" },
        kind === "study"
          ? ofChildren(progress)
          : progress.measurement && status === "running"
            ? `${words(progress.measurement.phase)}${eta}`
            : progress.percent === null
              ? `step ${count(progress.step)}`
              : `${percent(progress.percent)}${eta}`,
      ),
    ];
  }

  function nothing() {
    if (FILTERS.some(name => query.has(name))) return h("p", { class: "empty" }, "No operation is like that.");
    if (failed || query.has("cursor")) return null;
    return h(
      "section",
      { class: "empty" },
      h("h2", {}, "Nothing has been submitted yet"),
      h("p", {}, "Train something small; it takes half a minute:"),
      h("pre", {}, "ops train digits --max-epochs 50 --watch"),
      h(
        "p",
        {},
        "or fill in ",
        h("a", { href: "#/new" }, "the form"),
        ". Then cancel it, and resume it: it goes on bit for bit where it was. Your own training begins with ",
        h("code", {}, "ops init"),
        ".",
      ),
    );
  }

  function paging() {
    return h(
      "nav",
      { class: "paging", "aria-label": "Pages of the list" },
      query.has("cursor") && h("button", { type: "button", onclick: () => adjust({ cursor: null }) }, "Newest"),
      page.next_cursor &&
        h(
          "a",
          { class: "button", href: link("", { ...Object.fromEntries(query), cursor: page.next_cursor }) },
          "Older",
        ),
      chosen.size > 0 &&
        h(
          "span",
          { class: "chosen" },
          h(
            "button",
            {
              type: "button",
              class: "primary",
              disabled: chosen.size < 2,
              onclick: () => go(link("compare", { ids: [...chosen.keys()].join(",") })),
            },
            `Compare ${chosen.size}`,
          ),
          h(
            "button",
            {
              type: "button",
              class: "plain",
              onclick: () => {
                chosen.clear();
                draw();
              },
            },
            "None",
          ),
        ),
    );
  }

  function step(by) {
    const links = [...main.querySelectorAll("td.name a")];
    const at = links.indexOf(document.activeElement);
    links[at < 0 ? 0 : Math.min(Math.max(at + by, 0), links.length - 1)]?.focus();
  }

  return {
    stop() {
      gone.abort();
      polling.stop();
      clearTimeout(typing);
    },
    update(path, changed) {
      const turned = changed.get("cursor") !== query.get("cursor");
      query = changed;
      if (turned) scrollTo(0, 0);
      page = turned ? null : page;
      draw();
      polling.now();
      return true;
    },
    keys: { "/": () => document.getElementById("search").focus(), j: () => step(1), k: () => step(-1) },
  };
}

/** What somebody is typing is not taken back. */
function typingIn(id) {
  const input = document.getElementById(id);
  return input && input === document.activeElement ? input.value : null;
}
