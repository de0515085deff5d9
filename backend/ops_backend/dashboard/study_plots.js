/** What a study's plots show, as points, lines and bands; the same that `ops plot` draws. */

import { flops, measured, plural, toNumber, words } from "./format.js";

const PARABOLA_POINTS = 61;
const LOG_FROM = 30; // an axis whose values span this factor is logarithmic

const finite = value => value !== null && value !== undefined && Number.isFinite(toNumber(value));
const hasLoss = row => row.status === "completed" && finite(row.final_loss);

/** The completed runs of each budget with a loss that can be drawn. */
function byBudget({ rows }) {
  const budgets = [...new Set(rows.map(row => row.compute_budget))].sort((a, b) => a - b);
  return budgets.map(budget => [budget, rows.filter(row => row.compute_budget === budget && hasLoss(row))]);
}

const optimaOf = result => result.fit?.approach2?.optima ?? [];
export const anyLoss = result => result.rows.some(hasLoss);

export function isoflop(result) {
  const [points, lines, notes, spoken] = [[], [], [], []];
  byBudget(result).forEach(([budget, rows], index) => {
    const label = `${flops(budget)} FLOPs`;
    points.push({
      index,
      label,
      points: rows.map(row => [row.model_size, row.final_loss]),
      names: rows.map(row => row.experiment_id),
    });
    const optimum = optimaOf(result).find(each => each.budget === budget);
    spoken.push(`${label}: ${plural(rows.length, "run")}`);
    if (!optimum) return;
    const sizes = [...rows.map(row => row.model_size), ...(optimum.usable ? [optimum.params] : [])];
    lines.push({ index, points: parabola(optimum, Math.min(...sizes), Math.max(...sizes)), dashed: !optimum.usable });
    if (optimum.usable) {
      const best = `optimum of ${label}`;
      points.push({ index, mark: "optimum", points: [[optimum.params, optimum.loss]], names: [best] });
      spoken.push(`lowest at N ${measured(optimum.params)}, loss ${measured(optimum.loss)}`);
    }
    const doubt = doubtOf(optimum);
    if (doubt) notes.push(`${label}: ${doubt}`);
  });
  notes.push(...withoutLoss(result));
  return { x: "parameters N", y: "loss (nats)", logX: true, points, lines, notes, spoken: `${spoken.join(", ")}.` };
}

function doubtOf({ usable, at_edge, curvature }) {
  if (usable) return at_edge && "its optimum lies outside of the sizes that were run";
  return `no optimum, its parabola ${curvature <= 0 ? "opens downwards" : "is lowest far outside of the sizes that were run"}`;
}

/** The fitted loss: a + b·x + c·x², x = ln N. */
function parabola({ coefficients: [a, b, c] }, low, high) {
  const [start, end] = [Math.log(low), Math.log(high)];
  return Array.from({ length: PARABOLA_POINTS }, (_, i) => {
    const x = start + ((end - start) * i) / (PARABOLA_POINTS - 1);
    return [Math.exp(x), a + b * x + c * x * x];
  });
}

function withoutLoss({ rows }) {
  const states = counted(
    rows
      .filter(row => !hasLoss(row))
      .map(row => (row.status === "completed" ? "completed without a finite loss" : row.status)),
  );
  return states.length ? [`not drawn: ${states.map(([state, n]) => `${n} ${state}`).join(", ")}`] : [];
}

function counted(all) {
  const counts = new Map();
  for (const each of all) counts.set(each, (counts.get(each) ?? 0) + 1);
  return [...counts];
}

export const scaling = result =>
  laws(result, "compute-optimal N and D", [
    ["parameters N", optimum => optimum.params, prediction => prediction.params],
    ["tokens D", optimum => optimum.tokens, prediction => prediction.tokens],
  ]);

export const tokensPerParameter = result =>
  laws(result, "compute-optimal D/N", [
    ["D/N", optimum => optimum.tokens / optimum.params, prediction => prediction.tokens_per_param],
  ]);

/** Approach 2 as a line, Approach 3 dashed, each with its band; past the budgets that were run marked as such. */
function laws(result, y, quantities) {
  const [points, lines, bands, spoken] = [[], [], [], []];
  quantities.forEach(([label, ofOptimum, ofPrediction], index) => {
    const optima = optimaOf(result).filter(each => each.usable);
    points.push({ index, label, mark: "optimum", points: optima.map(each => [each.budget, ofOptimum(each)]) });
    for (const approach of [2, 3]) {
      const told = (result.fit?.predictions ?? [])
        .filter(each => each.approach === approach)
        .map(each => ({ ...ofPrediction(each), budget: each.budget, extrapolates: each.extrapolates }))
        .filter(({ value }) => finite(value) && value > 0)
        .sort((a, b) => a.budget - b.budget);
      const at = each => [each.budget, toNumber(each.value)];
      lines.push({ index, points: told.map(at), dashed: approach === 3 });
      points.push({
        index,
        mark: "extrapolated",
        points: told.filter(each => each.extrapolates).map(at),
        names: told.filter(each => each.extrapolates).map(() => `${label}, approach ${approach}, extrapolated`),
      });
      const known = told.filter(({ low, high }) => finite(low) && finite(high) && low > 0);
      if (known.length > 1)
        bands.push({
          index,
          x: known.map(each => each.budget),
          low: known.map(each => each.low),
          high: known.map(each => each.high),
        });
      const last = told.at(-1);
      if (last)
        spoken.push(`${label} at ${flops(last.budget)} FLOPs by approach ${approach}: ${measured(last.value)}`);
    }
  });
  return {
    x: "compute C (FLOPs)",
    y,
    logX: true,
    logY: true,
    points: points.filter(each => each.points.length),
    lines: lines.filter(each => each.points.length > 1),
    bands,
    reading: "Line: approach 2, dashed: approach 3, bands: 95 %, hollow: extrapolated",
    spoken: `${spoken.join(", ")}.`,
  };
}

export function energy(result) {
  const points = [];
  byBudget(result).forEach(([budget, rows], index) => {
    const known = rows.filter(row => row.energy_j !== null);
    const at = row => [row.energy_j, row.final_loss];
    points.push({
      index,
      label: `${flops(budget)} FLOPs`,
      points: known.map(at),
      names: known.map(row => row.experiment_id),
    });
    const best = result.joules?.find(each => each.budget === budget);
    for (const mark of ["flop_optimal", "joule_optimal"]) {
      const row = best && known.find(each => each.experiment_id === best[mark]);
      if (row) points.push({ index, mark, points: [at(row)], names: [`${words(mark)}: ${row.experiment_id}`] });
    }
  });
  const unknown = counted(
    result.rows
      .filter(row => hasLoss(row) && row.energy_j === null)
      .map(row => words(row.energy_reason ?? "no reason given")),
  );
  const drawn = points.filter(each => !each.mark).reduce((sum, each) => sum + each.points.length, 0);
  return {
    x: "energy (J)",
    y: "loss (nats)",
    logX: true,
    points,
    notes: unknown.map(([reason, n]) => `${plural(n, "run")} left out, energy unknown: ${reason}`),
    spoken: `${plural(drawn, "run")} with known energy.`,
  };
}

const THROUGHPUT = "tokens_per_s";
export const ENERGY = "j_per_output_token";

/** Those that no other betters in both throughput and energy. What is not known of both is not among them. */
export function paretoFront(groups) {
  const known = groups.filter(hasJoules);
  const at = known.map(({ metrics }) => [toNumber(metrics[THROUGHPUT].mean), toNumber(metrics[ENERGY].mean)]);
  return known.filter((_, i) => {
    const [speed, joules] = at[i];
    return !at.some(([s, j]) => s >= speed && j <= joules && (s > speed || j < joules));
  });
}

const hasJoules = ({ metrics }) => finite(metrics[THROUGHPUT]?.mean) && finite(metrics[ENERGY]?.mean);

/** Joules per generated token against tokens per second, with the Pareto front. */
export function throughput(groups) {
  const front = paretoFront(groups);
  const bettered = groups.filter(group => hasJoules(group) && !front.includes(group));
  const at = ({ metrics }) => [metrics[THROUGHPUT].mean, metrics[ENERGY].mean];
  const interval = ({ low, high }) => (finite(low) && finite(high) ? [low, high] : null);
  const series = (index, label, mark, those) => ({
    index,
    label,
    mark,
    points: those.map(at),
    names: those.map(({ point }) => named(point) || "base"),
    intervals: those.map(({ metrics }) => interval(metrics[ENERGY])),
    xIntervals: those.map(({ metrics }) => interval(metrics[THROUGHPUT])),
  });
  const points = [series(0, "bettered by another", "run", bettered), series(1, "Pareto front", "optimum", front)];
  const without = groups.length - front.length - bettered.length;
  return {
    x: "tokens/s",
    y: "J per generated token",
    points: points.filter(each => each.points.length),
    lines: front.length > 1 ? [{ index: 1, points: stairs(front.map(at)) }] : [],
    notes: without ? [`${plural(without, "point")} left out: joules per token are not known`] : [],
    spoken: `Pareto front: ${front.map(group => `${named(group.point) || "base"}, ${spoken(at(group))}`).join("; ")}.`,
  };
}

const spoken = ([speed, joules]) => `${measured(speed)} tokens per second for ${measured(joules)} joules each`;

/** The least energy at which so many tokens per second, or more, were seen: what lies between two is not. */
function stairs(front) {
  const ordered = [...front].sort(([a], [b]) => a - b);
  return ordered.flatMap(([x, y], i) => [[x, y], ...(i + 1 < ordered.length ? [[x, ordered[i + 1][1]]] : [])]);
}

/** A point in words, by the last names of its fields. */
export const named = (point, but) =>
  Object.entries(point)
    .filter(([field]) => field !== but)
    .map(([field, value]) => `${field.slice(field.lastIndexOf(".") + 1)}=${said(value)}`)
    .join(", ");

export const said = value => (typeof value === "string" ? value : JSON.stringify(value));

/** The fields that the points vary, those with the most values first. */
export function axesOf(groups) {
  const fields = [...new Set(groups.flatMap(({ point }) => Object.keys(point)))];
  return fields
    .map(field => [field, valuesOf(groups, field).length])
    .sort(([a, n], [b, m]) => m - n || a.localeCompare(b))
    .map(([field]) => field);
}

function valuesOf(groups, field) {
  const found = new Map();
  for (const { point } of groups) if (field in point) found.set(JSON.stringify(point[field]), point[field]);
  const values = [...found.values()];
  return values.every(value => typeof value === "number") ? values.sort((a, b) => a - b) : values;
}

/** The mean of a metric against a field of the points; those that agree in all other fields share a colour. */
export function grid(groups, metric, axis) {
  const values = valuesOf(groups, axis);
  const isScale = values.every(value => typeof value === "number");
  const others = new Map();
  for (const { point, metrics } of groups) {
    const found = metrics[metric];
    if (!found || !(axis in point) || !finite(found.mean)) continue;
    const same = value => JSON.stringify(value) === JSON.stringify(point[axis]);
    const place = isScale ? point[axis] : values.findIndex(same);
    const interval = finite(found.low) && finite(found.high) ? [found.low, found.high] : null;
    const label = named(point, axis);
    others.set(label, [...(others.get(label) ?? []), { at: [place, found.mean], interval }]);
  }
  const series = [...others].map(([label, known], index) => {
    known.sort((a, b) => a.at[0] - b.at[0]);
    return { index, label, points: known.map(each => each.at), intervals: known.map(each => each.interval) };
  });
  const without = groups.length - series.reduce((sum, each) => sum + each.points.length, 0);
  return {
    x: axis,
    y: metric,
    logX: isScale && values[0] > 0 && values.at(-1) / values[0] >= LOG_FROM,
    ticks: isScale ? [] : values.map(said),
    points: series,
    lines: series.map(({ index, points }) => ({ index, points })),
    notes: without ? [`${plural(without, "point")} left out: without ${metric} or ${axis}`] : [],
    spoken: series
      .map(each => `${each.label && `${each.label}: `}${each.points.map(([x, y]) => `${measured(y)} at ${measured(x)}`).join(", ")}`)
      .join("; "),
  };
}
