/** Doing something again and again, while somebody looks: a hidden tab asks nothing. */

import { Away } from "./api.js";

const MOST_MS = 15_000;

/**
 * @param {() => Promise<void>} work
 * @param {number} everyMs longer while the server is away
 * @param {(error: Error) => void} failed for what is not a lost connection
 */
export function poll(work, everyMs, failed) {
  let timer;
  let stopped = false;
  let running = false;
  let wanted = false;
  let failures = 0;

  async function tick() {
    clearTimeout(timer);
    if (stopped || document.hidden) return;
    if (running) {
      wanted = true;
      return;
    }
    running = true;
    try {
      await work();
      failures = 0;
    } catch (error) {
      failures += 1;
      if (!stopped && !(error instanceof Away) && error.name !== "AbortError") failed(error);
    }
    running = false;
    if (stopped) return;
    const wait = wanted ? 0 : Math.min(everyMs * 2 ** failures, Math.max(MOST_MS, everyMs));
    wanted = false;
    timer = setTimeout(tick, wait);
  }

  document.addEventListener("visibilitychange", tick);
  tick();
  return {
    now: tick,
    stop() {
      stopped = true;
      clearTimeout(timer);
      document.removeEventListener("visibilitychange", tick);
    },
  };
}
