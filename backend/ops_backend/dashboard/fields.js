/** Form fields from a JSON Schema: what is left empty keeps its default, what is wrong is said at its field. */

import { h } from "./dom.js";

const PERIOD = /^(\d+(?:\.\d+)?)\s*(epoch|step|second)s?$/;

/** The schema of a field with its reference followed, and what `null` would mean left out. */
function plain(schema, defs) {
  const found = schema.$ref ? { ...defs[schema.$ref.split("/").at(-1)], ...schema } : schema;
  const some = (found.anyOf ?? []).filter(each => each.type !== "null");
  return some.length === 1 ? plain({ ...found, anyOf: undefined, ...some[0] }, defs) : found;
}

/**
 * @param {object} schema of an object
 * @param {string} prefix of its fields' paths, with its dot
 * @param {{values: Object<string, string>, was?: object, problems: Object<string, string>, only?: string[], except?: string[]}} state
 *   `values`: what was typed, by path; `was`: what stands there already, for a fork
 */
export function fields(schema, prefix, state) {
  const defs = schema.$defs ?? state.defs ?? {};
  const names = state.only ?? Object.keys(schema.properties ?? {}).filter(name => !state.except?.includes(name));
  return names
    .map(name => [name, schema.properties[name]])
    .map(([name, property]) =>
      field(name, plain(property, defs), prefix + name, state, schema.required?.includes(name)),
    );
}

function field(name, schema, path, state, required) {
  const id = `field-${path}`;
  const problem = state.problems[path];
  const standing = state.was?.[name] ?? schema.default;
  const described = [schema.description && `${id}-help`, problem && `${id}-problem`].filter(Boolean).join(" ");
  const props = {
    id,
    "aria-describedby": described || undefined,
    "aria-invalid": problem ? "true" : undefined,
    value: state.values[path] ?? "",
    required,
  };
  const typed = event => {
    state.values[path] = event.target.value;
  };
  const choices = schema.type === "boolean" ? ["true", "false"] : schema.enum && [...new Set(schema.enum.map(String))];
  const input = choices
    ? h(
        "select",
        { ...props, onchange: typed },
        h("option", { value: "" }, standing === undefined ? "choose" : written(standing)),
        choices.filter(each => each !== written(standing)).map(each => h("option", { value: each }, each)),
      )
    : h("input", {
        ...props,
        oninput: typed,
        autocomplete: "off",
        inputmode: ["integer", "number"].includes(schema.type) ? "decimal" : undefined,
        placeholder: written(standing),
      });
  return h(
    "div",
    { class: `field${problem ? " wrong" : ""}`, key: path },
    h("label", { for: id }, name.replaceAll("_", " ")),
    input,
    problem && h("p", { class: "bad small", id: `${id}-problem` }, problem),
    schema.description && h("p", { class: "small quiet", id: `${id}-help` }, schema.description),
  );
}

const written = value =>
  value === undefined || value === null ? "" : typeof value === "string" ? value : JSON.stringify(value);

/**
 * What was typed under a prefix, as values of the schema. Raises what is wrong, as {path, problem}.
 */
export function entered(schema, prefix, state) {
  const defs = schema?.$defs ?? state.defs ?? {};
  const found = {};
  for (const [path, text] of Object.entries(state.values)) {
    const name = path.slice(prefix.length);
    if (!path.startsWith(prefix) || text.trim() === "" || !schema?.properties?.[name]) continue;
    found[name] = read(text.trim(), plain(schema.properties[name], defs), path);
  }
  return found;
}

function read(text, schema, path) {
  if (schema.type === "string" || schema.enum?.every(each => typeof each === "string")) return text;
  if (schema.type === "integer" || schema.type === "number") {
    const value = Number(text);
    if (Number.isNaN(value)) throw { path, problem: "is no number" };
    if (schema.type === "integer" && Number.isInteger(value) && !Number.isSafeInteger(value))
      throw { path, problem: "is too large for a browser; submit it with ops" };
    return value;
  }
  const [, number, unit] = PERIOD.exec(text) ?? [];
  if (unit && schema.anyOf) return { [`${unit}s`]: Number(number) };
  try {
    return JSON.parse(text);
  } catch {
    return text;
  }
}
