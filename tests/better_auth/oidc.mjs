// Another OpenID Connect issuer than Better Auth, with one client and one resource: node oidc.mjs AUDIENCE
//
// It prints where it listens. `GET /test/login?user=NAME` walks the authorization code flow of a browser for that user
// and answers with the tokens that come out of it. It ends when its standard input closes.
import { createHash, randomBytes } from "node:crypto";
import { createServer } from "node:http";
import Provider from "oidc-provider";

const [audience] = process.argv.slice(2);
const server = createServer();
await new Promise((listening) => server.listen(0, "127.0.0.1", listening));
const issuer = `http://127.0.0.1:${server.address().port}`;
const callback = "http://127.0.0.1/callback";
const page = { client_id: "page", application_type: "native", redirect_uris: [callback], token_endpoint_auth_method: "none" };
const machine = { client_id: "machine", client_secret: "machine", redirect_uris: [], response_types: [], grant_types: ["client_credentials"] };

const provider = new Provider(issuer, {
  clients: [page, machine],
  scopes: ["openid", "tasks"],
  findAccount: (_, id) => ({ accountId: id, claims: () => ({ sub: id }) }),
  ttl: { AccessToken: 900, ClientCredentials: 900, IdToken: 900, Grant: 900, Session: 900, Interaction: 900 },
  features: {
    clientCredentials: { enabled: true },
    // Without a resource, the access token is an opaque text for the issuer's own userinfo, and taskd cannot read it.
    resourceIndicators: {
      enabled: true,
      getResourceServerInfo: () => ({ scope: "tasks", audience, accessTokenFormat: "jwt", accessTokenTTL: 900 }),
      useGrantedResource: () => true,
    },
  },
});

async function logIn(user, resource) {
  const cookies = {};
  const verifier = randomBytes(32).toString("base64url");
  const challenge = createHash("sha256").update(verifier).digest("base64url");
  const send = async (url, form) => {
    const headers = { Cookie: Object.entries(cookies).map((pair) => pair.join("=")).join("; ") };
    const answer = await fetch(url, { method: form ? "POST" : "GET", headers, body: form ? new URLSearchParams(form) : undefined, redirect: "manual" });
    for (const cookie of answer.headers.getSetCookie()) {
      const [, name, value] = /^([^=]+)=([^;]*)/.exec(cookie);
      cookies[name] = value;
    }
    return answer;
  };
  const request = { client_id: "page", redirect_uri: callback, response_type: "code", scope: "openid tasks" };
  const query = new URLSearchParams({ ...request, code_challenge: challenge, code_challenge_method: "S256", ...resource });
  let url = `${issuer}/auth?${query}`;
  const forms = [{ prompt: "login", login: user, password: "any" }, { prompt: "consent" }];
  while (!url.startsWith(callback)) {
    const answer = await send(url, url.includes("/interaction/") && forms.shift());
    if (!answer.headers.get("location")) throw new Error(`${url}: ${answer.status} ${await answer.text()}`);
    url = new URL(answer.headers.get("location"), issuer).href;
  }
  const code = new URL(url).searchParams.get("code");
  const exchange = { grant_type: "authorization_code", code, code_verifier: verifier, client_id: "page", redirect_uri: callback };
  return (await send(`${issuer}/token`, exchange)).json();
}

async function machineToken() {
  const form = { grant_type: "client_credentials", client_id: "machine", client_secret: "machine", resource: audience, scope: "tasks" };
  return (await fetch(`${issuer}/token`, { method: "POST", body: new URLSearchParams(form) })).json();
}

server.on("request", async (request, response) => {
  const url = new URL(request.url, issuer);
  if (url.pathname !== "/test/login") return provider.callback()(request, response);
  const user = url.searchParams.get("user");
  try {
    const found = { resource: await logIn(user, { resource: audience }), plain: await logIn(user), machine: await machineToken() };
    response.end(JSON.stringify(found));
  } catch (error) {
    response.writeHead(500).end(String(error));
  }
});
process.stdin.on("end", () => process.exit(0)).resume();
console.log(`listening on ${issuer}`);
