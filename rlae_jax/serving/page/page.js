// The page: asks the server as any client would (streamed completions) and draws what comes. Everything that arrives is
// drawn by draw.js, as text; errors are said in plain words beside the buttons.

import { Answer, element, mark, visibleHeight } from "./draw.js";

const KEPT = 12; // answers on the page
const find = (id) => document.getElementById(id);

let models = []; // as /v1/models lists them
let members = [];
let running = null; // the AbortController of what is being written
const sliders = []; // of each member: {input, output, agent}

class Told extends Error {} // its message is for people

function headers() {
  const key = find("key").value.trim();
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

/** fetch, with what went wrong in plain words. */
async function ask(path, options) {
  let response;
  try {
    response = await fetch(path, { ...options, headers: headers() });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Told("The server cannot be reached. It may have stopped, or the connection broke.");
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  const why = body?.error?.message ?? "";
  if (response.status === 401) {
    const given = find("key").value.trim() !== "";
    find("access").hidden = false;
    find("key").focus();
    throw new Told(given ? "The server does not know this API key." : "The server wants an API key.");
  }
  if (response.status === 429) throw new Told(`The server is busy; try again in a moment. ${why}`);
  if (response.status === 503) throw new Told(`The server is stopping or not ready. ${why}`);
  throw new Told(why || `The server answered with status ${response.status}.`);
}

/** The objects of a stream of server-sent events, up to [DONE]. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const part = await reader.read().catch((error) => {
      throw error.name === "AbortError" ? error : new Told("The connection broke in the middle of the answer.");
    });
    if (part.done) throw new Told("The server ended the connection before the answer was finished.");
    rest += part.value;
    const blocks = rest.split(/\r?\n\r?\n/);
    rest = blocks.pop();
    for (const block of blocks) {
      const lines = block.split(/\r?\n/).filter((line) => line.startsWith("data:"));
      const data = lines.map((line) => line.slice(5)).join("\n").trim();
      if (data === "[DONE]") return;
      if (data === "") continue;
      const event = JSON.parse(data);
      if (event.error) throw new Told(`The answer could not be finished: ${event.error.message}`);
      yield event;
    }
  }
}

/** Asks for one answer and feeds it to `view`; gives what is to be said of it. `told` hears how it goes on. */
async function write(request, view, signal, told) {
  const path = request.messages ? "v1/chat/completions" : "v1/completions";
  const start = performance.now();
  let first = null;
  let reason = null;
  const body = JSON.stringify({ ...request, stream: true });
  for await (const event of events(await ask(path, { method: "POST", body, signal }))) {
    const choice = event.choices[0];
    if (!choice) continue;
    view.add(choice.rlae ?? {});
    if (view.tokens.length) first ??= performance.now();
    reason = choice.finish_reason ?? reason;
    told(view.tokens.length);
  }
  const end = performance.now();
  const count = view.tokens.length;
  const parts = [`${count === 1 ? "1 token" : `${count} tokens`} in ${seconds(end - start)}`];
  if (first !== null) parts.push(`the first after ${seconds(first - start)}`);
  if (reason === "length") parts.push("length limit reached");
  if (reason === "error") parts.push("a prediction was not finite");
  return parts.join(" · ");
}

const seconds = (milliseconds) => `${(milliseconds / 1000).toFixed(milliseconds < 10000 ? 2 : 0)} s`;

const ensemble = () => models.find((model) => model.rlae?.kind === "ensemble");
const chosen = () => document.querySelector("input[name='who']:checked")?.value;

const sliderSum = () => sliders.reduce((sum, { input }) => sum + input.valueAsNumber, 0);

/** Each slider's share of their sum; null if all are 0. */
function fixedWeights() {
  const sum = sliderSum();
  return sum === 0 ? null : sliders.map(({ input }) => input.valueAsNumber / sum);
}

function showWeights() {
  const weights = fixedWeights();
  sliders.forEach(({ input, output }, k) => {
    output.textContent = `${input.value} of ${sliderSum()} = ${weights ? weights[k].toFixed(2) : "no weight"}`;
    input.setAttribute("aria-valuetext", output.textContent);
  });
}

/** What an agent gave the members last, beside the sliders. */
function showAgent(name, means) {
  sliders.forEach(({ agent }, k) => {
    agent.bar.style.width = `${100 * Math.min(1, means[k])}%`;
    agent.told.textContent = `${name}: ${means[k].toFixed(2)} on average`;
    agent.bar.parentElement.hidden = agent.told.hidden = false;
  });
}

function setUp() {
  const whole = ensemble();
  if (!whole) throw new Told("The server lists no ensemble.");
  members = whole.rlae.members;
  const policies = models.filter((model) => model.rlae?.kind === "policy");
  const facts = [members.join(" + "), `fusion ${whole.rlae.fusion}`, `spans of ${whole.rlae.span_length}`];
  find("about").textContent = facts.join(" · ");
  document.title = `${whole.id} · rlae-jax`;
  const chat = document.querySelector("[name='mode'][value='chat']");
  chat.disabled = !whole.rlae.chat;
  if (chat.disabled) chat.parentElement.title = "The members have no chat template";

  const choice = (value, name, more, checked) => {
    const input = element("input", { type: "radio", name: "who", value, checked });
    return element("label", {}, input, element("span", {}, name, " ", element("small", {}, more)));
  };
  find("choices").replaceChildren(
    ...policies.map((model, i) => choice(`model ${model.id}`, model.id, "policy", i === 0)),
    choice(`model ${whole.id}`, "Server’s default", whole.id, policies.length === 0),
    choice("fixed", "Fixed", "each slider’s share of their sum", false),
  );
  sliders.length = 0;
  find("sliders").replaceChildren(
    ...members.map((name, k) => {
      const id = `weight-${k}`;
      const value = Math.round(100 / members.length);
      const input = element("input", { type: "range", id, min: "0", max: "100", step: "1", value });
      const output = element("span", { class: "value", "aria-hidden": "true" }); // the slider says it, too
      const bar = mark(element("span", { class: "bar" }), k);
      const told = element("small", { hidden: true });
      sliders.push({ input, output, agent: { bar, told } });
      input.addEventListener("input", () => {
        document.querySelector("[name='who'][value='fixed']").checked = true;
        showWeights();
      });
      const label = element("label", { for: id }, mark(element("span", { class: "name" }, name), k));
      const agent = element("div", { class: "agent", hidden: true, "aria-hidden": "true" }, bar);
      return mark(element("div", { class: "slider" }, label, output, input, agent, told), k);
    }),
  );
  showWeights();
}

function say(text) {
  find("status").textContent = text;
}

function clear() {
  find("error").hidden = true;
  say("");
}

function complain(error) {
  const known = error instanceof Told;
  const told = known ? error.message.trim() : `The page met something that it does not understand: ${error.message}`;
  find("error").textContent = told;
  find("error").hidden = false;
  if (!running) say("");
}

async function loadModels() {
  models = (await (await ask("v1/models", {})).json()).data;
  setUp();
}

/** What the form asks for, and the name of who sets the weights. */
function read() {
  const prompt = find("prompt").value;
  const who = chosen();
  const chat = document.querySelector("[name='mode']:checked").value === "chat";
  const request = {
    ...(chat ? { messages: [{ role: "user", content: prompt }] } : { prompt }),
    model: who === "fixed" ? ensemble().id : who.slice("model ".length),
    max_tokens: find("longest").valueAsNumber,
    temperature: find("temperature").valueAsNumber,
    seed: find("seed").valueAsNumber,
    rlae: { attribution: true },
  };
  if (who !== "fixed") return { request, name: request.model };
  const weights = fixedWeights();
  if (weights === null) throw new Told("All sliders are at 0: give at least one member some weight.");
  request.rlae.weights = weights;
  return { request, name: `Fixed weights ${weights.map((weight) => weight.toFixed(2)).join(" : ")}` };
}

/** A place for one answer of the named writer, newest first. */
function place(request, name, alone) {
  const figure = element("div", { class: "writing" });
  const meta = element("p", { class: "meta" }, "writing");
  const headline = element("div", { class: "headline" }, element("h2", {}, name), meta);
  const prompt = element("p", { class: "prompt" }, request.prompt ?? request.messages[0].content);
  const article = element("article", { class: "panel", "aria-label": name }, headline, prompt, figure);
  const own = alone.map((model, k) => {
    const root = element("div", { class: "writing" });
    const told = element("p", { class: "meta" }, "writing");
    const title = element("h4", {}, mark(element("span", { class: "name" }, model.id), k));
    return { model, told, root, box: mark(element("div", { class: "own" }, title, root, told), k) };
  });
  if (own.length) {
    const boxes = element("div", {}, ...own.map(({ box }) => box));
    const title = element("h3", {}, "Each member alone");
    article.append(element("section", { class: "alone", "aria-label": "Members’ own answers" }, title, boxes));
  }
  find("empty").hidden = true;
  find("answers").prepend(article);
  for (const old of [...find("answers").querySelectorAll("article")].slice(KEPT)) old.remove();
  const { top } = article.getBoundingClientRect();
  if (top < 0 || top > window.innerHeight / 4) article.scrollIntoView();
  return { article, figure, meta, own };
}

// Keeps the end of the newest answer's text in sight while it grows, for as long as the reader does not scroll away.
let end = 0; // of that text, from the top of the page
const growth = new ResizeObserver(([{ target }]) => {
  const seen = end <= window.scrollY + visibleHeight() + 1;
  end = window.scrollY + target.querySelector(".text").getBoundingClientRect().bottom;
  if (seen) window.scrollBy(0, Math.max(0, end - window.scrollY - visibleHeight()));
});

function follow(figure) {
  growth.disconnect();
  end = 0;
  growth.observe(figure);
}

function setRunning(now) {
  find("write").disabled = now;
  find("stop").disabled = !now;
}

async function run() {
  clear();
  if (!models.length) await loadModels();
  const { request, name } = read();
  const alone = find("alone").checked ? models.filter((model) => model.rlae?.kind === "member") : [];
  const { article, figure, meta, own } = place(request, name, alone);
  running = new AbortController();
  const { signal } = running;
  setRunning(true);
  say("Writing…");
  let failed = false;
  let empty = true; // nothing is written, and nothing is finished

  async function one(asked, root, line) {
    const view = new Answer(root, members);
    try {
      line.textContent = await write(asked, view, signal, (count) => (line.textContent = `writing, ${count} tokens`));
      empty = false;
    } catch (error) {
      line.textContent = error.name === "AbortError" ? `stopped after ${view.tokens.length} tokens` : "not finished";
      if (error.name !== "AbortError") {
        failed = true;
        complain(error);
      }
    }
    if (view.tokens.length) empty = false;
    root.classList.remove("writing");
    return view;
  }
  const asked = (model) => ({ ...request, model: model.id, rlae: { attribution: true } });
  const fused = one(request, figure, meta); // first in the server's queue
  const others = own.map(({ model, root, told }) => one(asked(model), root, told));
  follow(figure);
  const view = await fused;
  const means = view.meanWeights();
  if (means && models.find((model) => model.id === request.model).rlae.kind === "policy") showAgent(name, means);
  await Promise.all(others);
  if (empty) article.remove();
  find("empty").hidden = document.querySelector("article") !== null;
  say(failed ? "" : signal.aborted ? "Stopped." : `Done: ${meta.textContent}.`);
  running = null;
  setRunning(false);
}

const stop = () => running?.abort();

find("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!running) run().catch(complain);
});
find("ask").addEventListener("input", () => {
  if (!running) clear(); // what is said is of another request
});
// The browser says what is wrong with a field only where it can be seen.
find("options").addEventListener("invalid", () => (find("options").open = true), true);
find("options").addEventListener("toggle", ({ target }) => target.scrollIntoView({ block: "nearest" }));
find("stop").addEventListener("click", stop);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") stop();
});
find("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) find("ask").requestSubmit();
});
find("key").addEventListener("change", () => {
  clear();
  loadModels().catch(complain);
});
loadModels().catch(complain);
