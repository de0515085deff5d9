/** What a study came to, as tables and in words: optima, fits, and what is to be doubted. */

import { h } from "./dom.js";
import { big, count, flops, measured, within } from "./format.js";
import { number, table } from "./tables.js";

const MOST = 100; // of a list of remarks

export const section = (title, ...content) => h("section", { key: title }, h("h2", {}, title), content);

/** What is compute-optimal, by budget and approach. */
export function predictions(all) {
  const rows = [...all]
    .sort((a, b) => a.budget - b.budget || a.approach - b.approach)
    .map(each =>
      h(
        "tr",
        { key: `${each.budget} ${each.approach}` },
        number([flops(each.budget), each.extrapolates && h("span", { class: "small quiet" }, " extrapolated")]),
        number(each.approach),
        [each.params, each.tokens, each.tokens_per_param].map(estimate => number(within(estimate, big))),
        number(within(each.loss)),
      ),
    );
  const heads = [
    ["Budget (FLOPs)", true],
    ["Approach", true],
    ["Parameters", true],
    ["Tokens", true],
    ["Tokens per parameter", true],
    ["Loss", true],
  ];
  return table("Compute-optimal, with 95 % intervals", heads, rows);
}

export function fits({ flops: perToken, embeddings, fit }) {
  const { approach2, approach3 } = fit;
  const said = {
    "FLOPs per token": perToken,
    "N counts": `embeddings ${embeddings}`,
    runs: count(fit.points),
    ...(approach2 && {
      "approach 2: a of N ∝ C^a": within(approach2.params?.exponent),
      "approach 2: b of D ∝ C^b": within(approach2.tokens?.exponent),
      "approach 2: bias of a": measured(approach2.bias),
    }),
    ...(approach3 && {
      ...Object.fromEntries(
        ["E", "A", "B", "alpha", "beta"].map(name => [`approach 3: ${name}`, within(approach3[name])]),
      ),
      "approach 3: R²": measured(approach3.r2),
      "approach 3: root mean square of log loss": measured(approach3.rmse_log),
      "approach 3: resamples": count(approach3.bootstraps),
    }),
  };
  return h(
    "dl",
    { class: "pairs" },
    Object.entries(said).map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))),
  );
}

/** All that the result wants to be known of itself. */
export function remarks({ warnings = [], skipped = [], fit }) {
  const lists = {
    Warnings: [...warnings, ...(fit?.warnings ?? [])],
    Outliers: (fit?.approach3?.outliers ?? []).map(
      each =>
        `${each.experiment_id}: ${measured(each.robust_z)} robust standard deviations off the fit, of which it is a part`,
    ),
    "Left out of the fits as asked": fit?.dropped ?? [],
    Skipped: skipped.map(each => `${each.what}: ${each.reason}`),
  };
  return Object.entries(lists)
    .filter(([, all]) => all.length)
    .map(([title, all]) =>
      section(
        title,
        h(
          "ul",
          { class: "remarks" },
          all.slice(0, MOST).map(text => h("li", {}, text)),
          all.length > MOST && h("li", {}, `and ${count(all.length - MOST)} more`),
        ),
      ),
    );
}
