// auth.mjs: Better Auth signs each token with its own secret, HS256.
import { betterAuth } from "better-auth";
import { bearer, jwt } from "better-auth/plugins";
import { SignJWT } from "jose";
import { database } from "./database.mjs"; // yours

async function sign(payload) {
  const { secret } = await auth.$context; // BETTER_AUTH_SECRET, or the first of BETTER_AUTH_SECRETS
  return new SignJWT(payload).setProtectedHeader({ alg: "HS256", typ: "JWT" }).sign(new TextEncoder().encode(secret));
}

export const auth = betterAuth({
  database,
  emailAndPassword: { enabled: true }, // or whatever people log in with
  plugins: [
    jwt({
      jwt: { sign },
      // Better Auth takes `sign` only with these two beside it. Nobody fetches this address: there is no public key.
      jwks: { remoteUrl: "https://unused.invalid/jwks", keyPairConfig: { alg: "EdDSA" } },
    }),
    bearer(),
  ],
});
