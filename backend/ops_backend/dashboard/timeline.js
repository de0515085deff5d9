/** Attempts on the axis of time: who ran when, how each ended, and where nobody did. */

import { now } from "./api.js";
import { h } from "./dom.js";
import { clock, count, duration, plural, workersOf } from "./format.js";
import { redoneAfter } from "./summary.js";
import { icon, TERMINAL } from "./status.js";

const MOST = 200; // bars; older attempts are in the table
const FAULTS = new Set(["failed", "lost", "checkpoint_corrupt", "refused"]);

export function timeline(operation, attempts) {
  if (!attempts.length) return null;
  const shown = attempts.slice(-MOST);
  const from = Date.parse(shown.length < attempts.length ? shown[0].claimed_at : operation.created_at);
  const last = shown.at(-1);
  const to = TERMINAL.has(operation.status) ? Date.parse(operation.ended_at ?? last.ended_at) : now();
  const span = Math.max(to - from, 1);
  const place = iso => 100 * Math.min(1, Math.max(0, ((iso ? Date.parse(iso) : to) - from) / span));
  const bars = shown.map((attempt, i) => bar(operation, attempt, shown[i + 1], place));
  return h(
    "section",
    { class: "timeline", "aria-label": "Attempts over time", key: "timeline" },
    h("ol", { class: "track" }, bars),
    h(
      "p",
      { class: "ends", "aria-hidden": "true" },
      h("span", {}, clock(new Date(from).toISOString())),
      h("span", { class: "span" }, duration(span / 1000)),
      h("span", {}, TERMINAL.has(operation.status) ? clock(new Date(to).toISOString()) : "now"),
    ),
    shown.length < attempts.length &&
      h("p", { class: "small" }, `The last ${MOST} of ${count(attempts.length)} attempts.`),
  );
}

function bar(operation, attempt, next, place) {
  const state = stateOf(operation, attempt);
  const [left, right] = [place(attempt.claimed_at), place(attempt.ended_at)];
  const said = sentence(attempt, state, next);
  return h(
    "li",
    {
      class: `attempt is-${state}`,
      key: attempt.number,
      title: said,
      style: { left: `${left}%`, width: `${Math.max(right - left, 0)}%` },
    },
    h("span", { class: "bar-label", "aria-hidden": "true" }, FAULTS.has(state) && icon(state), attempt.number),
    h("span", { class: "hidden" }, said),
  );
}

/** How it ended; of one that has not, what it does. */
export function stateOf(operation, attempt) {
  return attempt.outcome ?? (attempt.ended_at ? "lost" : operation.status === "cancelling" ? "cancelling" : "running");
}

function sentence(attempt, state, next) {
  const redone = redoneAfter(attempt, next);
  return [
    `Attempt ${attempt.number} on ${workersOf(attempt)}: ${state.replaceAll("_", " ")}`,
    attempt.last_step === null
      ? `from step ${count(attempt.start_step)}`
      : `steps ${count(attempt.start_step)} to ${count(attempt.last_step)}`,
    redone > 0 && `${plural(redone, "step")} redone by the next`,
    attempt.error?.message,
  ]
    .filter(Boolean)
    .join("; ");
}
