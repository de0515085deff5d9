/** What can be done with an operation. Each says first what will happen. */

import { get, send } from "./api.js";
import { confirm } from "./dialog.js";
import { h, render } from "./dom.js";
import { count, plural, short } from "./format.js";
import { say } from "./notice.js";
import { go, link } from "./router.js";

const path = ({ id }) => `/operations/${id}`;

export function cancel(operation, done) {
  const reason = h("input", { id: "reason", maxlength: 1000, autocomplete: "off" });
  const happens =
    operation.status === "pending"
      ? "It waits, so it is cancelled at once."
      : operation.kind === "command"
        ? "Its program gets a SIGTERM, and a while to end."
        : operation.kind === "measurement"
          ? "It ends after the batch that it is in; what it has measured is gone."
        : operation.kind === "study"
          ? "Its children are cancelled with it: those that run save a checkpoint at the very next step. What is done stays."
          : "It saves a checkpoint at the very next step, and ends.";
  confirm({
    title: `Cancel ${operation.name}?`,
    body: [
      h("p", {}, happens, " It can be resumed later."),
      h("label", { for: "reason" }, "Reason, if you like"),
      reason,
    ],
    action: "Cancel operation",
    danger: true,
    async act() {
      const { status } = await send("POST", `${path(operation)}/cancel`, { reason: reason.value });
      say(status === "cancelled" ? "Cancelled." : "Cancelling: it saves, and ends.");
      await done();
    },
  });
}

export function force(operation, done) {
  confirm({
    title: `Stop ${operation.name} at once?`,
    body: h(
      "p",
      {},
      operation.kind === "study" ? "The processes of its children are" : "Its process is",
      " killed now, without saving. What was done since the last checkpoint is lost. It can be resumed from there.",
    ),
    action: "Stop at once",
    danger: true,
    async act() {
      await send("POST", `${path(operation)}/cancel`, { force: true, reason: operation.cancel_reason ?? "" });
      say("Its process is being killed.");
      await done();
    },
  });
}

export async function resume(operation, attempts, done, chosen = "") {
  let usable;
  try {
    usable = (await get(`${path(operation)}/checkpoints`)).items.filter(each => each.status === "committed").reverse();
  } catch (error) {
    return say(error.message);
  }
  const newest = usable.find(each => each.in_lineage);
  const last = attempts.at(-1)?.last_step ?? null;
  const accept = h("input", { type: "checkbox" });
  const happens = h("p", { "aria-live": "polite" });
  const select = h(
    "select",
    { id: "checkpoint", onchange: tell },
    newest && h("option", { value: "" }, `the newest: ${named(newest)}`),
    usable.map(each => h("option", { value: each.id, selected: each.id === chosen }, named(each))),
  );

  function tell() {
    const from = usable.find(each => each.id === select.value) ?? newest;
    const redone = from && last !== null ? last + 1 - from.step : 0;
    render(
      happens,
      !from
        ? operation.kind === "study"
          ? "What is missing or failed runs, each child from its last checkpoint; what is done is kept."
          : operation.kind === "command"
            ? "It has no checkpoint, so its program runs again from the beginning."
            : operation.kind === "measurement"
              ? "It is measured again, from the beginning."
            : "It has no checkpoint to go on from, so this will be refused."
        : [
            `It goes on from step ${count(from.step)}, epoch ${count(from.epoch)}, as soon as a slot is free.`,
            redone > 0 &&
              ` ${plural(redone, "reported step")} after it will be done again, and compared with what was reported.`,
          ],
    );
  }

  tell();
  confirm({
    title: `Resume ${operation.name}?`,
    body: [
      usable.length > 0 && [h("label", { for: "checkpoint" }, "From checkpoint"), select],
      happens,
      operation.kind === "training" &&
        h(
          "label",
          { class: "check" },
          accept,
          "Go on even if code or data have changed. It is then best effort, not bit for bit.",
        ),
    ],
    action: "Resume",
    async act() {
      await send("POST", `${path(operation)}/resume`, {
        from_checkpoint: select.value || null,
        accept_changes: accept.checked,
      });
      say("Resumed: it waits for a slot.");
      await done();
    },
  });
}

export function fork(operation, checkpoint) {
  go(link("new", { fork: operation.id, checkpoint }));
}

export function remove(operation) {
  confirm({
    title: `Delete ${operation.name}?`,
    body: h(
      "p",
      {},
      `Operation ${short(operation.id)} goes for good${ofStudy(operation)}: its history, metrics, logs, checkpoints and artifacts. Nothing brings it back.`,
    ),
    action: "Delete for good",
    danger: true,
    async act() {
      await send("DELETE", path(operation));
      say(`${operation.name} is deleted.`);
      go("#/");
    },
  });
}

export function removeCheckpoint(operation, checkpoint, done) {
  confirm({
    title: `Delete the checkpoint of step ${count(checkpoint.step)}?`,
    body: h("p", {}, "Nothing can go on from it any more, and its files go within seconds."),
    action: "Delete checkpoint",
    danger: true,
    async act() {
      await send("DELETE", `${path(operation)}/checkpoints/${checkpoint.id}`);
      await done();
    },
  });
}

function ofStudy({ children }) {
  const number = Object.values(children ?? {}).reduce((sum, each) => sum + each, 0);
  return number ? ` with its ${plural(number, "child", "children")}` : "";
}

const named = each =>
  `step ${count(each.step)}, epoch ${count(each.epoch)} (${each.checkpoint_type}, attempt ${each.attempt}${each.in_lineage ? "" : ", left behind"})`;
