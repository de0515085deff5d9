/** What is said once, and to screen readers too. */

import { h, render } from "./dom.js";

const SHOWN_MS = 6000;
let timer;

export function say(text) {
  render(document.getElementById("said"), h("p", {}, text));
  clearTimeout(timer);
  timer = setTimeout(() => render(document.getElementById("said")), SHOWN_MS);
}

/** An error in its place on a page. */
export function problem(error, again) {
  return h(
    "div",
    { class: "problem", role: "alert" },
    h("p", {}, h("strong", {}, error.code ? error.code.replaceAll("_", " ") : "error"), ": ", error.message),
    again && h("button", { type: "button", onclick: again }, "Try again"),
  );
}
