// server.mjs: serves the page, and Better Auth below /api/auth on the same origin.
import { readFileSync } from "node:fs";
import { createServer } from "node:http";
import { getMigrations } from "better-auth/db/migration";
import { toNodeHandler } from "better-auth/node";
import { auth } from "./auth.mjs";

const { BETTER_AUTH_URL: origin, TASKD_URL: taskd } = process.env;
const read = (name) => readFileSync(new URL(name, import.meta.url), "utf8");
const files = {
  "/": ["text/html", read("index.html").replace("TASKD_URL", taskd)],
  "/app.mjs": ["text/javascript", read("app.mjs")],
  "/style.css": ["text/css", read("style.css")],
};
const headers = {
  "Cache-Control": "no-cache",
  "Content-Security-Policy": `default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; \
connect-src 'self' ${taskd}; form-action 'self'; base-uri 'none'; frame-ancestors 'none'`,
  "Referrer-Policy": "no-referrer",
  "X-Content-Type-Options": "nosniff",
};

await (await getMigrations(auth.options)).runMigrations(); // makes Better Auth's tables
const serveAuth = toNodeHandler(auth);

const server = createServer((request, response) => {
  const { pathname } = new URL(request.url, origin);
  if (pathname.startsWith("/api/auth/")) return serveAuth(request, response);
  const [type, content] = files[pathname] ?? ["text/plain", "Not found\n"];
  const status = pathname in files ? 200 : 404;
  response.writeHead(status, { ...headers, "Content-Type": `${type}; charset=utf-8` }).end(content);
});
await new Promise((listening, failed) => {
  server.on("error", failed).listen(new URL(origin).port, "127.0.0.1", listening);
});
