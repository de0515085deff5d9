/** Dialogs: the browser's own, which keep the focus in and give it back. */

import { h, render } from "./dom.js";

/** @param {(close: () => void) => any} content made once */
export function open(title, content) {
  const dialog = h("dialog", { "aria-labelledby": "dialog-title", onclose: () => dialog.remove() });
  const close = () => dialog.close();
  dialog.append(h("h2", { id: "dialog-title" }, title), ...[content(close)].flat(Infinity).filter(Boolean));
  document.body.append(dialog);
  dialog.showModal();
  return dialog;
}

/**
 * Says what will happen, and does it once. What the API refuses is said in the dialog, which stays.
 *
 * @param {{title: string, body: any, action: string, danger?: boolean, act: () => Promise<void>}} wish
 */
export function confirm({ title, body, action, danger, act }) {
  open(title, close => {
    const told = h("p", { class: "problem", role: "alert", hidden: true });
    const button = h("button", { class: danger ? "danger" : "primary" }, action);

    async function submit(event) {
      event.preventDefault();
      button.disabled = true;
      try {
        await act();
        close();
      } catch (error) {
        told.hidden = false;
        render(told, h("strong", {}, (error.code ?? "not done").replaceAll("_", " ")), ": ", error.message);
        button.disabled = false;
      }
    }

    return h(
      "form",
      { onsubmit: submit },
      body,
      told,
      h("div", { class: "buttons" }, h("button", { type: "button", onclick: close }, "Back"), button),
    );
  });
}
