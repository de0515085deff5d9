/** What a status or an outcome looks like: a shape and a word, so that no colour has to be told apart. */

import { h, svg } from "./dom.js";

export const STATUSES = ["pending", "running", "waiting", "cancelling", "completed", "failed", "cancelled"];
export const TERMINAL = new Set(["completed", "failed", "cancelled"]);
export const CANCELLABLE = new Set(["pending", "running", "waiting"]);
export const RESUMABLE = new Set(["failed", "cancelled"]);

const SHAPES = {
  pending: ["M8 2.5a5.5 5.5 0 1 0 0 11 5.5 5.5 0 0 0 0-11", "M8 5v3l2 1.5"],
  waiting: ["M8 2.5a5.5 5.5 0 1 0 0 11 5.5 5.5 0 0 0 0-11", "M6.5 6v4M9.5 6v4"],
  running: ["M5 3.2v9.6L13 8Z"],
  cancelling: ["M8 2.5a5.5 5.5 0 1 0 0 11 5.5 5.5 0 0 0 0-11", "M6 6h4v4H6Z"],
  completed: ["m3 8.5 3.2 3.2L13 4.8"],
  failed: ["m4 4 8 8m0-8-8 8"],
  cancelled: ["M4 4h8v8H4Z"],
  preempted: ["M3 8h8m-3-3.5L11.5 8 8 11.5"],
  lost: ["M8 3v6m0 3v.5"],
  refused: ["M3.5 8h9"],
  checkpoint_corrupt: ["m4 4 8 8m0-8-8 8"],
};

export function icon(name) {
  const paths = (SHAPES[name] ?? SHAPES.refused).map(d => svg("path", { d }));
  return svg("svg", { viewBox: "0 0 16 16", class: "icon", "aria-hidden": "true" }, paths);
}

export function chip(name, text = name.replaceAll("_", " ")) {
  return h("span", { class: `chip is-${name}` }, icon(name), text);
}
