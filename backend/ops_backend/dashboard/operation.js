/** One operation: what it does now, above; its parts below. The stream brings what is new, polling where there is none. */

import * as actions from "./actions.js";
import { Away, get } from "./api.js";
import { curves } from "./curves.js";
import { h, render } from "./dom.js";
import { energy } from "./energy.js";
import { problem } from "./notice.js";
import { poll } from "./poll.js";
import { adjust } from "./router.js";
import { may } from "./session.js";
import { CANCELLABLE, RESUMABLE, TERMINAL } from "./status.js";
import { stream } from "./stream.js";
import { study } from "./study.js";
import { summary } from "./summary.js";
import { artifacts, attempts, checkpoints, events, job } from "./tables.js";
import { logs } from "./logs.js";
import { measurement } from "./measurement.js";
import { timeline } from "./timeline.js";

const TABS = ["curves", "attempts", "checkpoints", "events", "logs", "job", "artifacts", "energy"];
// A study trains nothing by itself.
const OF_STUDY = ["study", "attempts", "events", "logs", "job"];
const OF_MEASUREMENT = ["measurement", "attempts", "events", "logs", "job", "artifacts", "energy"];
// Those that are read when they are looked at, and where.
const PARTS = {
  checkpoints: ["checkpoints"],
  artifacts: ["artifacts", "metrics"],
  energy: ["energy"],
  measurement: ["results", "artifacts"],
};
// Besides the stream: for what it does not tell (checkpoints, artifacts), and for when there is none.
const POLL_MS = 3000;
const TICK_MS = 1000;

export function operation(main, [id], query) {
  document.title = "Operation · Relight";
  const gone = new AbortController();
  const path = `/operations/${encodeURIComponent(id)}`;
  const parts = {}; // what the API said, of the tabs that were opened
  const told = []; // events
  let answer = null; // of the last poll
  let shown = null; // the same, with what the stream has said since
  let tried = null; // attempts
  let failed = null;
  let deleted = false;
  let wanted = query.get("tab");
  let inSight = null; // the tab that was last scrolled to
  let tab = null; // known when it is known what the operation is
  let living = null; // what in the open tab lives by itself: curves, logs
  let stands = false; // whether the stream does

  const head = h("div", { keep: true });
  const panel = h("div", { id: "panel", role: "tabpanel", tabindex: "0", keep: true });

  /** @param {boolean} [all] also what looks unchanged */
  async function ask(all) {
    const before = answer;
    const found = await get(path, gone.signal);
    const moved = all === true || !tried || tab === "attempts" || gist(found) !== gist(before);
    if (moved) tried = (await get(`${path}/attempts`, gone.signal)).items;
    [answer, shown, failed] = [found, found, null];
    tab = tabOf();
    if (moved || found !== before || PARTS[tab]?.some(name => !parts[name])) await part();
    if (!stands) living?.more?.([id]);
    draw();
  }

  /** Of an operation what its attempts change with. */
  const gist = one => one && [one.attempt, one.status, one.failures, one.exactness?.promise].join();

  const refresh = () => ask(true);

  const tabs = () => ({ study: OF_STUDY, measurement: OF_MEASUREMENT })[shown?.kind] ?? TABS;
  const tabOf = () => (tabs().includes(wanted) ? wanted : tabs()[0]);

  /** What the open tab needs. */
  async function part() {
    for (const name of PARTS[tab] ?? []) {
      const found = await get(`${path}/${name}`, gone.signal);
      parts[name] = found.items ?? found.metrics ?? found;
    }
    if (tab === "events") await moreEvents();
  }

  async function moreEvents() {
    for (;;) {
      const { items } = await get(`${path}/events?after_seq=${told.at(-1)?.seq ?? 0}`, gone.signal);
      told.push(...items.filter(event => event.seq > (told.at(-1)?.seq ?? 0)));
      if (items.length < 1000) return;
    }
  }

  const refused = error => {
    failed = error;
    deleted ||= error.status === 404 && shown !== null;
    draw();
  };
  const polling = poll(() => ask(), POLL_MS, refused);
  const ticking = setInterval(() => {
    if (shown && !document.hidden) draw();
  }, TICK_MS);
  const streaming = stream(id, {
    opened() {
      stands = true;
      living?.load?.();
    },
    lost() {
      stands = false;
    },
    progress(summary) {
      if (shown) {
        shown = { ...shown, ...summary };
        draw();
      }
    },
    metrics(report) {
      living?.take?.(id, report);
    },
    event() {
      polling.now();
    },
    deleted() {
      deleted = true;
      draw();
    },
  });

  function select(name) {
    adjust({ tab: name === tabs()[0] ? null : name });
  }

  /** Where the tabs are wider than the page. */
  function showTab() {
    const button = document.getElementById(`tab-${tab}`);
    const list = button?.parentElement;
    inSight = tab;
    if (list) list.scrollLeft = button.offsetLeft - list.offsetLeft - (list.clientWidth - button.offsetWidth) / 2;
  }

  function open() {
    living?.stop();
    living = null;
    render(panel);
    panel.setAttribute("aria-labelledby", `tab-${tab}`);
    if (tab === "curves") living = curves(panel, [{ id, label: shown?.name ?? id }], stands);
    else if (tab === "study") living = study(panel, () => shown);
    else if (tab === "logs") living = logs(panel, id, () => !shown || !TERMINAL.has(shown.status));
  }

  function draw() {
    if (deleted)
      return render(
        main,
        h(
          "section",
          { class: "empty" },
          h("h1", {}, "This operation was deleted"),
          h("p", {}, h("a", { href: "#/" }, "All operations")),
        ),
      );
    if (!shown)
      return render(
        main,
        failed
          ? [h("h1", {}, "Operation"), problem(failed), h("p", {}, h("a", { href: "#/" }, "All operations"))]
          : h("p", { class: "quiet" }, "Loading…"),
      );
    document.title = `${shown.name}: ${shown.status} · Relight`;
    const fresh = !panel.isConnected;
    render(main, head, tabList(), panel);
    render(head, summary(shown, tried, buttons()), failed && problem(failed, polling.now), timeline(shown, tried));
    if (fresh) open();
    const made = {
      attempts: () => attempts(shown, tried),
      checkpoints: () => checkpoints(shown, parts.checkpoints, refresh),
      events: () => events(told),
      job: () => job(shown),
      artifacts: () => artifacts(shown, parts.artifacts, parts.metrics),
      energy: () => energy(parts.energy),
      measurement: () => measurement(shown, parts.results, parts.artifacts),
    }[tab];
    if (made) render(panel, made());
    if (inSight !== tab) showTab();
  }

  function tabList() {
    const all = tabs();
    const move = event => {
      const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!by) return;
      event.preventDefault();
      select(all[(all.indexOf(tab) + by + all.length) % all.length]);
      document.getElementById(`tab-${tab}`).focus();
    };
    return h(
      "div",
      { class: "tabs", role: "tablist", "aria-label": "Parts of the operation", onkeydown: move },
      all.map(name =>
        h(
          "button",
          {
            type: "button",
            id: `tab-${name}`,
            role: "tab",
            "aria-selected": String(name === tab),
            "aria-controls": "panel",
            tabindex: name === tab ? "0" : "-1",
            onclick: () => select(name),
          },
          name,
        ),
      ),
    );
  }

  /** What may be done now, in words. */
  function offers() {
    const { status, kind, attempt, forked_from } = shown;
    if (!may("operate")) return {};
    const hasCheckpoint = attempt > 0 || forked_from; // as far as is known here
    return {
      c:
        (CANCELLABLE.has(status) && ["Cancel", () => actions.cancel(shown, refresh)]) ||
        (status === "cancelling" && ["Stop at once", () => actions.force(shown, refresh)]),
      r: RESUMABLE.has(status) &&
        (kind !== "training" || hasCheckpoint) && ["Resume", () => actions.resume(shown, tried, refresh)],
      f: kind === "training" && hasCheckpoint && ["Fork", () => actions.fork(shown)],
      delete: TERMINAL.has(status) && ["Delete", () => actions.remove(shown)],
    };
  }

  function buttons() {
    return Object.entries(offers())
      .filter(([, offer]) => offer)
      .map(([name, [text, act]]) =>
        h(
          "button",
          {
            type: "button",
            key: text,
            class: name === "delete" || text === "Stop at once" ? "danger" : name === "r" ? "primary" : "",
            onclick: act,
          },
          text,
        ),
      );
  }

  const press = key => () => {
    if (shown) offers()[key]?.[1]?.();
  };

  draw();
  return {
    stop() {
      gone.abort();
      polling.stop();
      streaming.stop();
      clearInterval(ticking);
      living?.stop();
    },
    update([other], changed) {
      if (other !== id) return false;
      wanted = changed.get("tab");
      if (tab && tabOf() !== tab) {
        tab = tabOf();
        open();
        draw();
        part().then(draw, error => {
          if (!(error instanceof Away) && error.name !== "AbortError") refused(error);
        });
      }
      return true;
    },
    keys: {
      c: press("c"),
      r: press("r"),
      f: press("f"),
      ...Object.fromEntries(TABS.map((_, i) => [String(i + 1), () => tabs()[i] && select(tabs()[i])])),
    },
  };
}
