// Better Auth without the jwt() plugin, and a route of your own, GET /api/token, that signs the session's user.
import { betterAuth } from "better-auth";
import { SignJWT } from "jose";
import { database } from "./database.mjs"; // yours

export const auth = betterAuth({
  database,
  emailAndPassword: { enabled: true }, // or whatever people log in with
});

export async function GET(request) {
  const session = await auth.api.getSession({ headers: request.headers });
  if (!session) return Response.json({ message: "not signed in" }, { status: 401 });
  const { secret } = await auth.$context; // BETTER_AUTH_SECRET, or the first of BETTER_AUTH_SECRETS
  const { id, email, name } = session.user;
  const token = await new SignJWT({ email, name })
    .setProtectedHeader({ alg: "HS256", typ: "JWT" })
    .setSubject(id)
    .setIssuedAt()
    .setExpirationTime("15m")
    .sign(new TextEncoder().encode(secret));
  return Response.json({ token });
}
