// Runs tasks.mjs as a page of Better Auth's origin would: node page.mjs AUTH_URL TASKD_URL
//
// Node's fetch knows neither cookies nor CORS. This one keeps Better Auth's cookies, names the page's origin, sends a
// preflight before each call to another origin and, like a browser, shows the page nothing that was not allowed.
import { connect } from "./tasks.mjs";

const [authURL, taskdURL] = process.argv.slice(2);
const cookies = new Map();
const plainFetch = globalThis.fetch;

function assertAllowed(response, method, wanted) {
  const allowed = (name) => (response.headers.get(name) ?? "").toLowerCase().split(/\s*,\s*/);
  if (response.headers.get("access-control-allow-origin") !== authURL) throw new TypeError(`CORS: origin of ${method}`);
  if (!wanted) return;
  if (!allowed("access-control-allow-methods").includes(method.toLowerCase())) throw new TypeError(`CORS: ${method}`);
  const missing = wanted.filter((name) => !allowed("access-control-allow-headers").includes(name));
  if (missing.length) throw new TypeError(`CORS: ${missing}`);
}

globalThis.fetch = async (input, init = {}) => {
  const request = new Request(input, init);
  const url = new URL(request.url);
  if (url.origin !== authURL) {
    const wanted = Object.keys(init.headers ?? {}).map((name) => name.toLowerCase());
    const asking = {
      Origin: authURL,
      "Access-Control-Request-Method": request.method,
      "Access-Control-Request-Headers": wanted.sort().join(","),
    };
    assertAllowed(await plainFetch(url, { method: "OPTIONS", headers: asking }), request.method, wanted);
    request.headers.set("Origin", authURL);
    const response = await plainFetch(request);
    assertAllowed(response, request.method);
    return response;
  }
  request.headers.set("Origin", authURL);
  request.headers.set("Cookie", [...cookies].map(([name, value]) => `${name}=${value}`).join("; "));
  const response = await plainFetch(request);
  for (const cookie of response.headers.getSetCookie()) {
    const [, name, value] = /^([^=]+)=([^;]*)/.exec(cookie);
    cookies.set(name, value);
  }
  return response;
};

const { authClient, tasks, signOut } = connect({ authURL, taskdURL });
const refused = await tasks.list().catch((error) => error.message);
const email = `page-${process.pid}@example.com`;
const { data } = await authClient.signUp.email({ email, password: "correct horse battery staple", name: "Page" });
const added = await tasks.add("Buy milk");
const changed = await tasks.change(added.id, { description: "2 litres" });
const toggled = await tasks.toggle(added.id);
const listed = await tasks.list();
const read = await tasks.get(added.id);
const removed = await tasks.remove(added.id);
const left = await tasks.list();
const missing = await tasks.get(added.id).catch((error) => error.message);
await signOut();
const afterwards = await tasks.list().catch((error) => error.message);
const user = data.user.id;
const seen = { refused, user, added, changed, toggled, listed, read, removed, left, missing, afterwards };
console.log(JSON.stringify(seen));
