/** The head of an operation's page: what it is, how far it is, and what can be said of its exactness and energy. */

import { h } from "./dom.js";
import {
  ago,
  count,
  duration,
  joules,
  measured,
  ofChildren,
  percent,
  plural,
  progressed,
  secondsBetween,
  short,
  UNKNOWN,
  words,
} from "./format.js";
import { say } from "./notice.js";
import { link } from "./router.js";
import { chip, TERMINAL } from "./status.js";

export function summary(operation, attempts, buttons) {
  const { id, name, status, labels, submitted_by, created_at } = operation;
  return [
    h(
      "div",
      { class: "heading" },
      h("div", {}, crumbs(operation), h("h1", {}, name)),
      h("div", { class: "buttons" }, buttons),
    ),
    h(
      "p",
      { class: "facts" },
      chip(status),
      h("span", {}, operation.workload),
      h(
        "button",
        { type: "button", class: "plain id", title: "Copy the id", onclick: () => copy(id) },
        h("code", {}, short(id)),
        h("span", { class: "hidden" }, " Copy the id"),
      ),
      h("span", {}, `submitted by ${submitted_by} `, ago(created_at)),
      operation.not_before &&
        status === "pending" &&
        h("span", {}, `waits until ${new Date(operation.not_before).toLocaleTimeString("en-GB")}`),
      waiting(operation),
      Object.entries(labels).map(([key, value]) => h("span", { class: "label" }, `${key}=${value}`)),
    ),
    fault(operation),
    h(
      "div",
      { class: "tiles" },
      tiles(operation, attempts),
    ),
    origin(operation),
  ];
}

/** The scheduler's job that is to bring a worker. */
function waiting({ engine, status }) {
  if (!engine || status !== "pending") return null;
  const name = engine.engine[0].toUpperCase() + engine.engine.slice(1);
  const job = engine.job ? ` job ${engine.job}` : "";
  const why = engine.reason ? ` (${engine.reason})` : "";
  return h("span", {}, `waiting for ${name}${job}: ${engine.state}${why}`);
}

function tiles(operation, attempts) {
  if (operation.kind === "study")
    return [childrenTile(operation), timeTile(operation), attemptsTile(operation, attempts)];
  const measures = operation.kind === "measurement";
  const live = !TERMINAL.has(operation.status);
  const ofTraining = () => [progressTile(operation), lossTile(operation)];
  const ofMeasurement = () => live && [phaseTile(operation), powerTile(operation)];
  return [
    measures ? ofMeasurement() : ofTraining(),
    timeTile(operation),
    attemptsTile(operation, attempts),
    !measures && exactnessTile(operation),
    energyTile(operation),
  ];
}

function crumbs({ parent_id }) {
  return h(
    "p",
    { class: "crumbs" },
    h("a", { href: "#/" }, "Operations"),
    parent_id && [" / ", h("a", { href: link(`operations/${parent_id}`) }, `study ${short(parent_id)}`)],
  );
}

function tile(title, value, ...more) {
  return h(
    "section",
    { class: "tile", key: title },
    h("h2", {}, title),
    h("p", { class: "value" }, value),
    more.filter(Boolean).map(each => h("p", { class: "small" }, each)),
  );
}

function progressTile({ status, progress }) {
  if (!progress) return tile("Progress", UNKNOWN, status === "pending" ? "waits for a slot" : null);
  const of = progress.steps_total === null ? "" : ` of ${count(progress.steps_total)}`;
  const label = progress.percent === null ? `step ${count(progress.step)}` : percent(progress.percent);
  const step = `step ${count(progress.step)}${of}${progress.epoch === null ? "" : `, epoch ${count(progress.epoch)}`}`;
  return tile("Progress", label, bar(status, progress), step !== label && step);
}

const bar = (status, { percent }) =>
  percent !== null &&
  h("span", { class: `bar wide is-${status}`, "aria-hidden": "true" }, h("span", { style: { width: `${percent}%` } }));

/** How many have ended; its tab has how. */
function childrenTile({ status, progress }) {
  if (!progress) return tile("Children", UNKNOWN, status === "pending" ? "waits for a slot" : "not planned yet");
  return tile("Children", ofChildren(progress), bar(status, progress), progress.steps_total !== null && "have ended");
}

function phaseTile({ status, progress }) {
  const told = progress?.measurement;
  if (!told) return tile("Phase", UNKNOWN, status === "pending" ? "waits for a slot" : null);
  return tile("Phase", words(told.phase), told.unit && progressed(told));
}

function powerTile({ progress }) {
  const told = progress?.measurement;
  const { power_w = null, temperature_c = null } = told ?? {};
  return tile(
    "Power now",
    power_w === null ? UNKNOWN : `${measured(power_w)} W`,
    temperature_c !== null && `${Math.round(temperature_c)} °C`,
    told && power_w === null && "no meter tells it",
  );
}

const lossTile = ({ progress }) =>
  tile(
    "Loss",
    measured(progress?.loss),
    progress?.samples_per_s != null && `${measured(progress.samples_per_s)} samples/s`,
  );

function timeTile({ status, started_at, ended_at, progress }) {
  const ran = started_at ? duration(secondsBetween(started_at, ended_at)) : UNKNOWN;
  if (TERMINAL.has(status)) return tile("Took", ran, ended_at && h("span", {}, "ended ", ago(ended_at)));
  return tile("Time left", status === "running" ? duration(progress?.eta_s) : UNKNOWN, started_at && `runs for ${ran}`);
}

function attemptsTile({ attempt, failures, max_retries }, attempts) {
  const used = Math.min(failures, max_retries); // the last failure had no retry left
  const redone = attempts.reduce((sum, each, i) => sum + redoneAfter(each, attempts[i + 1]), 0);
  return tile(
    "Attempts",
    attempt ? count(attempt) : UNKNOWN,
    redone > 0 && `${plural(redone, "step")} redone`,
    `${count(used)} of ${plural(max_retries, "retry", "retries")} used`,
  );
}

/** Steps of an attempt that its successor runs again. */
export function redoneAfter(attempt, next) {
  return next && attempt.last_step !== null ? Math.max(0, attempt.last_step + 1 - next.start_step) : 0;
}

function exactnessTile({ exactness }) {
  if (!exactness) return tile("Exactness", UNKNOWN, "known when it has started");
  const promised = exactness.promise === "promised";
  return tile(
    "Exactness",
    promised ? "promised" : "best effort",
    promised ? "a resume is bit for bit" : null,
    ...exactness.reasons,
  );
}

function energyTile({ energy }) {
  const { total_j, known_j, upper_bound_j, lost_j, quality } = energy;
  if (total_j === null)
    return tile(
      "Energy",
      UNKNOWN,
      `unknown: ${words(energy.reason ?? "no reason given")}`,
      known_j !== null && `at least ${joules(known_j)}`,
      upper_bound_j !== null && `at most ${joules(upper_bound_j)} of shared devices`,
    );
  return tile("Energy", joules(total_j), quality && words(quality), lost_j > 0 && `${joules(lost_j)} lost`);
}

const RESUMING = {
  study: "Resume runs what is missing or failed, and keeps what is done.",
  measurement: "Resume measures again, from the beginning.",
  command: "Resume runs it again, from its last checkpoint if it has one.",
  training: "Resume tries again from its last checkpoint.",
};

function fault({ status, kind, error, cancel_reason, exit_unconfirmed }) {
  return [
    error &&
      status !== "completed" &&
      h(
        "div",
        { class: status === "failed" ? "problem" : "remark", key: "fault" },
        h(
          "p",
          {},
          status !== "failed" && "An attempt before this one ended with ",
          h("strong", {}, words(error.code)),
          ": ",
          error.message,
        ),
        error.details?.log_tail &&
          h(
            "details",
            {},
            h("summary", {}, "Last lines of its output"),
            h("pre", { class: "tail", tabindex: "0" }, text(error.details.log_tail)),
          ),
        status === "failed" && h("p", { class: "small" }, RESUMING[kind]),
      ),
    cancel_reason && h("p", { class: "remark", key: "reason" }, `Cancelled: ${cancel_reason}`),
    exit_unconfirmed &&
      h(
        "p",
        { class: "remark", key: "unconfirmed" },
        "Its worker was lost while it was cancelling: whether its process has ended is not known.",
      ),
  ];
}

const text = tail => (Array.isArray(tail) ? tail.join("\n") : String(tail));

function origin({ id, resumed_from, forked_from, replay_of }) {
  const other = parent => [
    h("a", { href: link(`operations/${parent}`) }, short(parent)),
    " (",
    h("a", { href: link("compare", { ids: `${parent},${id}` }) }, "compare"),
    ")",
  ];
  const said = [
    forked_from && ["a fork of ", other(forked_from.operation_id), `, from step ${count(forked_from.step)}`],
    replay_of && ["a replay of ", other(replay_of)],
    resumed_from &&
      `this attempt goes on from the ${resumed_from.checkpoint_type} checkpoint of step ${count(resumed_from.step)}, epoch ${count(resumed_from.epoch)}`,
  ].filter(Boolean);
  return (
    said.length > 0 &&
    h(
      "p",
      { class: "facts quiet" },
      said.map(each => h("span", {}, each)),
    )
  );
}

async function copy(id) {
  try {
    await navigator.clipboard.writeText(id);
    say("The id is copied.");
  } catch {
    say(id); // no clipboard over plain http
  }
}
