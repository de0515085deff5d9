/** The REST API: one shape of errors, tags so that what is unchanged is not sent again, and what is known of the connection. */

const PREFIX = "/api/v1";
const REMEMBERED = 40;

/** The API said no; `message` says what to do. */
class Refused extends Error {
  constructor(status, { code, message, details }) {
    super(message);
    Object.assign(this, { status, code, details: details ?? {} });
  }
}

/** Nobody answered, or the database is away: the same again may work in a moment. */
export class Away extends Error {}

/** Says `away`, `back` and `logged-out` of all requests together. */
export const connection = new EventTarget();

const remembered = new Map();
let away = false;
let skewMs = 0;

/** Milliseconds since the epoch by the server's clock: the browser's may be wrong. */
export const now = () => Date.now() + skewMs;

/** The body; the very same object as before when nothing has changed. */
export async function get(path, signal) {
  const known = remembered.get(path);
  const answer = await ask("GET", path, { signal, headers: known ? { "If-None-Match": known.tag } : {} });
  if (answer.status === 304) return known.body;
  const body = await answer.json();
  const tag = answer.headers.get("ETag");
  remembered.delete(path);
  if (tag) remembered.set(path, { tag, body });
  if (remembered.size > REMEMBERED) remembered.delete(remembered.keys().next().value);
  return body;
}

/** Text with the headers that say which bytes it is. */
export async function getBytes(path, signal) {
  const answer = await ask("GET", path, { signal });
  return { bytes: new Uint8Array(await answer.arrayBuffer()), headers: answer.headers };
}

/** `key`: the same request sent twice counts once. */
export async function send(method, path, body, key) {
  const headers = { "Content-Type": "application/json", ...(key && { "Idempotency-Key": key }) };
  const answer = await ask(method, path, { headers, body: body === undefined ? undefined : JSON.stringify(body) });
  return answer.status === 204 ? null : answer.json();
}

/** For one wish of the user. `crypto.randomUUID` is there on https and loopback only. */
export function newKey() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), byte => byte.toString(16).padStart(2, "0")).join("");
}

/** `?a=b` of what is given. */
export function query(values) {
  const given = Object.entries(values).filter(
    ([, value]) => value !== undefined && value !== null && value !== "" && value !== false,
  );
  return given.length ? `?${new URLSearchParams(given)}` : "";
}

export const url = path => PREFIX + path;

async function ask(method, path, options) {
  let answer;
  try {
    answer = await fetch(url(path), { method, cache: "no-store", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw lost("the server does not answer");
  }
  if ([502, 503, 504].includes(answer.status)) throw lost((await refusal(answer)).message);
  if (away) {
    away = false;
    connection.dispatchEvent(new Event("back"));
  }
  const date = Date.parse(answer.headers.get("Date"));
  if (date) skewMs = Math.abs(date - Date.now()) < 2000 ? 0 : date - Date.now();
  if (answer.ok || answer.status === 304) return answer;
  const refused = new Refused(answer.status, await refusal(answer));
  if (answer.status === 401 && path !== "/session") connection.dispatchEvent(new Event("logged-out"));
  throw refused;
}

function lost(message) {
  if (!away) {
    away = true;
    connection.dispatchEvent(new Event("away"));
  }
  return new Away(message);
}

/** A proxy in between may answer something else than our errors. */
async function refusal(answer) {
  try {
    return (await answer.json()).error;
  } catch {
    return { code: "unknown", message: `the server answered ${answer.status}` };
  }
}
