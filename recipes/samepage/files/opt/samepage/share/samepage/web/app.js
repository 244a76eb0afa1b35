// The page's logic: asks the API, shows answers. All text reaches the page as text, never as HTML.

import { ApiError, call, CONFLICT, NOT_SIGNED_IN, PASSWORD_CHANGE_NEEDED } from "/rpc.js";

const $ = (id) => document.getElementById(id);
const PAGE = 30;
const REFRESH = 30_000; // milliseconds
const state = { user: null, item: null, items: [], total: 0, query: "", stream: [], next: null, theirs: null };

// --- small helpers ---------------------------------------------------------------------------------------------------

function element(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

function text(name, value) {
  for (const node of document.querySelectorAll(`[data-text="${name}"]`)) node.textContent = value;
}

function show(id, ...others) {
  for (const other of others) $(other).hidden = true;
  $(id).hidden = false;
}

function face(name) {
  const letters = name.split(/\s+/).map((word) => word[0] ?? "").slice(0, 2).join("").toUpperCase();
  return element("span", { className: "face", textContent: letters, ariaHidden: "true" });
}

const relative = new Intl.RelativeTimeFormat("en", { numeric: "auto" });
const absolute = new Intl.DateTimeFormat("en", { dateStyle: "medium", timeStyle: "short" });
const UNITS = [["day", 86400], ["hour", 3600], ["minute", 60]];

function when(at) {
  const moment = new Date(at);
  const seconds = (moment - Date.now()) / 1000;
  const [unit, length] = UNITS.find(([, length]) => Math.abs(seconds) >= length) ?? ["", 0];
  const words = !unit ? "just now" : unit === "day" && seconds < -7 * 86400
    ? absolute.format(moment) : relative.format(Math.round(seconds / length), unit);
  return element("time", { dateTime: at, title: absolute.format(moment), textContent: words });
}

function marked(snippet) {
  // The server puts \ue000 and \ue001 around the words it found.
  return snippet.split(/(\ue000[^\ue001]*\ue001)/).map((part) =>
    part.startsWith("\ue000") ? element("mark", { textContent: part.slice(1, -1) }) : part);
}

let bannerTimer;
function banner(message, lasting = false) {
  clearTimeout(bannerTimer);
  $("banner").textContent = message;
  $("banner").hidden = !message;
  if (message && !lasting) bannerTimer = setTimeout(() => banner(""), 4000);
}

function fault(form, message) {
  const place = form.querySelector(".fault");
  place.textContent = message;
  place.hidden = !message;
}

// Runs `work` for a form: one submission at a time, faults shown in the form.
function onSubmit(form, work) {
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const buttons = [...form.querySelectorAll("button")];
    fault(form, "");
    buttons.forEach((button) => { button.disabled = true; });
    try {
      await work(Object.fromEntries(new FormData(form)), form);
    } catch (error) {
      if (!await expelled(error)) fault(form, sentence(error.message));
    } finally {
      buttons.forEach((button) => { button.disabled = false; });
    }
  });
}

function onClick(id, work) {
  $(id).addEventListener("click", async () => {
    try {
      await work();
    } catch (error) {
      if (!await expelled(error)) banner(sentence(error.message));
    }
  });
}

const sentence = (message) => `${message[0].toUpperCase()}${message.slice(1)}.`;

// A session that ended, in any call, leads back to the sign-in form.
async function expelled(error) {
  if (!(error instanceof ApiError)) throw error;
  if (error.code === NOT_SIGNED_IN && state.user) {
    banner("You were signed out.");
    state.user = null;
    enter("sign-in");
    return true;
  }
  if (error.code === PASSWORD_CHANGE_NEEDED) {
    enter("change-password");
    return true;
  }
  return false;
}

// --- getting in ------------------------------------------------------------------------------------------------------

function enter(id) {
  $("workplace").hidden = true;
  show("entry");
  show(id, "sign-in", "change-password", "invitation", "invitation-lost");
  for (const form of document.querySelectorAll("#entry form")) if (form.id !== "change-password") form.reset();
  $(id).querySelector("input:not([hidden])")?.focus();
}

function same(values) {
  if (values.password !== values.again) throw new ApiError(0, "the two passwords differ");
}

async function signedIn(user) {
  if (user.mustChangePassword) {
    const form = $("change-password");
    form.login.value = user.login;
    form.current.value = $("sign-in").password.value;
    enter("change-password");
    form[form.current.value ? "password" : "current"].focus();
    return;
  }
  history.replaceState(null, "", `/${location.hash.startsWith("#item-") ? location.hash : ""}`);
  await start();
}

onSubmit($("sign-in"), async ({ login, password }) => {
  const { user } = await call("Session.login", { login, password });
  await signedIn(user);
});

onSubmit($("change-password"), async (values, form) => {
  same(values);
  const { user } = await call("Session.changePassword", { current: values.current, password: values.password });
  form.reset();
  await signedIn(user);
});

onSubmit($("invitation"), async (values) => {
  same(values);
  const { user } = await call("Invitations.accept", { token: location.hash.slice(1), password: values.password });
  await signedIn(user);
});

onClick("sign-out", async () => {
  await call("Session.logout");
  state.user = null;
  history.replaceState(null, "", "/");
  enter("sign-in");
});

async function openInvitation() {
  try {
    const { name, login } = await call("Invitations.get", { token: location.hash.slice(1) || "-" });
    text("name", name);
    text("login", login);
    enter("invitation");
    $("invitation").login.value = login;
  } catch (error) {
    text("reason", sentence(error.message));
    enter("invitation-lost");
  }
}

// --- the list --------------------------------------------------------------------------------------------------------

function showList() {
  $("items").replaceChildren(...state.items.map((item) => {
    const about = item.comments ? ` · ${item.comments} comment${item.comments === 1 ? "" : "s"}` : "";
    const button = element("button", { type: "button" },
      element("strong", { textContent: item.title }),
      element("span", { className: "snippet" }, ...marked(item.snippet)),
      element("span", { className: "when" }, `${item.updatedBy.name} · `, when(item.updatedAt), about));
    if (state.item?.id === item.id) button.setAttribute("aria-current", "true");
    button.addEventListener("click", () => { location.hash = `item-${item.id}`; });
    return element("li", {}, button);
  }));
  const found = `${state.total} item${state.total === 1 ? "" : "s"}`;
  $("count").textContent = state.query ? `${found} found` : state.total ? found : "Nothing here yet";
  $("more-items").hidden = state.items.length >= state.total;
}

async function loadList() {
  const query = state.query;
  const limit = Math.min(100, Math.max(PAGE, state.items.length));
  const list = await call("Items.getList", { query, limit });
  if (query !== state.query) return; // a later search has overtaken this one
  Object.assign(state, list);
  showList();
}

onClick("more-items", async () => {
  const { items, total } = await call("Items.getList", { query: state.query, limit: PAGE, offset: state.items.length });
  state.items.push(...items);
  state.total = items.length ? total : state.items.length;
  showList();
});

let searchTimer;
$("query").addEventListener("input", () => {
  clearTimeout(searchTimer);
  searchTimer = setTimeout(search, 250);
});
$("search").addEventListener("submit", (event) => {
  event.preventDefault();
  search();
});

async function search() {
  clearTimeout(searchTimer);
  state.query = $("query").value.trim();
  state.items = [];
  try {
    await loadList();
  } catch (error) {
    if (!await expelled(error)) banner(sentence(error.message));
  }
}

// --- one item --------------------------------------------------------------------------------------------------------

function showItem(item) {
  state.item = item;
  text("title", item.title);
  text("meta", "");
  const changed = item.version > 1 ? [`, changed by ${item.updatedBy.name} `, when(item.updatedAt)] : [];
  document.querySelector('[data-text="meta"]').append(
    `Written by ${item.createdBy.name} `, when(item.createdAt), ...changed);
  $("body").textContent = item.body;
  $("delete").hidden = item.createdBy.id !== state.user.id && state.user.role !== "administrator";
  $("comments").replaceChildren(...item.comments.map(({ member, body, createdAt }) => element("li", {},
    face(member.name),
    element("span", {}, element("strong", { textContent: member.name }), " ",
      element("span", { className: "quiet" }, when(createdAt))),
    element("span", { className: "body", textContent: body }))));
  show("item", "welcome", "editor");
  document.title = `${item.title} – Samepage`;
  showList();
}

function showWelcome() {
  state.item = null;
  show("welcome", "item", "editor");
  document.title = "Samepage";
  showList();
}

async function follow() {
  const id = Number(/^#item-(\d+)$/.exec(location.hash)?.[1] ?? 0);
  if (!id) return showWelcome();
  try {
    const item = await call("Items.get", { id });
    if (location.hash !== `#item-${id}`) return undefined;
    $("comment").reset();
    showItem(item);
    $("main").focus({ preventScroll: true });
  } catch (error) {
    if (await expelled(error)) return undefined;
    banner(sentence(error.message));
    showWelcome();
  }
  return undefined;
}
addEventListener("hashchange", () => { if (state.user) follow(); });

onSubmit($("comment"), async ({ body }, form) => {
  const { id } = state.item;
  await call("Comments.add", { itemId: id, body });
  form.reset();
  showItem(await call("Items.get", { id }));
  await refresh();
});

function edit(item) {
  const form = $("editor");
  state.item = item;
  fault(form, "");
  $("conflict").hidden = true;
  text("heading", item ? "Edit item" : "New item");
  form.elements.title.value = item?.title ?? "";
  form.elements.body.value = item?.body ?? "";
  show("editor", "item", "welcome");
  form.elements.title.focus();
}

onClick("new", () => edit(null));
onClick("edit", () => edit(state.item));
onClick("cancel", () => follow());
onSubmit($("editor"), ({ title, body }) => save(title, body, state.item?.version));

async function save(title, body, version) {
  let saved;
  try {
    saved = state.item
      ? await call("Items.update", { id: state.item.id, version, title, body })
      : await call("Items.create", { title, body });
  } catch (error) {
    if (error.code !== CONFLICT) throw error;
    state.theirs = error.data.current;
    text("conflict", `${state.theirs.updatedBy.name} has changed this item while you were writing.`);
    $("conflict").hidden = false;
    return;
  }
  const target = `#item-${saved.id}`;
  if (location.hash === target) await follow();
  else location.hash = target;
  banner("Saved.");
  await refresh();
}

onClick("take-theirs", () => follow());
onClick("keep-mine", async () => {
  const form = $("editor").elements;
  $("conflict").hidden = true;
  await save(form.title.value, form.body.value, state.theirs.version);
});

// --- dialogs ---------------------------------------------------------------------------------------------------------

for (const button of document.querySelectorAll("[data-close]")) {
  button.addEventListener("click", () => button.closest("dialog").close());
}

function openDialog(id) {
  const form = $(id).querySelector("form");
  form.reset();
  fault(form, "");
  $(id).showModal();
}

onClick("invite-open", () => openDialog("invite"));
onSubmit($("invite").querySelector("form"), async ({ name, email }) => {
  await call("Members.invite", { name, email });
  $("invite").close();
  banner(`${name} gets a mail.`);
  await refresh();
});

onClick("delete", () => {
  text("doomed", state.item.title);
  openDialog("confirm");
});
onSubmit($("confirm").querySelector("form"), async () => {
  await call("Items.delete", { id: state.item.id });
  $("confirm").close();
  history.pushState(null, "", "/");
  showWelcome();
  banner("Deleted.");
  await refresh();
});

// --- the stream ------------------------------------------------------------------------------------------------------

const WORDS = {
  create: "wrote", update: "changed", delete: "deleted", comment: "commented on", invite: "invited", join: "joined",
};

function showStream() {
  $("stream").replaceChildren(...state.stream.map(({ kind, member, item, title, at }) => {
    let object = kind === "join" ? "" : title;
    if (item?.exists) {
      object = element("button", { className: "link", type: "button", textContent: title });
      object.addEventListener("click", () => { location.hash = `item-${item.id}`; });
    }
    return element("li", {}, face(member.name), element("div", {},
      element("strong", { textContent: member.name }), ` ${WORDS[kind] ?? kind} `, object,
      element("div", { className: "quiet" }, when(at))));
  }));
  $("more-stream").hidden = !state.next;
}

async function loadStream() {
  const { activities, next } = await call("Activities.getItemStream", { limit: PAGE });
  state.stream = activities;
  state.next = next;
  showStream();
}

onClick("more-stream", async () => {
  const { activities, next } = await call("Activities.getItemStream", { limit: PAGE, before: state.next });
  state.stream.push(...activities);
  state.next = next;
  showStream();
});

// --- start -----------------------------------------------------------------------------------------------------------

async function refresh() {
  await Promise.all([loadList(), loadStream()]);
}

setInterval(async () => {
  if (!state.user || document.hidden || state.stream.length > PAGE) return;
  try {
    await refresh();
  } catch (error) {
    await expelled(error);
  }
}, REFRESH);

async function start() {
  const { user, release, node, list, stream } = await call("Bootstrap.bootstrap");
  text("release", `Release ${release} on ${node}`);
  if (!user) return enter("sign-in");
  if (user.mustChangePassword) return signedIn(user);
  Object.assign(state, { user, ...list, query: "", stream: stream.activities, next: stream.next });
  $("query").value = "";
  text("user", user.name);
  $("invite-open").hidden = user.role !== "administrator";
  show("workplace", "entry");
  showStream();
  await follow();
  await tell(user);
  return undefined;
}

// What the server may want to know of this browser.
async function tell(user) {
  const zone = Intl.DateTimeFormat().resolvedOptions().timeZone ?? "";
  const year = new Date().getFullYear();
  const offset = (month) => -new Date(year, month, 15).getTimezoneOffset();
  if (zone !== user.timezone) {
    await call("GlobalSettings.detectTimezone", { zone, january: offset(0), july: offset(6) });
  }
  await call("Stats.save", { name: "page.start", value: { milliseconds: Math.round(performance.now()) } });
}

try {
  await (location.pathname === "/invitation" ? openInvitation() : start());
} catch (error) {
  banner(sentence(error.message), true);
}
