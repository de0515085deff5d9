/** What an operation prints: its end, live, and what was before when asked. The page keeps a bounded part of it. */

import { getBytes, url } from "./api.js";
import { h, render } from "./dom.js";
import { bytes, count } from "./format.js";
import { problem } from "./notice.js";
import { poll } from "./poll.js";

const POLL_MS = 1000;
const READ_BYTES = 64 * 1024;
const MOST_BYTES = 512 * 1024;
const DOWNLOAD_BYTES = 4 * 2 ** 20;

/** @param {() => boolean} live whether more may come */
export function logs(root, id, live) {
  const gone = new AbortController();
  const path = `/operations/${id}/logs`;
  const text = h("pre", { class: "log", tabindex: "0", role: "log", "aria-label": "Output", "aria-live": "off" });
  const follow = h("input", { type: "checkbox", checked: true });
  const bar = h("div", { class: "log-tools" });
  const state = h("div", {});
  /** @type {{start: number, next: number, node: Text}[]} */
  const chunks = [];
  let end = 0;
  let complete = false;
  let first = true;
  let decoder = new TextDecoder();

  root.append(bar, state, text);

  async function read(offset) {
    const { bytes: data, headers } = await getBytes(`${path}?offset=${offset}&max_bytes=${READ_BYTES}`, gone.signal);
    end = Number(headers.get("Relight-Log-End"));
    complete = headers.get("Relight-Log-Complete") === "true";
    return { data, start: Number(headers.get("Relight-Log-Offset")), next: Number(headers.get("Relight-Log-Next")) };
  }

  async function more() {
    // A resume makes it live again.
    if (complete && !live()) return;
    for (let i = 0; i < 8; i++) {
      const from = chunks.at(-1)?.next ?? -READ_BYTES;
      const { data, start, next } = await read(from);
      if (data.length) {
        if (chunks.length && start > chunks.at(-1).next) gap(start - chunks.at(-1).next, start);
        put({ start, next, node: document.createTextNode(tidy(decoder.decode(data, { stream: true }))) });
      }
      if (next >= end || !data.length) break;
    }
    first = false;
    render(state);
    draw();
  }

  function put(chunk) {
    chunks.push(chunk);
    text.append(chunk.node);
    while (chunks.length > 1 && chunks.at(-1).next - chunks[0].start > MOST_BYTES) chunks.shift().node.remove();
    if (follow.checked) text.scrollTop = text.scrollHeight;
  }

  function gap(size, start) {
    decoder = new TextDecoder();
    chunks.push({
      start,
      next: start,
      node: text.appendChild(document.createTextNode(`\n… ${bytes(size)} were left out …\n`)),
    });
  }

  /** The part before; the newest goes where it would be too much. */
  async function earlier() {
    const to = chunks[0].start;
    const from = Math.max(0, to - READ_BYTES);
    const { data, start, next } = await read(from);
    const part = data.subarray(0, Math.max(0, to - start));
    follow.checked = false;
    const height = text.scrollHeight;
    const node = document.createTextNode(
      tidy(new TextDecoder().decode(part)) + (next < to ? `\n… ${bytes(to - next)} were left out …\n` : ""),
    );
    chunks.unshift({ start: Math.min(start, from), next: to, node });
    text.prepend(node);
    text.scrollTop += text.scrollHeight - height;
    draw();
  }

  function draw() {
    const from = chunks[0]?.start ?? 0;
    const to = chunks.at(-1)?.next ?? 0;
    render(
      bar,
      h("label", { class: "check" }, follow, "Follow"),
      h(
        "span",
        { class: "small quiet" },
        first ? "Loading…" : end ? `bytes ${count(from)} to ${count(to)} of ${count(end)}` : "",
      ),
      from > 0 && h("button", { type: "button", onclick: () => earlier().catch(failed) }, "Earlier"),
      end > 0 &&
        h(
          "a",
          {
            href: url(`${path}?offset=${Math.max(0, end - DOWNLOAD_BYTES)}&max_bytes=${DOWNLOAD_BYTES}`),
            download: `${id.slice(0, 8)}.log`,
          },
          "Download",
        ),
      end > DOWNLOAD_BYTES &&
        h(
          "span",
          { class: "small quiet" },
          `the last ${bytes(DOWNLOAD_BYTES)}; all of it: `,
          h("code", {}, `ops logs ${id.slice(0, 8)}`),
        ),
    );
    text.hidden = !chunks.length;
    if (!first && !chunks.length)
      render(state, h("p", { class: "empty" }, live() ? "It has printed nothing yet." : "It printed nothing."));
  }

  const failed = error => render(state, problem(error, polling.now));
  // Reading back is no reason to be thrown to the end.
  text.addEventListener("scroll", () => {
    follow.checked = text.scrollTop + text.clientHeight >= text.scrollHeight - 8;
  });
  draw();
  const polling = poll(more, POLL_MS, failed);
  return {
    stop() {
      gone.abort();
      polling.stop();
    },
  };
}

/** Colours are left out; of a line that was written over and over (a progress bar) its last state stays. */
function tidy(text) {
  return text
    .replace(/\x1b\[[0-9;?]*[A-Za-z]/g, "")
    .replace(/[^\n]*\r(?!\n)/g, "")
    .replace(/\r\n/g, "\n");
}
