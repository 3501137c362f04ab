// demo.mjs: starts the page with its logins in this process, and taskd beside it. Ctrl-C ends both.
import { spawn } from "node:child_process";
import { randomBytes } from "node:crypto";
import { existsSync, mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { fileURLToPath } from "node:url";

const { PORT = "3000", TASKD_PORT = "8001", PYTHON = "python3" } = process.env;
const origin = `http://localhost:${PORT}`;
const program = fileURLToPath(new URL("../../taskd.py", import.meta.url));
const data = process.env.DEMO_DATA ?? fileURLToPath(new URL("data", import.meta.url));

mkdirSync(data, { recursive: true, mode: 0o700 });
process.chdir(data); // auth.db and taskd.db are made here
if (!existsSync("secret")) {
  writeFileSync("secret", randomBytes(32).toString("base64url"), { mode: 0o600 });
}
process.env.BETTER_AUTH_URL = origin;
process.env.BETTER_AUTH_SECRET = readFileSync("secret", "utf8");
process.env.TASKD_URL = `http://127.0.0.1:${TASKD_PORT}`;
await import("./server.mjs").catch((error) => { // before taskd, which fetches the key set from it
  if (error.code !== "EADDRINUSE") throw error;
  console.error(`demo: ${error.message}; another port: PORT=3001 make demo`);
  process.exit(1);
});

const taskd = spawn(PYTHON, [program], {
  stdio: ["ignore", "inherit", "inherit"],
  env: {
    ...process.env,
    TASKD_URL: undefined, // the page's setting, not one of taskd
    BETTER_AUTH_SECRET: "", // taskd needs none: it verifies tokens with the public keys
    DATABASE_URL: "sqlite:///taskd.db",
    TASKD_PORT,
    TASKD_JWKS_URL: `${origin}/api/auth/jwks`,
    TASKD_ISSUER: origin,
    TASKD_AUDIENCE: origin,
    TASKD_CORS_ORIGINS: origin,
  },
});
taskd.on("exit", (status) => process.exit(status ?? 1));
for (const signal of ["SIGINT", "SIGTERM"]) process.on(signal, () => taskd.kill(signal));
console.log(`Open ${origin} and sign up with any e-mail address. Ctrl-C ends the demo.`);
