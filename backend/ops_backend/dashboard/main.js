/** The frame around the pages: who is logged in, where one is, what the keyboard does, whether the server is there. */

import { connection, get, send } from "./api.js";
import { h, render } from "./dom.js";
import { here, link } from "./router.js";
import { login } from "./login.js";
import * as session from "./session.js";
import { say } from "./notice.js";
import * as shortcuts from "./shortcuts.js";
import * as theme from "./theme.js";
import { compare } from "./compare.js";
import { list } from "./list.js";
import { operation } from "./operation.js";
import { submission } from "./submission.js";
import { workers } from "./workers.js";

const top = document.getElementById("top");
const main = document.getElementById("main");

const PAGES = { "": list, operations: operation, compare, new: submission, workers };
const PLACES = [
  ["", "Operations"],
  ["workers", "Workers"],
  ["new", "New operation"],
];

/** @type {{name: string, page: {stop(): void, update?(path: string[], query: URLSearchParams): boolean}} | null} */
let shown = null;
let away = false;
let asking = false;

async function start() {
  theme.apply();
  shortcuts.install(() => shown?.page);
  addEventListener("hashchange", show);
  connection.addEventListener("away", () => {
    away = true;
    frame();
  });
  connection.addEventListener("back", () => {
    away = false;
    frame();
  });
  connection.addEventListener("logged-out", () => askToLogIn());
  addEventListener("theme", frame);
  await enter(takeCode());
}

/** That of a link, out of the address before anything else: it must not stay in the history. */
function takeCode() {
  const code = new URLSearchParams(location.hash.slice(1)).get("login");
  if (code) history.replaceState(null, "", "/#/");
  return code;
}

/** Logs in by the code of a link, if there is one; whoever is logged in already needs none. */
async function enter(code) {
  let refused = null;
  try {
    if (code) await send("POST", "/session", { code });
  } catch (error) {
    refused = error;
  }
  try {
    session.enter(await get("/session"));
    frame();
    show();
  } catch (error) {
    if (error.status === 401) return askToLogIn(refused?.message);
    frame();
    render(main, h("p", { class: "quiet" }, "Waiting for the server…"));
    setTimeout(() => enter(refused ? null : code), 1000);
  }
}

/** The address stays as it is: after the login one is where one was. Several answers may say that one is logged out. */
function askToLogIn(why) {
  if (asking) return;
  asking = true;
  leave();
  session.enter(null);
  frame();
  document.title = "Log in · Relight";
  login(main, why, () => {
    asking = false;
    enter(null);
  });
}

async function logOut() {
  await send("DELETE", "/session");
  askToLogIn("You are logged out.");
}

function show() {
  const code = takeCode();
  if (code) {
    asking = false;
    return enter(code);
  }
  if (!session.user()) return;
  const { path, query } = here();
  const name = path[0] in PAGES ? path[0] : "";
  if (shown?.name === name && shown.page.update?.(path.slice(1), query)) return frame();
  leave();
  render(main);
  shown = { name, page: PAGES[name](main, path.slice(1), query) };
  frame();
  scrollTo(0, 0);
}

function leave() {
  shown?.page.stop();
  shown = null;
}

function frame() {
  const place = here().path[0] ?? "";
  render(
    top,
    h(
      "a",
      { class: "brand", href: "#/", "aria-label": "Relight, all operations" },
      h("span", { "aria-hidden": "true" }, "Relight"),
    ),
    session.user() &&
      h(
        "nav",
        { "aria-label": "Pages" },
        PLACES.filter(([name]) => name !== "new" || session.may("operate")).map(([name, text]) =>
          h("a", { href: link(name), "aria-current": place === name ? "page" : undefined }, text),
        ),
      ),
    h("p", { class: "away", role: "status" }, away ? "Connection lost. Trying again…" : ""),
    h(
      "div",
      { class: "tools" },
      h(
        "button",
        { type: "button", class: "plain", title: "Theme (t)", onclick: () => say(`Theme: ${theme.next()}`) },
        { auto: "◐", light: "☀", dark: "☾" }[theme.theme()],
        h("span", { class: "hidden" }, ` Theme: ${theme.theme()}`),
      ),
      h(
        "button",
        { type: "button", class: "plain", title: "Keyboard (?)", onclick: shortcuts.help },
        "?",
        h("span", { class: "hidden" }, " Keyboard shortcuts"),
      ),
      session.user() &&
        h("button", { type: "button", class: "plain", title: session.said(), onclick: logOut }, "Log out"),
    ),
  );
}

start();
