// tasks.mjs: calls taskd from the browser, as whoever is signed in to Better Auth.
import { createAuthClient } from "better-auth/client";
import { jwtClient } from "better-auth/client/plugins";

export function connect({ authURL, taskdURL }) {
  const authClient = createAuthClient({ baseURL: authURL, plugins: [jwtClient()] });
  let login; // { token, userId }; a token is good for 15 minutes

  async function logIn() {
    const session = await authClient.getSession(); // the session cookie goes along by itself
    if (!session.data) throw new Error("not signed in");
    const { data, error } = await authClient.token(); // GET /api/auth/token
    if (error) throw new Error(`no token: ${error.status} ${error.statusText}`);
    return { token: data.token, userId: session.data.user.id };
  }

  async function send(method, path, body) {
    const headers = { Authorization: `Bearer ${login.token}` };
    if (body !== undefined) headers["Content-Type"] = "application/json";
    const url = `${taskdURL}/api/${encodeURIComponent(login.userId)}/tasks${path}`;
    return fetch(url, { method, headers, body: body === undefined ? undefined : JSON.stringify(body) });
  }

  async function call(method, path = "", body) {
    login ??= await logIn();
    let response = await send(method, path, body);
    if (response.status === 401) {
      login = await logIn(); // the token has expired: get a new one, once
      response = await send(method, path, body);
    }
    const answer = await response.json();
    if (!response.ok) throw new Error(`${answer.title}: ${answer.detail}`);
    return answer;
  }

  const tasks = {
    list: () => call("GET"),
    add: (title) => call("POST", "", { title }),
    get: (id) => call("GET", `/${id}`),
    change: (id, changes) => call("PUT", `/${id}`, changes),
    toggle: (id) => call("PATCH", `/${id}/complete`),
    remove: (id) => call("DELETE", `/${id}`),
  };

  async function signOut() {
    login = undefined; // or the next one to sign in would see these tasks
    await authClient.signOut();
  }

  return { authClient, tasks, signOut };
}
