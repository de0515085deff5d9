/** What happens to one operation, as it happens. A hidden tab has no stream: a browser has six connections to a host. */

import { url } from "./api.js";

const AGAIN_MS = 2000;
const MOST_MS = 30_000;

/**
 * @param {string} id
 * @param {{progress(o: object): void, metrics(m: object): void, event(e: object): void, deleted(): void,
 *          opened(): void, lost(): void}} hear `opened`: from here on nothing is missed; what was before has to be asked for
 */
export function stream(id, hear) {
  let source = null;
  let timer;
  let failures = 0;
  let stopped = false;

  function open() {
    clearTimeout(timer);
    if (stopped || document.hidden || source) return;
    source = new EventSource(url(`/operations/${id}/stream`));
    let first = true;
    source.addEventListener("progress", ({ data }) => {
      failures = 0;
      // The first one says that the stream stands; an EventSource that comes back by itself misses nothing.
      if (first) {
        first = false;
        hear.opened();
      }
      hear.progress(JSON.parse(data));
    });
    for (const name of ["metrics", "event"]) source.addEventListener(name, ({ data }) => hear[name](JSON.parse(data)));
    source.addEventListener("deleted", () => {
      stop();
      hear.deleted();
    });
    source.addEventListener("error", () => {
      if (source?.readyState !== EventSource.CLOSED) return;
      close();
      timer = setTimeout(open, Math.min(AGAIN_MS * 2 ** failures++, MOST_MS));
    });
  }

  function close() {
    source?.close();
    source = null;
    hear.lost();
  }

  const turn = () => (document.hidden ? close() : open());

  function stop() {
    stopped = true;
    clearTimeout(timer);
    close();
    document.removeEventListener("visibilitychange", turn);
  }

  document.addEventListener("visibilitychange", turn);
  open();
  return { stop };
}
