// auth.mjs: Better Auth with e-mail and password. It signs each person's token with a key of its own
// and publishes the public half at /api/auth/jwks, where taskd fetches it.
import { betterAuth } from "better-auth";
import { jwt } from "better-auth/plugins";
import { SqliteDialect } from "kysely";
import Database from "libsql";

const database = new Database(process.env.AUTH_DATABASE ?? "auth.db");

export const auth = betterAuth({
  baseURL: process.env.BETTER_AUTH_URL, // the page's origin; iss and aud of every token
  secret: process.env.BETTER_AUTH_SECRET, // signs the cookies and encrypts the private keys
  database: { type: "sqlite", dialect: new SqliteDialect({ database }) },
  emailAndPassword: { enabled: true },
  plugins: [jwt({ jwt: { expirationTime: process.env.TOKEN_LIFETIME ?? "15m" } })],
});
