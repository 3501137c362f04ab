// app.mjs: the page. Better Auth, on the page's own origin, says who somebody is; taskd keeps their tasks.
const $ = (selector, within = document) => within.querySelector(selector);
const taskdURL = $("meta[name=taskd-url]").content;
const LEVELS = { low: "Low", medium: "Medium", high: "High" };
const [signForm, addForm, filters, editor] = ["#sign", "#add", "#filters", "#edit"].map((id) => $(id));
let login; // { user, token }: in memory only, so that nothing else can read the token
let shown; // how many tasks to ask for
let latest = 0; // number of the last list asked for: an earlier one that comes later is dropped

// --- Calls ---

async function auth(path, body) {
  const headers = { "Content-Type": "application/json" };
  const post = body && { method: "POST", headers, body: JSON.stringify(body) };
  const response = await fetch(`/api/auth/${path}`, post).catch(() => {
    throw new Error("The login server cannot be reached. Try again in a moment.");
  });
  const answer = await response.json();
  if (response.ok) return answer;
  if (path === "token" && response.status === 401) await start("Your session has ended. Sign in again.");
  throw new Error(answer?.message ?? response.statusText);
}

async function call(method, path = "", body, headers = {}, retry = true) {
  login.token ??= (await auth("token")).token;
  const url = `${taskdURL}/api/${encodeURIComponent(login.user.id)}/tasks${path}`;
  const sent = { "Content-Type": "application/json", ...headers, Authorization: `Bearer ${login.token}` };
  const signal = AbortSignal.timeout(30_000); // milliseconds
  const response = await fetch(url, { method, headers: sent, body: body && JSON.stringify(body), signal }).catch(() => {
    throw new Error("The task server cannot be reached. Try again in a moment.");
  });
  if (response.status === 401 && retry) {
    login.token = undefined; // it has expired: get another one, once
    return call(method, path, body, headers, false);
  }
  const answer = await response.json();
  if (response.ok) return { answer, headers: response.headers };
  throw Object.assign(new Error(answer.detail ?? answer.title), { errors: answer.errors });
}

// --- Forms ---

function onSubmit(form, action) {
  form.onsubmit = async (event) => {
    event.preventDefault();
    showError(form);
    await action(form.elements).catch((error) => showError(form, error));
  };
}

function showError(form, error) {
  $(".error", form).textContent = error?.message ?? "";
  const names = error?.errors?.map((one) => one.field.split(/\W/)[0]) ?? []; // tags[0] is about tags
  for (const field of form.elements) field.ariaInvalid = names.includes(field.name);
  $("[aria-invalid=true]", form)?.focus();
}

const readTask = ({ title, description, priority, due_date, tags }) => ({
  title: title.value,
  ...(description && { description: description.value || null }),
  priority: priority.value || null,
  due_date: due_date.value || null,
  tags: tags.value.split(",").map((tag) => tag.trim()).filter(Boolean),
});

function toast(text, undo) {
  $("#toast span").textContent = text;
  $("#undo").hidden = !undo;
  $("#undo").onclick = undo;
  $("#toast").hidden = !text;
  clearTimeout(toast.timer);
  if (undo) toast.timer = setTimeout(() => toast(""), 8000); // an error stays until a list succeeds
}

const attempt = (action) => () => action().catch((error) => toast(error.message));

// --- People ---

function welcome(isNew) {
  $("#sign h2").textContent = isNew ? "Create your account" : "Welcome back";
  $("#sign button").textContent = isNew ? "Sign up" : "Sign in";
  $("#other").textContent = isNew ? "I already have an account" : "I am new here";
  $("#other").onclick = () => welcome(!isNew);
  $("#name").hidden = !isNew;
  signForm.elements.password.autocomplete = isNew ? "new-password" : "current-password";
  showError(signForm);
  onSubmit(signForm, async ({ name, email, password }) => {
    const person = { email: email.value, password: password.value };
    await (isNew ? auth("sign-up/email", { ...person, name: name.value }) : auth("sign-in/email", person));
    await start();
  });
}

async function start(ended) { // ended: why nobody is signed in any more
  const session = await auth("get-session");
  login = session && { user: session.user };
  latest += 1; // a list that was asked for before, perhaps by somebody else, is dropped
  for (const form of [signForm, addForm, filters]) form.reset();
  showError(addForm);
  $("#editor").close();
  $("#tasks").replaceChildren();
  $("#account span").textContent = session?.user.name;
  $("#welcome").hidden = !!login;
  $("#board").hidden = $("#account").hidden = !login;
  if (!login) {
    welcome(ended === undefined);
    return showError(signForm, { message: ended });
  }
  addForm.elements.title.focus();
  await filterBy("");
}

$("#sign-out").onclick = attempt(async () => {
  await auth("sign-out", {});
  await start(""); // which forgets the token and the tasks
});

// --- Tasks ---

async function refresh() {
  const number = ++latest;
  const query = new URLSearchParams([...new FormData(filters)].filter(([, value]) => value.trim()));
  const isFiltered = ["q", "completed", "priority", "tag"].some((name) => query.has(name));
  query.set("limit", shown);
  const { answer: tasks, headers } = await call("GET", `?${query}`);
  if (number !== latest) return;
  if ($("#undo").hidden) toast("");
  const focused = document.activeElement;
  const row = [...$("#tasks").children].findIndex((one) => one.contains(focused));
  $("#tasks").replaceChildren(...tasks.map(item));
  if (row >= 0) { // what had the focus is made anew, or is gone
    const rows = $("#tasks").children;
    const next = $(".title", rows[Math.min(row, rows.length - 1)]) ?? addForm.elements.title;
    (document.getElementById(focused.id) ?? next).focus();
  }
  $("#more").hidden = !headers.get("Link");
  $("#empty").hidden = tasks.length > 0;
  $("#empty").textContent = isFiltered ? "No task fits these filters." : "Nothing to do. Add your first task above.";
}

async function filterBy(tag) {
  shown = 50;
  filters.elements.tag.value = tag;
  $("#any-tag").hidden = !tag;
  $("#any-tag").textContent = `#${tag} ×`;
  await refresh();
}

function make(tag, properties, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children.filter(Boolean)); // as text, whatever a title holds
  return element;
}

function item(task) {
  const { id, title, completed, description, priority, tags } = task;
  const done = make("input", { type: "checkbox", id: `done-${id}`, checked: completed, ariaLabel: title });
  done.onchange = attempt(() => complete(task, done));
  const open = make("button", { className: "title", id: `open-${id}`, title: "Edit" }, title);
  open.onclick = attempt(() => edit(id));
  const remove = make("button", { className: "remove", id: `remove-${id}`, ariaLabel: `Delete ${title}` }, "×");
  remove.onclick = attempt(() => removeTask(task));
  const level = priority && make("span", { className: priority }, LEVELS[priority]);
  const about = make("div", { className: "about" }, level, due(task));
  for (const tag of tags) {
    about.append(make("button", { className: "tag", onclick: attempt(() => filterBy(tag)) }, `#${tag}`));
  }
  const text = make("div", {}, open, description && make("p", {}, description), about);
  return make("li", { className: completed ? "done" : "" }, done, text, remove);
}

function due({ due_date: text, completed }) {
  if (!text) return null;
  const isDay = text.length === 10;
  const date = new Date(isDay ? `${text}T00:00` : text); // a day is one where the person is
  const days = Math.round((new Date(date).setHours(0, 0, 0, 0) - new Date().setHours(0, 0, 0, 0)) / 86400e3);
  const near = { "-1": "Yesterday", 0: "Today", 1: "Tomorrow" }[days];
  const year = date.getFullYear() === new Date().getFullYear() ? undefined : "numeric";
  const day = near ?? date.toLocaleDateString(undefined, { day: "numeric", month: "short", year });
  const time = isDay ? "" : `, ${date.toLocaleTimeString(undefined, { timeStyle: "short" })}`;
  const className = completed || days > 0 ? "" : days < 0 ? "late" : "today";
  return make("time", { className, dateTime: text }, day + time);
}

async function complete(task, box) {
  const body = { completed: box.checked }; // sets, so that a second try changes nothing
  await call("PATCH", `/${task.id}/complete`, body).catch((error) => {
    box.checked = task.completed;
    throw error;
  });
  await refresh();
}

async function removeTask(task) {
  await call("DELETE", `/${task.id}`);
  const undo = attempt(async () => {
    // As it was, with a new id: taskd ignores the members that it sets itself. The key: once, however often it is sent.
    await call("POST", "", task, { "Idempotency-Key": `undo-${task.id}` });
    toast("");
    await refresh();
  });
  toast(`Deleted “${task.title}”.`, undo);
  await refresh();
}

async function edit(id) {
  const { answer: task, headers } = await call("GET", `/${id}`);
  const { elements } = editor;
  for (const name of ["title", "description", "priority"]) elements[name].value = task[name] ?? "";
  elements.due_date.value = task.due_date?.slice(0, 10) ?? "";
  elements.tags.value = task.tags.join(", ");
  const before = readTask(elements);
  showError(editor);
  $("#editor").showModal();
  onSubmit(editor, async () => {
    const changes = Object.entries(readTask(elements)).filter(([name, value]) => `${value}` !== `${before[name]}`);
    const unchanged = { "If-Match": headers.get("ETag") }; // or 412: somebody changed it in between
    await call("PUT", `/${id}`, Object.fromEntries(changes), unchanged);
    $("#editor").close();
    await refresh();
  });
}

onSubmit(addForm, async (elements) => {
  addForm.key ??= crypto.randomUUID(); // sent again as it is, a task is made once
  await call("POST", "", readTask(elements), { "Idempotency-Key": addForm.key });
  addForm.key = undefined;
  addForm.reset();
  await refresh();
});
addForm.oninput = () => { addForm.key = undefined; };

filters.oninput = () => {
  clearTimeout(filters.timer);
  filters.timer = setTimeout(attempt(() => filterBy(filters.elements.tag.value)), 150);
};
filters.onsubmit = (event) => event.preventDefault();
$("#any-tag").onclick = attempt(() => filterBy(""));
$("#more").onclick = attempt(() => { shown += 50; return refresh(); });
$("#cancel").onclick = () => $("#editor").close();
for (const select of document.querySelectorAll("select[name=priority]")) {
  for (const [value, text] of Object.entries(LEVELS)) select.append(new Option(text, value));
}
await attempt(start)();
