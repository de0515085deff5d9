/** Logging in with a token; links of `ops dashboard` need no form. */

import { send } from "./api.js";
import { h } from "./dom.js";

/**
 * @param {string | undefined} why shown above the form
 * @param {() => void} entered
 */
export function login(main, why, entered) {
  const token = h("input", {
    id: "token",
    type: "password",
    autocomplete: "current-password",
    required: true,
    "aria-describedby": "token-help",
  });
  const told = h("p", { class: "problem", role: "alert", hidden: !why }, why);

  async function submit(event) {
    event.preventDefault();
    try {
      await send("POST", "/session", { token: token.value.trim() });
      entered();
    } catch (error) {
      told.hidden = false;
      told.textContent = error.message;
      token.focus();
    }
  }

  main.replaceChildren(
    h(
      "section",
      { class: "login" },
      h("h1", {}, "Log in to Relight"),
      told,
      h("p", {}, "The easy way is a link, made where ", h("code", {}, "ops"), " runs:"),
      h("pre", {}, "ops dashboard"),
      h(
        "form",
        { onsubmit: submit },
        h("label", { for: "token" }, "Or a token"),
        token,
        h(
          "p",
          { id: "token-help", class: "quiet" },
          "An admin makes one with ",
          h("code", {}, "ops tokens create"),
          "; ",
          h("code", {}, "ops up"),
          " keeps its own in DIR/token, mostly ",
          h("code", {}, "~/.local/share/relight/token"),
          ".",
        ),
        h("button", { class: "primary" }, "Log in"),
      ),
    ),
  );
  token.focus();
}
