/** The parts of an operation that are lists: attempts, checkpoints, events, the job, what it left. */

import * as actions from "./actions.js";
import { url } from "./api.js";
import { h } from "./dom.js";
import {
  ago,
  bytes,
  clock,
  count,
  duration,
  joules,
  measured,
  plural,
  secondsBetween,
  short,
  UNKNOWN,
  words,
  workersOf,
} from "./format.js";
import { may } from "./session.js";
import { redoneAfter } from "./summary.js";
import { stateOf } from "./timeline.js";
import { chip, RESUMABLE } from "./status.js";

const MOST = 200;

export const empty = text => h("p", { class: "empty" }, text);
export const loading = () => h("p", { class: "quiet" }, "Loading…");

export function table(caption, heads, rows) {
  const head = ([text, number, props]) => h("th", { scope: "col", class: number && "number", ...props }, text);
  return h(
    "div",
    { class: "scroll", tabindex: "0", role: "region", "aria-label": caption },
    h(
      "table",
      {},
      h("caption", { class: "hidden" }, caption),
      h("thead", {}, h("tr", {}, heads.map(head))),
      h("tbody", {}, rows),
    ),
  );
}

export const number = (text, props = {}) => h("td", { class: "number", ...props }, text);

export function attempts(operation, all) {
  if (!all.length) return empty("It has not been tried yet: it waits for a slot. The Workers page says what is free.");
  const rows = all
    .slice(-MOST)
    .reverse()
    .map(attempt => {
      const next = all[attempt.number]; // they are numbered from 1
      const { start_step, end_step } = operation.lineage.find(entry => entry.attempt === attempt.number) ?? {};
      const redone = redoneAfter(attempt, next);
      return h(
        "tr",
        { key: attempt.number },
        number(attempt.number),
        h("td", {}, chip(stateOf(operation, attempt))),
        h(
          "td",
          {},
          workersOf(attempt),
          h(
            "span",
            { class: "small quiet" },
            ` ${[...new Set((attempt.members.length ? attempt.members : [attempt]).map(({ host }) => host))].join(", ")}${attempt.trainer_pid ? `, pid ${attempt.trainer_pid}` : ""}`,
          ),
        ),
        number(ago(attempt.claimed_at)),
        number(duration(secondsBetween(attempt.claimed_at, attempt.ended_at))),
        number(attempt.last_step === null ? UNKNOWN : `${count(attempt.first_step)}–${count(attempt.last_step)}`),
        number(
          start_step === undefined || start_step === end_step
            ? "nothing"
            : `${count(start_step)}–${end_step === null ? "" : count(end_step - 1)}`,
        ),
        number(redone ? count(redone) : UNKNOWN),
        h(
          "td",
          { class: "wide" },
          attempt.error && h("p", {}, h("strong", {}, words(attempt.error.code)), ": ", attempt.error.message),
          attempt.replay &&
            h(
              "p",
              { class: attempt.replay.differing ? "bad" : "quiet" },
              attempt.replay.differing
                ? `${plural(attempt.replay.differing, "value")} of ${count(attempt.replay.compared)} differ from what was reported before`
                : `${plural(attempt.replay.compared, "value")} compared with before: all equal`,
            ),
          h(
            "p",
            { class: "small quiet" },
            attempt.energy_j === null
              ? `energy unknown: ${words(attempt.energy_reason ?? "no reason given")}`
              : `${joules(attempt.energy_j)}${attempt.lost_j ? `, ${joules(attempt.lost_j)} of it lost` : ""}`,
          ),
          attempt.environment && h("details", {}, h("summary", {}, "Environment"), pairs(attempt.environment)),
        ),
      );
    });
  const heads = [
    ["Attempt", true],
    ["Ended"],
    ["Worker"],
    ["Claimed", true],
    ["Took", true],
    ["Steps", true],
    ["Counts for", true],
    ["Redone", true],
    ["What happened"],
  ];
  return [
    table("Attempts, newest first", heads, rows),
    all.length > MOST && h("p", { class: "small" }, `The newest ${MOST} of ${count(all.length)}.`),
  ];
}

/** A JSON object, flat. */
export function pairs(values, prefix = "") {
  return h(
    "dl",
    { class: "pairs" },
    flat(values, prefix).map(([name, value]) =>
      h(
        "div",
        {},
        h("dt", {}, name),
        h("dd", { class: value === null && "quiet" }, typeof value === "string" ? value : JSON.stringify(value)),
      ),
    ),
  );
}

function flat(values, prefix) {
  return Object.entries(values).flatMap(([name, value]) =>
    value && typeof value === "object" && !Array.isArray(value) && Object.keys(value).length
      ? flat(value, `${prefix}${name}.`)
      : [[prefix + name, value]],
  );
}

export function checkpoints(operation, all, changed) {
  if (!all) return loading();
  if (!all.length)
    return empty(
      operation.kind === "command"
        ? "A command has checkpoints where it makes them, by relight.Run."
        : "No checkpoint yet; the first one comes before step 0.",
    );
  const rows = [...all]
    .reverse()
    .slice(0, MOST)
    .map(checkpoint => {
      const { id, step, status } = checkpoint;
      const usable = status === "committed" && may("operate");
      const own = checkpoint.operation_id === operation.id;
      return h(
        "tr",
        { key: id },
        number(count(step)),
        number(count(checkpoint.epoch)),
        h(
          "td",
          {},
          checkpoint.checkpoint_type,
          checkpoint.phase === "evaluate" && h("span", { class: "small quiet" }, " before evaluation"),
        ),
        h(
          "td",
          {},
          status,
          !checkpoint.in_lineage && h("span", { class: "small quiet" }, ", left behind"),
          !own && h("span", { class: "small quiet" }, `, of ${short(checkpoint.operation_id)}`),
        ),
        number(checkpoint.attempt),
        number(measured(checkpoint.monitored)),
        number(bytes(checkpoint.size_bytes)),
        number(ago(checkpoint.created_at)),
        h(
          "td",
          { class: "buttons" },
          usable &&
            RESUMABLE.has(operation.status) &&
            h(
              "button",
              {
                type: "button",
                "aria-label": `Resume from step ${step}`,
                onclick: () => actions.resume(operation, [], changed, id),
              },
              "Resume",
            ),
          usable &&
            operation.kind === "training" &&
            own &&
            h(
              "button",
              { type: "button", "aria-label": `Fork from step ${step}`, onclick: () => actions.fork(operation, id) },
              "Fork",
            ),
          usable &&
            own &&
            h(
              "button",
              {
                type: "button",
                class: "plain",
                "aria-label": `Delete the checkpoint of step ${step}`,
                onclick: () => actions.removeCheckpoint(operation, checkpoint, changed),
              },
              "Delete",
            ),
        ),
      );
    });
  const heads = [
    ["Step", true],
    ["Epoch", true],
    ["Why"],
    ["Status"],
    ["Attempt", true],
    ["Monitored", true],
    ["Size", true],
    ["Saved", true],
    ["What to do"],
  ];
  return [
    table("Checkpoints, newest first", heads, rows),
    all.length > MOST && h("p", { class: "small" }, `The newest ${MOST} of ${count(all.length)}.`),
  ];
}

export function events(all) {
  if (!all.length) return loading();
  return [
    h(
      "ol",
      { class: "events", reversed: true },
      all
        .slice(-1000)
        .reverse()
        .map(event =>
          h(
            "li",
            { key: event.seq, class: `event is-${event.to_status}` },
            h("time", { datetime: event.at, class: "small quiet" }, clock(event.at)),
            h("span", {}, event.message),
            event.from_status !== event.to_status && chip(event.to_status),
          ),
        ),
    ),
    all.length > 1000 && h("p", { class: "small" }, `The newest 1,000 of ${count(all.length)}.`),
  ];
}

export function job(operation) {
  const { job, priority, max_retries } = operation;
  const sections = {
    execution: job.execution,
    config: job.config,
    ...(Object.keys(job.env).length && { env: job.env }),
  };
  const rest = Object.fromEntries(
    Object.entries(job).filter(([name, value]) => !(name in sections) && name !== "env" && value !== null),
  );
  return h(
    "div",
    { class: "job" },
    h("section", {}, h("h2", {}, "Job"), pairs({ ...rest, priority, max_retries })),
    Object.entries(sections).map(([name, values]) =>
      h(
        "section",
        {},
        h("h2", {}, name),
        Object.keys(values).length ? pairs(values) : h("p", { class: "quiet" }, "nothing"),
      ),
    ),
  );
}

/** What it left. `metrics`: of each its name, first and last point. */
export function artifacts(operation, all, metrics) {
  if (!all || !metrics) return loading();
  return [
    pictures(operation, all),
    scores(metrics),
    all.length
      ? table(
          "Artifacts",
          [["File"], ["Step", true], ["Attempt", true], ["Size", true], ["SHA-256"]],
          all.map(file =>
            h(
              "tr",
              { key: file.id },
              h(
                "td",
                {},
                h(
                  "a",
                  {
                    href: fileUrl(operation, file),
                    download: file.name.split("/").at(-1),
                  },
                  file.name,
                ),
              ),
              number(count(file.step)),
              number(file.attempt),
              number(bytes(file.size_bytes)),
              h("td", {}, h("code", { class: "small" }, file.sha256.slice(0, 16), "…")),
            ),
          ),
        )
      : empty(
          "Nothing yet: a training leaves its model when it is completed, a command what its job names under artifacts.",
        ),
    h(
      "p",
      {},
      "All metrics: ",
      h("a", { href: url(`/operations/${operation.id}/export?format=csv`), download: true }, "CSV"),
      ", ",
      h(
        "a",
        { href: url(`/operations/${operation.id}/export?format=tensorboard`), download: true },
        "TensorBoard event file",
      ),
      ".",
      operation.logs && [" In the storage root: ", h("code", {}, operation.logs)],
    ),
  ];
}

const fileUrl = (operation, file) => url(`/operations/${operation.id}/artifacts/${file.id}`);

/** Of each name the one of the latest attempt; the server says of no other file that it may be shown. */
function pictures(operation, all) {
  const shown = new Map(all.filter(({ name }) => name.toLowerCase().endsWith(".png")).map(file => [file.name, file]));
  if (!shown.size) return null;
  return h(
    "section",
    { "aria-labelledby": "pictures" },
    h("h2", { id: "pictures" }, "Pictures"),
    h(
      "div",
      { class: "pictures" },
      [...shown.values()].map(file =>
        h(
          "figure",
          { key: file.id },
          h(
            "a",
            { href: fileUrl(operation, file), target: "_blank", rel: "noopener", title: "Full size" },
            h("img", { src: fileUrl(operation, file), alt: file.name, loading: "lazy" }),
          ),
          h("figcaption", { class: "small" }, file.name.replace(/^files\//, "")),
        ),
      ),
    ),
  );
}

/** What a training says of itself at its end. */
function scores(metrics) {
  const final = metrics.filter(({ name, last }) => name.startsWith("final/") && last);
  if (!final.length) return null;
  return h(
    "section",
    { class: "scores", "aria-labelledby": "scores" },
    h("h2", { id: "scores" }, "Scores"),
    table(
      "Scores",
      [["Score"], ["Value", true]],
      final.map(({ name, last: [, value] }) =>
        h("tr", { key: name }, h("td", {}, name.slice("final/".length)), number(measured(value))),
      ),
    ),
  );
}
