/** Pages by the fragment of the address: `#/operations/ID?tab=logs`. The server never sees it. */

/** @returns {{path: string[], query: URLSearchParams}} */
export function here() {
  const [path, search = ""] = location.hash.replace(/^#\/?/, "").split("?");
  return { path: path.split("/").filter(Boolean).map(decodeURIComponent), query: new URLSearchParams(search) };
}

export function link(path, values = {}) {
  const query = new URLSearchParams(Object.entries(values).filter(([, value]) => value));
  return `#/${path}${query.size ? `?${query}` : ""}`;
}

export function go(hash) {
  location.hash = hash;
}

/** The same page, seen another way: no step for the back button. */
export function adjust(values) {
  const { path, query } = here();
  for (const [name, value] of Object.entries(values)) value ? query.set(name, value) : query.delete(name);
  history.replaceState(null, "", link(path.map(encodeURIComponent).join("/"), Object.fromEntries(query)));
  dispatchEvent(new HashChangeEvent("hashchange"));
}
