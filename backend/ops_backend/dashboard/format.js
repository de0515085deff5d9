/** How numbers, times and sizes are written. What is not known is a dash, never 0. */

import { now } from "./api.js";
import { h } from "./dom.js";

export const UNKNOWN = "–";
const whole = new Intl.NumberFormat("en-GB", { maximumFractionDigits: 0 });
const at = new Intl.DateTimeFormat("en-GB", { dateStyle: "medium", timeStyle: "medium" });

/** The API writes what is not finite as a string. */
export const toNumber = value => (typeof value === "string" ? Number(value) : value);

export function count(value) {
  return value === null || value === undefined ? UNKNOWN : whole.format(value);
}

/** Of a measurement: four significant digits. */
export function measured(value) {
  if (value === null || value === undefined) return UNKNOWN;
  const x = toNumber(value);
  if (!Number.isFinite(x)) return Number.isNaN(x) ? "NaN" : x > 0 ? "∞" : "−∞";
  if (x === 0) return Object.is(x, -0) ? "−0" : "0";
  const size = Math.abs(x);
  const text = size >= 1e6 || size < 1e-4 ? x.toExponential(3) : size >= 1000 ? whole.format(x) : x.toPrecision(4);
  return text.replace("-", "−");
}

/** Whole ones where there are thousands. */
export const joules = energy_j =>
  energy_j === null ? UNKNOWN : `${energy_j >= 1000 ? count(energy_j) : measured(energy_j)} J`;

export function duration(seconds) {
  if (seconds === null || seconds === undefined || !Number.isFinite(toNumber(seconds))) return UNKNOWN;
  const s = Math.max(0, toNumber(seconds));
  if (s < 10) return `${s.toFixed(1)} s`;
  if (s < 60) return `${Math.round(s)} s`;
  const minutes = Math.floor(s / 60);
  const two = n => String(n).padStart(2, "0");
  if (minutes < 60) return `${minutes} min ${two(Math.floor(s % 60))} s`;
  const hours = Math.floor(minutes / 60);
  if (hours < 48) return `${hours} h ${two(minutes % 60)} min`;
  return `${Math.floor(hours / 24)} d ${hours % 24} h`;
}

export const secondsBetween = (from, to) => ((to ? Date.parse(to) : now()) - Date.parse(from)) / 1000;

export function ago(iso) {
  if (!iso) return UNKNOWN;
  const seconds = secondsBetween(iso);
  const [size, unit] = [
    [86400, "d"],
    [3600, "h"],
    [60, "min"],
  ].find(([size]) => seconds >= size) ?? [1, "s"];
  const text = seconds < 5 ? "just now" : `${Math.floor(seconds / size)} ${unit} ago`;
  return h("time", { datetime: iso, title: at.format(new Date(iso)) }, text);
}

export const clock = iso => (iso ? at.format(new Date(iso)) : UNKNOWN);

export function bytes(size) {
  if (size === null || size === undefined) return UNKNOWN;
  const power = Math.min(4, Math.floor(Math.log10(Math.max(size, 1)) / 3));
  return power ? `${(size / 1000 ** power).toPrecision(3)} ${["", "kB", "MB", "GB", "TB"][power]}` : `${size} B`;
}

export const percent = value => (value === null || value === undefined ? UNKNOWN : `${Math.floor(value)} %`);

export const short = id => id.slice(0, 8);

/** `not_measured` → `not measured`. */
export const words = code => code.replaceAll("_", " ");

/** Of a study, whose steps are its children. */
export const ofChildren = ({ step, steps_total }) =>
  steps_total === null ? "none planned" : `${count(step)} of ${plural(steps_total, "child", "children")}`;

/** Of a phase of a measurement: 32 of 64 prompts. */
export function progressed({ done, total, unit }) {
  return `${count(Math.floor(done))}${total === null ? "" : ` of ${count(total)}`} ${unit}`;
}

/** One thing, or several. */
export const plural = (number, one, many = `${one}s`) => `${count(number)} ${number === 1 ? one : many}`;

/** As models and data sets are called: 70B, 1.4T. */
export function big(value, digits = 3) {
  if (value === null || value === undefined) return UNKNOWN;
  const x = toNumber(value);
  const rounded = Number(x.toPrecision(digits));
  const [size, unit] = [
    [1e12, "T"],
    [1e9, "B"],
    [1e6, "M"],
    [1e3, "k"],
  ].find(([size]) => rounded >= size && rounded < 1e16) ?? [1, ""];
  return Number.isFinite(x) ? `${Number((x / size).toPrecision(digits))}${unit}`.replace("e+", "e") : measured(x);
}

/** 1e15, 2.5e12. */
export const flops = budget => Number(budget.toPrecision(3)).toExponential().replace("e+", "e");

/** A value with its interval, where there is one. */
export function within(estimate, write = measured) {
  if (!estimate) return UNKNOWN;
  const { value, low, high } = estimate;
  return low === null || high === null ? write(value) : `${write(value)} (${write(low)}–${write(high)})`;
}

/** "4 ranks on 2 workers: a, b"; of what is no gang, its worker. */
export function workersOf({ world_size, members, worker }) {
  if (world_size === 1) return worker;
  return `${world_size} ranks on ${plural(members.length, "worker")}: ${members.map(({ worker }) => worker).join(", ")}`;
}
