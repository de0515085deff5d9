/** Keys that do something on every page. They can be switched off, for those who speak to their computer. */

import { h } from "./dom.js";
import { open } from "./dialog.js";
import { go } from "./router.js";
import { say } from "./notice.js";
import { next } from "./theme.js";

const KEY = "relight.shortcuts";

const EVERYWHERE = {
  "?": ["this help", help],
  o: ["all operations", () => go("#/")],
  w: ["workers", () => go("#/workers")],
  n: ["a new operation", () => go("#/new")],
  t: ["light, dark, or as the system says", () => say(`Theme: ${next()}`)],
};
const ON_PAGES = {
  "/": "search, in the list",
  "j k": "next and previous operation, in the list",
  "1 … 8": "a part of an operation's page",
  c: "cancel an operation",
  r: "resume it",
  f: "fork it",
};

/** @param {() => {keys?: Object<string, () => void>} | undefined} page */
export function install(page) {
  addEventListener("keydown", event => {
    if (!enabled() || event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
    if (event.target.closest("input, select, textarea, [contenteditable], dialog")) return;
    const act = page()?.keys?.[event.key] ?? EVERYWHERE[event.key]?.[1];
    if (!act) return;
    event.preventDefault();
    act();
  });
}

export function help() {
  const row = ([keys, does]) =>
    h(
      "div",
      {},
      h(
        "dt",
        {},
        keys.split(" ").map(key => h("kbd", {}, key)),
      ),
      h("dd", {}, does),
    );
  const all = [...Object.entries(EVERYWHERE).map(([key, [does]]) => [key, does]), ...Object.entries(ON_PAGES)];
  open("Keyboard", close => [
    h("dl", { class: "keys" }, all.map(row)),
    h(
      "label",
      { class: "check" },
      h("input", {
        type: "checkbox",
        checked: enabled(),
        onchange: event => localStorage.setItem(KEY, event.target.checked ? "on" : "off"),
      }),
      "Single keys do something",
    ),
    h("div", { class: "buttons" }, h("button", { type: "button", class: "primary", onclick: close }, "Close")),
  ]);
}

const enabled = () => localStorage.getItem(KEY) !== "off";
