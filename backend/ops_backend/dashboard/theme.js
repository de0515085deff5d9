/** Light, dark, or as the system says. */

const KEY = "relight.theme";
const ORDER = ["auto", "light", "dark"];

export const theme = () => (ORDER.includes(localStorage.getItem(KEY)) ? localStorage.getItem(KEY) : "auto");

export function apply() {
  document.documentElement.dataset.theme = theme();
  dispatchEvent(new Event("theme"));
}

/** The next one, and what it is. */
export function next() {
  localStorage.setItem(KEY, ORDER[(ORDER.indexOf(theme()) + 1) % ORDER.length]);
  apply();
  return theme();
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", apply);
