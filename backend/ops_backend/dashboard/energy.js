/** What an operation cost in joules. What is not known is a dash and its reason, never 0. */

import { h } from "./dom.js";
import { count, duration, joules, measured, UNKNOWN, words } from "./format.js";
import { empty, loading, number, table } from "./tables.js";

const watts = power_w => (power_w === null ? UNKNOWN : `${measured(power_w)} W`);

/** What is known of it stands in the place of one that is not known whole. */
const atLeast = (energy_j, known_j) =>
  energy_j === null && known_j !== null ? `≥ ${joules(known_j)}` : joules(energy_j);
const energyOf = ({ energy_j, known_j }) => atLeast(energy_j, known_j);
const why = reason => (reason ? words(reason) : "");
const orWhy = (text, reason) => (reason ? `${UNKNOWN} (${words(reason)})` : text);

export function energy(ledger) {
  if (!ledger) return loading();
  if (!ledger.devices.length) return empty(`No joule is known: ${words(ledger.total.reason ?? "no reason given")}.`);
  return h(
    "div",
    { class: "job" },
    h("section", {}, h("h2", {}, "By use"), uses(ledger), facts(ledger)),
    h("section", {}, h("h2", {}, "By device"), devices(ledger)),
    ledger.attempts.length > 1 && h("section", {}, h("h2", {}, "By attempt"), attempts(ledger)),
    ledger.epochs.length > 0 && h("section", {}, h("h2", {}, "By epoch"), epochs(ledger)),
  );
}

function uses({ useful, lost, overhead, overhead_by_use, total, unattributed, upper_bound }) {
  const parts = [
    ["useful", useful],
    ["lost", lost],
    ["overhead", overhead],
    ...Object.entries(overhead_by_use)
      .filter(([, part]) => total.known_j !== null && part.energy_j !== 0)
      .map(([use, part]) => [`overhead: ${use}`, part]),
    ["total", total],
    ["unattributed, beside the total", unattributed],
    ["upper bound of shared devices, beside the total", upper_bound],
  ];
  const rows = parts
    .filter(([, part]) => part)
    .map(([what, part]) =>
      h(
        "tr",
        { key: what },
        h("td", {}, what),
        number(energyOf(part)),
        number(part.error_j === null ? UNKNOWN : `± ${joules(part.error_j)}`),
        h("td", { class: "wide" }, why(part.reason)),
      ),
    );
  return table("Energy by use", [["What"], ["Energy", true], ["Error", true], ["Why not known"]], rows);
}

function facts({ quality, provisional, per_work, above_idle, carbon, cost, thermal_throttle }) {
  const slowed = Object.entries(thermal_throttle.throttled_s ?? {}).map(([of, s]) => `${words(of)} ${duration(s)}`);
  const said = {
    quality: quality ? words(quality) : UNKNOWN,
    provisional: provisional ? "a later attempt may yet make useful joules lost ones" : "no: it is completed",
    "per step": orWhy(joules(per_work.per_step_j), per_work.reason),
    "per unit": orWhy(joules(per_work.per_unit_j), per_work.reason),
    "above idle": orWhy(joules(above_idle.energy_j), above_idle.reason),
    carbon: orWhy(`${measured(carbon.co2_g)} g CO₂`, carbon.reason),
    cost: orWhy(`${measured(cost.amount)} ${cost.currency ?? ""}`, cost.reason),
    "slowed by": orWhy(slowed.join(", ") || "nothing", thermal_throttle.reason),
  };
  return h(
    "dl",
    { class: "pairs" },
    Object.entries(said).map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))),
  );
}

function devices(ledger) {
  const rows = ledger.devices.map(each =>
    h(
      "tr",
      {},
      h("td", {}, each.device, h("span", { class: "small quiet" }, ` ${each.worker}`)),
      h("td", {}, each.source ? `${words(each.source)}, ${words(each.quality)}` : "no meter"),
      number(energyOf(each.energy)),
      number(watts(each.power_mean_w)),
      number(watts(each.power_max_w)),
      number(each.temperature_max_c === null ? UNKNOWN : `${measured(each.temperature_max_c)} °C`),
      number(duration(each.duration_s)),
      h("td", { class: "wide" }, why(each.energy.reason)),
    ),
  );
  const heads = [
    ["Device"],
    ["Source"],
    ["Energy", true],
    ["Mean", true],
    ["Highest", true],
    ["Temperature", true],
    ["Time", true],
    ["Why not known"],
  ];
  return table("Energy by device", heads, rows);
}

function attempts(ledger) {
  const rows = [...ledger.attempts]
    .reverse()
    .map(each =>
      h(
        "tr",
        { key: each.number },
        number(each.number),
        [each.total, each.useful, each.lost, each.overhead].map(part => number(energyOf(part))),
        number(count(each.steps)),
        number(count(each.lost_steps)),
        h("td", { class: "wide" }, why(each.total.reason)),
      ),
    );
  const heads = [
    ["Attempt", true],
    ["Total", true],
    ["Useful", true],
    ["Lost", true],
    ["Overhead", true],
    ["Steps that count", true],
    ["Lost steps", true],
    ["Why not known"],
  ];
  return table("Energy by attempt, newest first", heads, rows);
}

function epochs({ epochs, epochs_left_out }) {
  const rows = [...epochs]
    .reverse()
    .map(each =>
      h(
        "tr",
        { key: `epoch ${each.epoch}` },
        number(count(each.epoch)),
        number(atLeast(each.total_j, each.known_j)),
        number(joules(each.lost_j)),
        number(joules(each.per_step_j)),
        number(joules(each.per_unit_j)),
        number(count(each.steps)),
        number(duration(each.duration_s)),
      ),
    );
  const heads = [
    ["Epoch", true],
    ["Total", true],
    ["Lost", true],
    ["Per step", true],
    ["Per unit", true],
    ["Steps", true],
    ["Time", true],
  ];
  return [
    table("Energy by epoch, newest first", heads, rows),
    epochs_left_out > 0 && h("p", { class: "small" }, `The newest ${count(epochs.length)}.`),
  ];
}
