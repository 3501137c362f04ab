// Rotates the secret of a Better Auth with twoFactor() as docs/better-auth.md says: node rotation.mjs jwks|secret OLD NEW
//
// Each step starts Better Auth with other secrets on the same data. Alice has a second factor, Bob has none. It prints
// what Better Auth itself answers, step by step, and the tokens that it hands out, as one JSON object.
import { base32 } from "@better-auth/utils/base32";
import { createOTP } from "@better-auth/utils/otp";
import { betterAuth } from "better-auth";
import { memoryAdapter } from "better-auth/adapters/memory";
import { twoFactor } from "better-auth/plugins";

const [mode, oldSecret, newSecret] = process.argv.slice(2);
const base = "http://127.0.0.1:3000";
const password = "correct horse battery staple";
const tables = { user: [], session: [], account: [], verification: [], jwks: [], twoFactor: [] };
const answers = {};
const tokens = {};
let cookies = {}; // of whoever is signed in
let handler;
let step;
process.env.BETTER_AUTH_URL = base;
process.env.BETTER_AUTH_TELEMETRY = "0";

async function start(name, secrets) {
  step = name;
  answers[step] = [];
  delete process.env.BETTER_AUTH_SECRET;
  delete process.env.BETTER_AUTH_SECRETS;
  Object.assign(process.env, secrets);
  const { auth: shown } = await import(`./auth-${mode}.mjs?${name}`); // as a new process would read it
  const options = { ...shown.options, database: memoryAdapter(tables), rateLimit: { enabled: false } };
  options.plugins = [...shown.options.plugins, twoFactor()];
  handler = betterAuth({ ...options, logger: { disabled: true } }).handler;
}

async function call(method, path, body) {
  const headers = { Origin: base, "Content-Type": "application/json" };
  headers.Cookie = Object.entries(cookies).map((pair) => pair.join("=")).join("; ");
  const answer = await handler(new Request(`${base}/api/auth${path}`, { method, headers, body: body && JSON.stringify(body) }));
  for (const cookie of answer.headers.getSetCookie()) {
    const [, name, value] = /^([^=]+)=([^;]*)/.exec(cookie);
    cookies[name] = value;
  }
  const found = await answer.json().catch(() => ({}));
  answers[step].push(`${path} ${found === null ? "signed out" : answer.status}`);
  return found ?? {};
}

async function code(uri) {
  const secret = new TextDecoder().decode(base32.decode(new URL(uri).searchParams.get("secret")));
  return createOTP(secret).totp();
}

async function logIn(name, uri) {
  cookies = {};
  await call("POST", "/sign-in/email", { email: `${name}@example.com`, password });
  if (uri) await call("POST", "/two-factor/verify-totp", { code: await code(uri) });
  tokens[`${step} ${name}`] = (await call("GET", "/token")).token;
}

await start("before", { BETTER_AUTH_SECRET: oldSecret });
for (const name of ["bob", "alice"]) {
  await call("POST", "/sign-up/email", { name, email: `${name}@example.com`, password });
  tokens[`before ${name}`] = (await call("GET", "/token")).token;
}
const { totpURI } = await call("POST", "/two-factor/enable", { password });
await call("POST", "/two-factor/verify-totp", { code: await code(totpURI) });

const both = `2:${newSecret},1:${oldSecret}`;
for (const [name, secrets] of Object.entries({
  "without the old one beside": { BETTER_AUTH_SECRETS: both },
  "with the old one beside": { BETTER_AUTH_SECRETS: both, BETTER_AUTH_SECRET: oldSecret },
  "without the old one in the list": { BETTER_AUTH_SECRETS: `2:${newSecret}`, BETTER_AUTH_SECRET: oldSecret },
  "with quotes": { BETTER_AUTH_SECRETS: `"${both}"`, BETTER_AUTH_SECRET: oldSecret },
})) {
  try {
    await start(name, secrets);
    await call("GET", "/get-session");
    await logIn("bob");
    await logIn("alice", totpURI);
  } catch (error) {
    answers[name] = error.message;
  }
}
console.log(JSON.stringify({ answers, tokens }));
process.exit(0);
