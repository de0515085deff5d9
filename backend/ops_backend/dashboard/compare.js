/** Several operations in one view: their curves over each other, and what is different between their jobs. */

import { get } from "./api.js";
import { curves } from "./curves.js";
import { h, render } from "./dom.js";
import { measured, short } from "./format.js";
import { problem } from "./notice.js";
import { poll } from "./poll.js";
import { link } from "./router.js";
import { chip, TERMINAL } from "./status.js";

const POLL_MS = 3000;
const MOST = 20;

export function compare(main, _, query) {
  document.title = "Compare · Relight";
  const gone = new AbortController();
  let ids = (query.get("ids") ?? "").split(",").filter(Boolean).slice(0, MOST);
  const missing = [];
  const head = h("div", { keep: true });
  const below = h("div", { keep: true });
  let all = null;
  let drawn = null;
  let failed = null;

  async function ask() {
    const before = all;
    const found = await Promise.all(
      ids.map(id =>
        get(`/operations/${id}`, gone.signal).catch(error => {
          if (error.status !== 404 && error.status !== 422) throw error;
          missing.push(id);
          return null;
        }),
      ),
    );
    ids = ids.filter((_, i) => found[i]);
    [all, failed] = [found.filter(Boolean), null];
    draw();
    if (!drawn)
      drawn = curves(
        below,
        all.map(({ id, name }) => ({ id, label: `${name} ${short(id)}` })),
        true,
      );
    else drawn.more(all.filter(operation => !before.includes(operation)).map(({ id }) => id));
  }

  function draw() {
    render(
      main,
      h("div", { class: "heading" }, h("h1", {}, "Compare")),
      failed && problem(failed, polling.now),
      missing.length > 0 && h("p", { class: "remark" }, `Not there (any more): ${missing.map(short).join(", ")}`),
      head,
      h("h2", { class: "apart" }, "Curves"),
      below,
    );
    if (ids.length < 2)
      return render(
        head,
        h("p", { class: "empty" }, "Choose two operations or more in ", h("a", { href: "#/" }, "the list"), "."),
      );
    if (!all) return render(head, failed ? null : h("p", { class: "quiet" }, "Loading…"));
    render(
      head,
      h(
        "div",
        { class: "scroll", tabindex: "0", role: "region", "aria-label": "What is different" },
        h(
          "table",
          {},
          h("caption", { class: "hidden" }, "What is different between the operations"),
          h(
            "thead",
            {},
            h(
              "tr",
              {},
              h("th", { scope: "col" }, ""),
              all.map(({ id, name }) =>
                h(
                  "th",
                  { scope: "col" },
                  h("a", { href: link(`operations/${id}`) }, name),
                  " ",
                  h("code", { class: "quiet" }, short(id)),
                ),
              ),
            ),
          ),
          h(
            "tbody",
            {},
            row("status", ({ status }) => chip(status)),
            row("step", ({ progress }) => progress?.step ?? "–"),
            row("loss", ({ progress }) => measured(progress?.loss)),
            differing().map(([name, values]) =>
              h(
                "tr",
                { key: name },
                h("th", { scope: "row" }, name),
                values.map(value => h("td", {}, written(value))),
              ),
            ),
          ),
        ),
      ),
    );
  }

  const row = (name, value) =>
    h(
      "tr",
      {},
      h("th", { scope: "row" }, name),
      all.map(each => h("td", {}, value(each))),
    );

  function differing() {
    const flat = all.map(({ job }) =>
      Object.fromEntries(
        ["config", "execution", "env", "resources"]
          .flatMap(part => Object.entries(job[part]).map(([name, value]) => [`${part}.${name}`, value]))
          .concat([
            ["workload", job.workload],
            ["command", job.command?.join(" ")],
          ]),
      ),
    );
    return [...new Set(flat.flatMap(Object.keys))]
      .map(name => [name, flat.map(job => job[name])])
      .filter(([, values]) => new Set(values.map(value => JSON.stringify(value))).size > 1);
  }

  draw();
  const polling =
    ids.length < 2
      ? null
      : poll(
          async () => {
            if (!all || all.some(({ status }) => !TERMINAL.has(status))) await ask();
          },
          POLL_MS,
          error => {
            failed = error;
            draw();
          },
        );
  return {
    stop() {
      gone.abort();
      polling?.stop();
      drawn?.stop();
    },
  };
}

function written(value) {
  if (value === undefined) return "–";
  return typeof value === "number"
    ? String(Number(value.toPrecision(6)))
    : typeof value === "string"
      ? value
      : JSON.stringify(value);
}
