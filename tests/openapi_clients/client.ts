// Calls every route of a running taskd with the types that openapi-typescript makes of openapi.json.
import createClient from "openapi-fetch";
import type { components, paths } from "./schema.js";

type Task = components["schemas"]["Task"];
declare const process: { env: Record<string, string | undefined>; exit(code: number): never };

const client = createClient<paths>({
  baseUrl: process.env["TASKD_URL"] ?? "",
  headers: { Authorization: `Bearer ${process.env["TASKD_TOKEN"] ?? ""}` },
});
const user_id = "alice";

function check(fits: boolean, what: string): asserts fits {
  if (!fits) { console.error(`wrong: ${what}`); process.exit(1); }
}

async function create(task: components["schemas"]["NewTask"], key?: string): Promise<Task> {
  const { data, response } = await client.POST("/api/{user_id}/tasks", {
    params: { path: { user_id }, header: key === undefined ? {} : { "Idempotency-Key": key } }, body: task,
  });
  check(data !== undefined && response.status === 201, "create");
  return data;
}

const first = await create({ title: "Buy milk" }, "once");
check((await create({ title: "Buy milk" }, "once")).id === first.id, "a key");
const second = await create({ title: "Call", priority: "high", due_date: "2026-12-01", tags: ["home", "phone"] });
const one = { path: { user_id, task_id: first.id } };

const page = await client.GET("/api/{user_id}/tasks", {
  params: { path: { user_id }, query: { limit: 1, sort: "-due_date" } },
});
check(page.data?.[0]?.id === second.id, "a page");
const next = /<[^>]*[?&]after=([^&>]+)/.exec(page.response.headers.get("Link") ?? "")?.[1];
check(next !== undefined, "a link");
const rest = await client.GET("/api/{user_id}/tasks", {
  params: { path: { user_id }, query: { limit: 1, sort: "-due_date", after: next } },
});
check(rest.data?.[0]?.id === first.id, "the next page");
const found = await client.GET("/api/{user_id}/tasks", {
  params: { path: { user_id }, query: { tag: ["home", "phone"], completed: false, priority: "high", due_before: "2027-01-01" } },
});
check(found.data?.length === 1 && found.data[0]?.tags[1] === "phone", "filters");

const read = await client.GET("/api/{user_id}/tasks/{task_id}", { params: one });
const tag = read.response.headers.get("ETag") ?? "";
const same = await client.GET("/api/{user_id}/tasks/{task_id}", { params: { ...one, header: { "If-None-Match": tag } } });
check(same.response.status === 304, "a tag that is known");
const put = await client.PUT("/api/{user_id}/tasks/{task_id}", {
  params: { ...one, header: { "If-Match": tag } }, body: { description: "2 litres" },
});
check(put.data?.description === "2 litres", "PUT");
const stale = await client.PATCH("/api/{user_id}/tasks/{task_id}", {
  params: { ...one, header: { "If-Match": tag } }, body: { tags: ["x"] },
});
check(stale.error?.status === 412, "a stale tag");
const patch = await client.PATCH("/api/{user_id}/tasks/{task_id}", { params: one, body: { priority: null, tags: ["x"] } });
check(patch.data?.tags[0] === "x", "PATCH");
const toggled = await client.PATCH("/api/{user_id}/tasks/{task_id}/complete", { params: one, body: {} });
const set = await client.PATCH("/api/{user_id}/tasks/{task_id}/complete", { params: one, body: { completed: true } });
const plain = await client.PATCH("/api/{user_id}/tasks/{task_id}/complete", { params: one });
check(toggled.data?.completed === true && set.data?.completed === true && plain.data?.completed === false, "complete");
const gone = await client.DELETE("/api/{user_id}/tasks/{task_id}", { params: one });
check(gone.data?.id === first.id, "DELETE");
const missing = await client.GET("/api/{user_id}/tasks/{task_id}", { params: one });
check(missing.error?.status === 404, "a task that is gone");
console.log("all routes");
