/** One metric of one operation: few enough points to draw, kept up to date by the stream, finer where one looks closer. */

import { get, query } from "./api.js";
import { toNumber } from "./format.js";

const POINTS = 1500;

export class Curve {
  /** Steps and values, side by side; values are floats, NaN and infinities among them. */
  whole = { steps: [], values: [] };
  /** The part that is looked at, when it has been read by itself. */
  part = null;
  /** [[step, attempt], …] */
  starts = [];
  loaded = false;
  #early = [];
  // Answers may overtake each other: the newest question counts.
  #loading = 0;
  #looking = 0;
  #cursor = null;

  constructor(operationId, name) {
    Object.assign(this, { operationId, name });
  }

  async load(signal) {
    const mine = ++this.#loading;
    this.#early = [];
    const body = await get(this.#path({ max_points: POINTS }), signal);
    if (mine !== this.#loading) return;
    this.whole = split(body.points);
    this.starts = body.attempt_starts;
    this.#cursor = body.cursor;
    this.loaded = true;
    // What the stream said meanwhile may be in the answer already.
    for (const report of this.#early.splice(0)) this.take(report);
  }

  /** What has come since, where no stream brings it. */
  async refresh(signal) {
    const body = await get(this.#path({ max_points: POINTS, cursor: this.#cursor }), signal);
    if (body.replaces_from !== null) cut(this.whole, body.replaces_from);
    append(this.whole, body.points);
    this.starts = body.attempt_starts;
    this.#cursor = body.cursor;
  }

  /** @param {[number, number] | null} range */
  async look(range, signal) {
    const mine = ++this.#looking;
    if (!range || this.whole.steps.length < POINTS / 4) {
      this.part = null;
      return;
    }
    const [from, to] = [Math.max(0, Math.floor(range[0])), Math.max(0, Math.ceil(range[1]))];
    const body = await get(this.#path({ max_points: POINTS, after_step: from - 1, until_step: to }), signal);
    if (mine === this.#looking) this.part = { range, ...split(body.points) };
  }

  /** A report of the stream. True where the curve has to be read anew. */
  take({ attempt, start_step, series }) {
    if (!this.loaded) {
      this.#early.push({ attempt, start_step, series });
      return false;
    }
    const [begun, newest] = this.starts.at(-1) ?? [0, 0];
    if (attempt < newest) return false;
    if (attempt === newest && start_step !== begun) return true;
    if (attempt > newest) {
      this.starts = [...this.starts.filter(([step]) => step < start_step), [start_step, attempt]];
      for (const points of [this.whole, this.part]) if (points) cut(points, start_step);
    }
    const points = series.find(each => each.name === this.name)?.points ?? [];
    append(this.whole, points);
    if (this.part)
      append(
        this.part,
        points.filter(([step]) => step <= this.part.range[1]),
      );
    return this.whole.steps.length > 3 * POINTS;
  }

  get points() {
    return this.part ?? this.whole;
  }

  /** Whether between two points that are drawn there are others. */
  get thinned() {
    const { steps } = this.points;
    return steps.length > POINTS / 4 && steps.at(-1) - steps[0] + 1 > steps.length;
  }

  #path(wanted) {
    return `/operations/${this.operationId}/metrics${query({ name: this.name, ...wanted })}`;
  }
}

function split(points) {
  return { steps: points.map(([step]) => step), values: points.map(([, value]) => toNumber(value)) };
}

function cut(points, step) {
  const keep = points.steps.findIndex(each => each >= step);
  if (keep >= 0) {
    points.steps.length = keep;
    points.values.length = keep;
  }
}

/** Steps of a metric rise: what is not after the last one is there already. */
function append(to, points) {
  for (const [step, value] of points) {
    if (step <= (to.steps.at(-1) ?? -1)) continue;
    to.steps.push(step);
    to.values.push(toNumber(value));
  }
}

/**
 * An exponential moving average that starts where the data does; what is not finite is passed over, and stays in the raw
 * curve. `weight` is that of the past, from 0 to below 1.
 */
export function smoothed(values, weight) {
  if (!weight) return values;
  let mean = 0;
  let seen = 0;
  return values.map(value => {
    if (!Number.isFinite(value)) return null;
    mean = weight * mean + (1 - weight) * value;
    seen += 1;
    return mean / (1 - weight ** seen);
  });
}
