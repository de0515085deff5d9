/** A new operation, or a fork of one: a form made from the workload's and the job's own schemas. */

import { get, newKey, send } from "./api.js";
import { h, render } from "./dom.js";
import { entered, fields } from "./fields.js";
import { count, short } from "./format.js";
import { problem, say } from "./notice.js";
import { go, link } from "./router.js";

const COMMON = [
  "max_epochs",
  "max_steps",
  "batch_size",
  "learning_rate",
  "optimizer",
  "scheduler",
  "seed",
  "checkpoint_every",
  "early_stop_patience",
  "precision",
];
const LABEL = /^[^=\s]+=.+$/;

export function submission(main, _, query) {
  const forked = query.get("fork");
  const gone = new AbortController();
  document.title = `${forked ? "Fork" : "New operation"} · Relight`;
  const state = { values: {}, problems: {}, defs: {} };
  let workloads = null;
  let schema = null;
  let parent = null;
  let checkpoints = [];
  let failed = null;
  let refused = null;
  let resolved = null;
  let busy = false;
  let workload = "";
  let checkpoint = query.get("checkpoint") ?? "";
  let sent = { body: null, key: null };
  let accept = false;

  async function load() {
    try {
      const path = `/operations/${forked}`;
      [{ items: workloads }, schema, parent, { items: checkpoints }] = await Promise.all([
        get("/workloads", gone.signal),
        get("/schemas/job", gone.signal),
        forked ? get(path, gone.signal) : null,
        forked ? get(`${path}/checkpoints`, gone.signal) : { items: [] },
      ]);
      state.defs = schema.$defs;
      workload = parent?.workload ?? workloads.find(({ name }) => name === "digits")?.name ?? workloads[0]?.name ?? "";
      failed = null;
    } catch (error) {
      if (error.name === "AbortError") return;
      failed = error;
    }
    draw();
  }

  const execution = () => schema.$defs.Execution;
  const offered = () => workloads.find(({ name }) => name === workload);
  const configSchema = () =>
    offered()?.config_schema ?? {
      properties: Object.fromEntries(Object.keys(parent?.job.config ?? {}).map(name => [name, {}])),
    };
  const top = {
    properties: {
      name: { type: "string", description: "what it is called in lists" },
      labels: { type: "string", description: "key=value, several joined by commas" },
      priority: { type: "integer", description: "higher runs first", default: 0 },
      max_retries: { type: "integer", default: 3 },
    },
  };

  /** The body of the request. Raises {path, problem}. */
  function body() {
    const { name, labels, ...rest } = entered(top, "", state);
    const pairs = (labels ?? "")
      .split(",")
      .map(each => each.trim())
      .filter(Boolean);
    if (!pairs.every(pair => LABEL.test(pair)))
      throw { path: "labels", problem: "give key=value, several joined by commas" };
    const common = {
      config: entered(configSchema(), "config.", state),
      execution: entered(execution(), "execution.", state),
      labels: Object.fromEntries(
        pairs.map(pair => [pair.slice(0, pair.indexOf("=")), pair.slice(pair.indexOf("=") + 1)]),
      ),
      ...rest,
    };
    if (forked)
      return {
        ...(name && { name }),
        ...(checkpoint && { from_checkpoint: checkpoint }),
        accept_changes: accept,
        overrides: common,
      };
    return { workload, ...(name && { name }), ...common };
  }

  async function post(dryRun) {
    if (busy) return;
    state.problems = {};
    refused = resolved = null;
    try {
      const wish = body();
      const text = JSON.stringify(wish);
      // The same wish again, after an answer that was lost or a double click, is the same operation.
      if (sent.body !== text) sent = { body: text, key: newKey() };
      busy = true;
      draw();
      const path = forked ? `/operations/${forked}/fork` : "/operations";
      const answer = await send("POST", path + (dryRun ? "?dry_run=true" : ""), wish, dryRun ? undefined : sent.key);
      if (dryRun) resolved = answer;
      else {
        say(`${answer.name} is submitted.`);
        return go(link(`operations/${answer.id}`));
      }
    } catch (error) {
      const found = error.path ? [{ field: error.path, problem: error.problem }] : (error.details?.errors ?? []);
      for (const { field, problem } of found) state.problems[field.replace(/^overrides\./, "")] = problem;
      refused = error.path ? { message: `${error.path}: ${error.problem}` } : error;
    } finally {
      busy = false;
    }
    draw();
    (document.querySelector("[aria-invalid]") ?? document.getElementById("answer"))?.focus();
  }

  function draw() {
    if (failed) return render(main, h("h1", {}, "New operation"), problem(failed, load));
    if (!schema) return render(main, h("p", { class: "quiet" }, "Loading…"));
    if (!forked && !workloads.length)
      return render(
        main,
        h(
          "section",
          { class: "empty" },
          h("h1", {}, "No workload yet"),
          h("p", {}, "Workloads come with workers; none has registered yet."),
          h("pre", {}, "ops worker"),
        ),
      );
    const was = parent?.job;
    render(
      main,
      h("h1", {}, forked ? `Fork ${parent.name}` : "New operation"),
      forked &&
        h(
          "p",
          {},
          `A new operation that begins at a checkpoint of ${short(forked)}, with its job but for what you change here. `,
          h("a", { href: link(`operations/${forked}`) }, parent.name),
          " stays as it is.",
        ),
      h(
        "form",
        {
          class: "submission",
          novalidate: true,
          onsubmit: event => {
            event.preventDefault();
            post(false);
          },
        },
        h(
          "fieldset",
          {},
          h("legend", {}, forked ? "From" : "What"),
          forked ? fromField() : workloadField(),
          !forked && offered()?.title && h("p", { class: "small quiet" }, offered().title),
          h("div", { class: "grid" }, fields(top, "", { ...state, was: parent })),
        ),
        h(
          "fieldset",
          {},
          h("legend", {}, "Config of the workload"),
          h("div", { class: "grid" }, fields(configSchema(), "config.", { ...state, was: was?.config })),
        ),
        h(
          "fieldset",
          {},
          h("legend", {}, "Execution"),
          h(
            "div",
            { class: "grid" },
            fields(execution(), "execution.", { ...state, was: was?.execution, only: COMMON }),
          ),
          h(
            "details",
            {},
            h("summary", {}, "All other knobs"),
            h(
              "div",
              { class: "grid" },
              fields(execution(), "execution.", { ...state, was: was?.execution, except: COMMON }),
            ),
          ),
        ),
        answer(),
        h(
          "div",
          { class: "buttons sticky" },
          h("button", { type: "button", disabled: busy, onclick: () => post(true) }, "Dry run"),
          h("button", { class: "primary", disabled: busy }, forked ? "Fork" : "Submit"),
        ),
      ),
    );
  }

  function workloadField() {
    const option = name => h("option", { value: name, selected: name === workload }, name);
    return h(
      "div",
      { class: "field" },
      h("label", { for: "workload" }, "Workload"),
      h(
        "select",
        {
          id: "workload",
          onchange: event => {
            workload = event.target.value;
            resolved = refused = null;
            draw();
          },
        },
        workloads.map(({ name }) => option(name)),
      ),
    );
  }

  function fromField() {
    const usable = checkpoints.filter(each => each.status === "committed").reverse();
    return h(
      "div",
      { class: "field" },
      h("label", { for: "from" }, "Checkpoint"),
      h(
        "select",
        {
          id: "from",
          onchange: event => {
            checkpoint = event.target.value;
          },
        },
        h("option", { value: "" }, "the newest of its lineage"),
        usable.map(each =>
          h(
            "option",
            { value: each.id, selected: each.id === checkpoint },
            `step ${count(each.step)}, epoch ${count(each.epoch)} (attempt ${each.attempt})`,
          ),
        ),
      ),
      h(
        "label",
        { class: "check" },
        h("input", {
          type: "checkbox",
          checked: accept,
          onchange: event => {
            accept = event.target.checked;
          },
        }),
        "Go on even if code or data have changed; it is then best effort",
      ),
    );
  }

  function answer() {
    if (refused)
      return h(
        "div",
        { id: "answer", class: "problem", role: "alert", tabindex: "-1" },
        h("p", {}, h("strong", {}, "Not accepted"), `: ${refused.message}`),
      );
    if (resolved)
      return h(
        "section",
        { id: "answer", class: "remark", tabindex: "-1" },
        h("h2", {}, "This is what would run"),
        h("pre", { tabindex: "0" }, JSON.stringify(resolved, null, 2)),
      );
    return null;
  }

  load();
  draw();
  return {
    stop() {
      gone.abort();
    },
    update: (path, changed) => changed.get("fork") === forked && changed.get("checkpoint") === query.get("checkpoint"),
  };
}
