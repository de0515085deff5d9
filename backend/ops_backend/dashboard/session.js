/** Who is logged in, and what they may do: what they may not is not offered. The API decides. */

const ALLOWS = { read: ["read"], operate: ["read", "operate"], admin: ["read", "operate", "admin"] };

let session = null;

export const user = () => session?.user ?? null;

/** @param {"read" | "operate" | "admin"} scope */
export const may = scope => ALLOWS[session?.scope]?.includes(scope) ?? false;

/** @param {{user: string, scope: string} | null} found null: nobody is */
export function enter(found) {
  session = found;
}

export const said = () => (session ? `Logged in as ${session.user}, who may ${session.scope}` : "");
