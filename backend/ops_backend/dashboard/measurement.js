/** A measurement: its phases; then every figure with its unit, bound and source, or why it is not known. */

import { url } from "./api.js";
import { h } from "./dom.js";
import { bytes, count, duration, measured, percent, progressed, UNKNOWN, words } from "./format.js";
import { TERMINAL } from "./status.js";
import { remarks, section } from "./study_facts.js";
import { empty, number, pairs, table } from "./tables.js";

const PHASES = "preflight gap baseline load warmup thermal_floor window first_token compute".split(" ");
const SIGNS = { done: "✓", now: "▶", ended: "■", later: "○" };
const SPOKEN = { done: "done", now: "now", ended: "ended here", later: "to come" };

// In the order of the contract: a database sorts the names of an object.
const FIGURES = {
  tokens_per_s: "generated tokens per second",
  total_tokens_per_s: "tokens per second, prompts included",
  j_per_output_token: "energy per generated token",
  j_per_output_token_adjusted: "energy per generated token, above idle",
  energy_j: "energy of the window",
  energy_adjusted_j: "energy of the window, above idle",
  power_mean_w: "mean power",
  window_s: "window",
  latency_p50_s: "latency of a batch, median",
  latency_p90_s: "latency, 90 %",
  latency_p99_s: "latency, 99 %",
  first_token_p50_s: "time to first token, median",
  first_token_p90_s: "time to first token, 90 %",
  first_token_p99_s: "time to first token, 99 %",
  flops: "FLOPs of the window",
  flops_per_s: "FLOPs per second",
  mfu: "MFU",
  peak_memory_bytes: "peak memory",
};

const of = (value, unit) => (value === null || value === undefined ? UNKNOWN : `${measured(value)} ${unit}`);
const list = entries => entries.filter(Boolean).join(", ");

/**
 * @param {object[] | undefined} results its answers, the newest first
 * @param {object[] | undefined} artifacts
 */
export function measurement(operation, results, artifacts) {
  const result = results?.[0]?.content ?? null;
  const told = operation.progress?.measurement ?? null;
  return h(
    "div",
    { class: "job measurement" },
    section("Phases", stepper(operation, told, result)),
    result ? parts(operation, result, artifacts ?? []) : !told && empty(waiting(operation)),
  );
}

const waiting = ({ status }) =>
  TERMINAL.has(status)
    ? "It has no figures: it ended before they were computed."
    : "Its figures appear here by themselves.";

/** What of the way is done, which is known by its order, and how long each part took, once it is. */
function stepper({ status }, told, result) {
  const at = result ? PHASES.length : told ? PHASES.indexOf(told.phase) : -1;
  const live = status === "running" && told;
  return [
    h(
      "ol",
      { class: "stepper" },
      PHASES.map((phase, i) => {
        const state = i < at ? "done" : i === at ? (live ? "now" : "ended") : "later";
        const took = result?.phases_s[phase];
        return h(
          "li",
          { key: phase, class: `phase ${state}`, "aria-current": state === "now" && "step" },
          h("span", { class: "sign", "aria-hidden": "true" }, SIGNS[state]),
          words(phase),
          h("span", { class: "hidden" }, `, ${SPOKEN[state]}`),
          result && h("span", { class: "small quiet" }, took === undefined ? " –" : ` ${duration(took)}`),
        );
      }),
    ),
    live && now(told),
  ];
}

function now(told) {
  const { phase, done, total, unit, power_w, temperature_c } = told;
  const share = unit && total ? Math.min(100, (100 * done) / total) : null;
  return [
    share !== null &&
      h(
        "div",
        {
          class: "bar wide is-running",
          key: "bar",
          role: "progressbar",
          "aria-label": words(phase),
          "aria-valuenow": Math.round(share),
          "aria-valuemin": 0,
          "aria-valuemax": 100,
        },
        h("span", { style: { width: `${share}%` } }),
      ),
    h(
      "p",
      { class: "facts", key: "now" },
      h("strong", {}, words(phase)),
      unit && h("span", {}, progressed(told)),
      share !== null && h("span", {}, percent(share)),
      h("span", {}, power_w === null ? "no meter tells its power" : `${measured(power_w)} W`),
      temperature_c !== null && h("span", {}, `${Math.round(temperature_c)} °C`),
    ),
  ];
}

function parts(operation, result, artifacts) {
  return [
    section("Figures", figures(result), samples(operation, result, artifacts)),
    result.devices.length > 0 && section("Devices", devices(result.devices)),
    remarks(result),
    section("How it was measured", facts(result), method(result.methodology)),
    section("Environment", pairs(result.environment)),
  ];
}

const method = said =>
  h(
    "dl",
    { class: "pairs method" },
    Object.entries(said).map(([what, how]) => h("div", {}, h("dt", {}, words(what)), h("dd", {}, how))),
  );

function figures({ figures }) {
  const unknown = Object.values(figures).some(({ value }) => value === null);
  const rows = Object.entries(FIGURES)
    .filter(([name]) => name in figures)
    .map(([name, label]) => {
      const { value, unit, source, uncertainty, reason } = figures[name];
      return h(
        "tr",
        { key: name },
        h("td", { class: "words" }, label, h("br"), h("code", { class: "small quiet" }, name)),
        number(value === null ? h("span", { class: "quiet" }, "not known") : figure(name, value, unit)),
        number(value === null || uncertainty === null ? UNKNOWN : bound(name, uncertainty, unit)),
        h("td", {}, words(source)),
        unknown && h("td", { class: "wide" }, reason ?? ""),
      );
    });
  const heads = [["Figure"], ["Value", true], ["Bound of its error", true], ["Source"]];
  if (unknown) heads.push(["Why not known"]);
  return table("Figures", heads, rows);
}

function figure(name, value, unit) {
  if (unit === "B") return bytes(value);
  if (name === "mfu") return `${measured(100 * value)} %`;
  return unit === "1" ? measured(value) : `${measured(value)} ${unit}`;
}

/** Two digits: more of it say nothing. */
function bound(name, uncertainty, unit) {
  const short = Number(uncertainty.toPrecision(2));
  return `± ${unit === "B" || name === "mfu" ? figure(name, short, unit) : `${short} ${unit}`}`;
}

function samples({ id }, { series }, artifacts) {
  const file = artifacts.find(({ name }) => name === series);
  if (!file) return series && h("p", { class: "small quiet" }, `The samples of the window: ${series}.`);
  const href = url(`/operations/${id}/artifacts/${file.id}`);
  return h("p", {}, "The samples of the window: ", h("a", { href, download: series.split("/").at(-1) }, series), ".");
}

const quiet = text => h("span", { class: "small quiet" }, text);

function devices(all) {
  const rows = all.map(each =>
    h(
      "tr",
      { key: each.device },
      h("td", { class: "words" }, each.name ?? each.device, each.name && quiet(` ${each.device}`)),
      h("td", {}, words(`${each.source}, ${each.quality}`)),
      number([of(each.energy_j, "J"), each.error_j !== null && quiet(` ± ${measured(each.error_j)}`)]),
      number(of(each.energy_adjusted_j, "J")),
      number(of(each.baseline_w, "W")),
      number(of(each.power_max_w, "W")),
      number(of(each.temperature_max_c, "°C")),
      number(count(each.ticks)),
      h("td", {}, slowed(each.throttled_s) || (each.reason ? words(each.reason) : "")),
    ),
  );
  const heads = [
    ["Device"],
    ["Source"],
    ["Energy", true],
    ["Above idle", true],
    ["Idle", true],
    ["Highest power", true],
    ["Highest temperature", true],
    ["Counter ticks", true],
    ["Slowed by, or why not known"],
  ];
  return table("Devices", heads, rows);
}

const slowed = reasons => list(Object.entries(reasons).map(([why, s]) => `${words(why)} ${duration(s)}`));

function facts({ config_hash, n_prompts, tokens_in, tokens_out, thermal_throttle, baseline, warmup, flops }) {
  const { throttled, duration_s, reasons } = thermal_throttle;
  const slow = throttled ? `${duration(duration_s)}: ${slowed(reasons)}` : "never";
  const idle = Object.entries(baseline.power_w).map(([device, power]) => `${device} ${of(power, "W")}`);
  return pairs({
    prompts: count(n_prompts),
    "tokens in": count(tokens_in),
    "tokens out": count(tokens_out),
    "slowed by heat or power": throttled === null ? UNKNOWN : slow,
    "idle power": list([
      idle.join(", ") || UNKNOWN,
      baseline.origin === "cache" && `${duration(baseline.age_s)} old`,
      baseline.drift !== null && `drift ${measured(100 * baseline.drift)} %`,
      baseline.reason,
    ]),
    "warm-up": list([
      `${count(warmup.batches)} batches`,
      warmup.converged !== null && (warmup.converged ? "settled" : "not settled"),
      warmup.cv !== null && `coefficient of variation ${measured(warmup.cv)}`,
    ]),
    ...(flops && {
      parameters: count(flops.params),
      "FLOPs of the prompts": measured(flops.prefill),
      "FLOPs of decoding": measured(flops.decode),
    }),
    "hash of the config": config_hash.slice(0, 16),
  });
}
