// auth.mjs: Better Auth signs each token with a key of its own and publishes the public half at /api/auth/jwks.
import { betterAuth } from "better-auth";
import { bearer, jwt } from "better-auth/plugins";
import { database } from "./database.mjs"; // yours

export const auth = betterAuth({
  database,
  emailAndPassword: { enabled: true }, // or whatever people log in with
  plugins: [jwt(), bearer()],
});
