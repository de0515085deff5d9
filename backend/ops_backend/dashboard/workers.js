/** Who works here: which devices, what runs on them, and who takes no more. */

import { get, send } from "./api.js";
import { confirm } from "./dialog.js";
import { h, render } from "./dom.js";
import { ago, bytes, measured, percent, plural, short, words } from "./format.js";
import { problem, say } from "./notice.js";
import { poll } from "./poll.js";
import { link } from "./router.js";
import { may } from "./session.js";

const POLL_MS = 3000;

export function workers(main) {
  document.title = "Workers · Relight";
  const gone = new AbortController();
  let all = null;
  let names = new Map();
  let failed = null;

  const polling = poll(
    async () => {
      const [found, running] = await Promise.all([
        get("/workers", gone.signal),
        get("/operations?status=running,cancelling&limit=500", gone.signal),
      ]);
      [all, failed] = [found.items, null];
      names = new Map(running.items.map(({ id, name }) => [id, name]));
      draw();
    },
    POLL_MS,
    error => {
      failed = error;
      draw();
    },
  );

  function draw() {
    render(
      main,
      h("div", { class: "heading" }, h("h1", {}, "Workers"), all && h("p", { class: "quiet" }, total())),
      failed && problem(failed, polling.now),
      all === null
        ? !failed && h("p", { class: "quiet" }, "Loading…")
        : all.length
          ? h("ul", { class: "workers" }, all.map(card))
          : none(),
    );
  }

  function total() {
    const slots = all.filter(({ live }) => live).flatMap(({ slots }) => slots);
    return `${plural(slots.length, "slot")} of live workers, ${slots.filter(slot => slot.operation_id).length} busy`;
  }

  function card(worker) {
    const { id, name, live, draining, drain } = worker;
    const state = !live ? "silent" : draining ? "draining" : "live";
    return h(
      "li",
      { class: `worker is-${state}`, key: id },
      h(
        "div",
        { class: "heading" },
        h("h2", {}, name),
        h(
          "span",
          { class: `chip is-${state}` },
          { live: "● live", draining: "◐ draining", silent: "○ not heard of" }[state],
        ),
      ),
      h(
        "p",
        { class: "small quiet" },
        worker.host,
        ", heard of ",
        ago(worker.last_seen_at),
        worker.user_code ? ", runs users' code" : "",
      ),
      h(
        "ul",
        { class: "slots" },
        worker.slots.map(slot =>
          h(
            "li",
            { class: slot.operation_id ? "busy" : "free", key: slot.index },
            h(
              "span",
              { class: "device" },
              slot.device === "cpu" ? `CPU ${slot.index}` : `${slot.device.toUpperCase()} ${slot.index}`,
            ),
            h(
              "span",
              { class: "small quiet" },
              plural(slot.cores, "core"),
              slot.device_uuid ? `, ${slot.device_uuid}` : "",
            ),
            slot.operation_id
              ? h(
                  "a",
                  { href: link(`operations/${slot.operation_id}`) },
                  names.get(slot.operation_id) ?? short(slot.operation_id),
                )
              : h("span", { class: "quiet" }, "free"),
            slot.operation_id && h("span", { class: "small quiet" }, `attempt ${slot.attempt}`),
          ),
        ),
      ),
      live && worker.devices.length > 0 && h("ul", { class: "slots" }, worker.devices.map(gpu)),
      h(
        "details",
        {},
        h("summary", {}, "Versions"),
        h(
          "dl",
          { class: "pairs" },
          Object.entries(worker.versions).map(([what, version]) =>
            h("div", {}, h("dt", {}, what), h("dd", {}, version)),
          ),
        ),
      ),
      live &&
        may("admin") &&
        h(
          "div",
          { class: "buttons" },
          drain
            ? h(
                "button",
                { type: "button", "aria-label": `Undrain ${name}`, onclick: () => undrain(worker) },
                "Undrain",
              )
            : h(
                "button",
                { type: "button", "aria-label": `Drain ${name}`, onclick: () => askToDrain(worker) },
                "Drain",
              ),
        ),
    );
  }

  /** As its last heartbeat told it; what it does not say is left out. */
  function gpu({ device, name, power_w, temperature_c, utilization_percent, memory_used_bytes, throttle }) {
    const said = [
      power_w !== null && `${measured(power_w)} W`,
      temperature_c !== null && `${measured(temperature_c)} °C`,
      utilization_percent !== null && `${percent(utilization_percent)} busy`,
      memory_used_bytes !== null && bytes(memory_used_bytes),
      throttle.length > 0 && `slowed by ${throttle.map(words).join(", ")}`,
    ].filter(Boolean);
    return h(
      "li",
      { key: device },
      h("span", { class: "device" }, name),
      h("span", { class: "small quiet" }, device),
      h("span", { class: "small" }, said.join(", ") || "says nothing of itself"),
    );
  }

  function askToDrain({ id, name }) {
    const back = h("input", { type: "checkbox" });
    confirm({
      title: `Drain ${name}?`,
      body: [
        h("p", {}, "It takes no more work, until it is undrained or restarted. What runs there finishes."),
        h("label", { class: "check" }, back, "Hand back what runs, from a checkpoint; it goes on elsewhere"),
      ],
      action: "Drain",
      async act() {
        await send("POST", `/workers/${id}/drain`, { preempt: back.checked });
        await polling.now();
      },
    });
  }

  async function undrain({ id, name }) {
    try {
      await send("POST", `/workers/${id}/undrain`);
      say(`${name} takes work again.`);
      await polling.now();
    } catch (error) {
      say(error.message);
    }
  }

  const none = () =>
    h(
      "section",
      { class: "empty" },
      h("h2", {}, "No worker was heard of today"),
      h("p", {}, "Nothing runs without one. On a machine that reaches this server:"),
      h("pre", {}, "ops worker"),
      h("p", {}, h("code", {}, "ops up"), " starts workers by itself."),
    );

  draw();
  return {
    stop() {
      gone.abort();
      polling.stop();
    },
  };
}
