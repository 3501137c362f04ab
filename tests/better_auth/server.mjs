// Starts a real Better Auth for the tests: node server.mjs jwks|secret|route [ALGORITHM] [--signed-cookies]
//
// It serves the configuration in auth-<mode>.mjs, the very files that docs/better-auth.md shows, and adds only what the
// tests must see: the session cookie cache, the verification mail, and routes below /test/. It ends on SIGTERM and when
// its standard input closes, so that it never outlives the tests.
import { createServer } from "node:http";
import { parseArgs } from "node:util";

const { positionals, values } = parseArgs({
  allowPositionals: true,
  options: { "signed-cookies": { type: "boolean", default: false } },
});
const [mode, algorithm] = positionals;
const mails = [];

const server = createServer();
await new Promise((listening) => server.listen(0, "127.0.0.1", listening));
const base = `http://127.0.0.1:${server.address().port}`;
process.env.BETTER_AUTH_URL = base; // the start of every issuer and audience
process.env.BETTER_AUTH_TELEMETRY = "0";

// Only now, because all of them read the environment.
const { betterAuth } = await import("better-auth");
const { fromNodeHeaders, toNodeHandler } = await import("better-auth/node");
const { bearer, createJwk, jwt } = await import("better-auth/plugins");
const { auth: shown, GET } = await import(`./auth-${mode}.mjs`);

const options = {
  ...shown.options,
  session: { cookieCache: { enabled: true, strategy: "jwt" } },
  emailVerification: {
    sendOnSignUp: true,
    sendVerificationEmail: async ({ user, token }) => void mails.push({ to: user.email, token }),
  },
  rateLimit: { enabled: false },
  logger: { level: "error" },
};
const jwtOptions = {
  ...(algorithm && { jwks: { keyPairConfig: { alg: algorithm } } }),
  ...(values["signed-cookies"] && { sessionCookieCache: true }),
};
if (Object.keys(jwtOptions).length) options.plugins = [jwt(jwtOptions), bearer()];
const auth = betterAuth(options);
const context = await auth.$context;
const serveAuth = toNodeHandler(auth);

const routes = {
  "GET /api/token": GET,
  "GET /test/mails": () => Response.json(mails),
  "POST /test/rotate": async () => Response.json({ kid: (await createJwk({ context }, jwtOptions)).id }),
};

server.on("request", async (request, response) => {
  const route = routes[`${request.method} ${request.url}`];
  if (!route) return serveAuth(request, response);
  try {
    const answer = await route(new Request(base + request.url, { headers: fromNodeHeaders(request.headers) }));
    response.writeHead(answer.status, Object.fromEntries(answer.headers)).end(await answer.text());
  } catch (error) {
    console.error(error);
    response.writeHead(500).end();
  }
});

const end = () => process.exit(0);
process.on("SIGTERM", end);
process.stdin.on("end", end).on("error", end).resume();
console.log(`listening on ${base}`);
