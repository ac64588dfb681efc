// Draws an answer that several members wrote: every token coloured by the member that favoured it, and under the text a
// strip of the weights, one column a span. The page feeds it while an answer is streamed, a file with a whole one.
//
// It draws what the server's answers hold under `rlae`: spans, {span, weights}, and tokens, {text, span, logprob,
// member_logprobs}: the decision in force, counted from 0, and log p under the fused distribution and under each member
// (null: the member cannot write it). A span comes no later than its first token. What comes from outside becomes text
// nodes and numbers, never markup.

// Below this lead over the others a token is nobody's: all members would have written it about alike.
const LEAST_LEAD = 0.1;
const COLOURS = 7;
const PATTERNS = 5;

export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}

const swatch = () => element("span", { class: "swatch", "aria-hidden": "true" });

/** Gives an element a member's colour and pattern. */
export function mark(target, member) {
  target.dataset.colour = member % COLOURS;
  target.dataset.pattern = member % PATTERNS;
  return target;
}

/** Each member's share p_k / (p_1 + ... + p_K) of a token; null if nobody can write it, or nothing is known. */
export function shares(memberLogprobs) {
  if (!memberLogprobs) return null;
  const known = memberLogprobs.map((logprob) => logprob ?? -Infinity);
  const most = Math.max(...known);
  if (most === -Infinity) return null;
  const relative = known.map((logprob) => Math.exp(logprob - most)); // p itself may be too small for a number
  const sum = relative.reduce((a, b) => a + b, 0);
  return relative.map((value) => value / sum);
}

/** Who favoured a token and by how much: lead 0 where all are alike, 1 where one alone would have written it. */
export function favourite(memberLogprobs) {
  const each = shares(memberLogprobs);
  if (each === null || each.length < 2) return { member: null, lead: 0 };
  const member = each.indexOf(Math.max(...each));
  const lead = (each[member] - 1 / each.length) / (1 - 1 / each.length);
  return lead < LEAST_LEAD ? { member: null, lead } : { member, lead };
}

const number = (value, digits) => value.toFixed(digits).replace(/^-(?=.*[1-9])/, "−").replace("-", "");

const logProbability = (logprob) => (logprob === null || logprob === undefined ? "−∞" : number(logprob, 2));

function probability(logprob) {
  const p = logprob === null || logprob === undefined ? 0 : Math.exp(logprob);
  return p > 0 && p < 0.001 ? "< 0.001" : number(p, 3);
}

/** A token as it is called where it cannot be seen: in quotes, with its white space. */
function named(text) {
  const shown = text.replace(/ /g, "␣").replace(/\n/g, "↵").replace(/\t/g, "⇥");
  return shown === "" ? "(a part of a character, or a mark that texts leave out)" : shown;
}

/** How much of the window's height nothing covers. */
export const visibleHeight = () =>
  window.innerHeight - (parseFloat(getComputedStyle(document.documentElement).scrollPaddingBottom) || 0);

const least = (a, b, c) => Math.max(a, Math.min(b, c));

let made = 0;

export class Answer {
  /** Draws into `root`, which it empties. `members`: names, in the order of weights and log-probabilities. */
  constructor(root, members) {
    this.members = members;
    this.tokens = [];
    this.spanOf = []; // each token's place in spans; null without weights
    this.weightsOf = new Map(); // of each span that began
    this.spans = []; // those with tokens: {number, weights, tokens: [index], column}
    this.favoured = members.map(() => 0);
    this.weighed = 0; // tokens with weights, and the sums of these
    this.sums = members.map(() => 0);
    this.marked = [];
    this.card = element("div", { class: "card", role: "tooltip", id: `card-${(made += 1)}`, hidden: true });
    this.text = element("div", { class: "text", role: "group", "aria-label": "Answer, token by token" });
    this.strip = element("div", { class: "strip", role: "group", "aria-label": "Weights by span" });
    this.legend = element("ul", { class: "legend", "aria-label": "Members" });
    this.rows = members.map((name, k) => {
      const numbers = element("span", { class: "numbers" });
      const label = mark(element("span", { class: "name" }, name), k);
      this.legend.append(element("li", {}, mark(swatch(), k), label, numbers));
      return numbers;
    });
    this.legend.append(element("li", { class: "nobody" }, swatch(), "about alike"));
    this.weights = element(
      "div",
      { class: "weights", hidden: true },
      element("p", { class: "caption" }, "Weights by span, the first member’s at the top"),
      this.strip,
    );
    const hint = "Point at a token or a span for its numbers. By keyboard: Tab, ← → for tokens, ↑ ↓ for spans, Esc.";
    this.hint = element("p", { class: "hint", hidden: true }, hint);
    root.replaceChildren(this.legend, this.text, this.weights, this.hint, this.card);
    root.classList.add("answer");
    this.root = root;
    const token = (i) => this.#showToken(i);
    const span = (p) => this.#showSpan(p);
    this.#listen(this.text, token, (i, key) => this.#step(i, key));
    this.#listen(this.strip, span, (p, key) => p + (key === "ArrowLeft" || key === "ArrowUp" ? -1 : 1));
  }

  /** Appends what an answer gained. */
  add({ spans: begun = [], tokens = [] }) {
    for (const { span, weights } of begun) this.weightsOf.set(span, weights);
    for (const token of tokens) this.#addToken({ ...token, weights: this.weightsOf.get(token.span) });
    const spans = this.spans.length;
    this.strip.classList.toggle("many", spans > 120);
    this.weights.hidden = spans === 0 || this.members.length < 2;
    this.hint.hidden = this.members.length < 2;
    const means = this.meanWeights();
    this.rows.forEach((row, k) => {
      const favoured = `favoured ${this.favoured[k]} of ${this.tokens.length} tokens`;
      row.textContent = means ? `mean weight ${number(means[k], 2)} · ${favoured}` : favoured;
    });
  }

  /** The mean over the tokens of each member's weight; null before the first one. */
  meanWeights() {
    return this.weighed ? this.sums.map((sum) => sum / this.weighed) : null;
  }

  #addToken(token) {
    const i = this.tokens.length;
    this.tokens.push(token);
    this.spanOf.push(null);
    const { member, lead } = favourite(token.member_logprobs);
    const shown = element("span", { class: "token", "data-i": i, tabindex: i ? "-1" : "0" }, token.text);
    if (member !== null) {
      this.favoured[member] += 1;
      mark(shown, member).style.setProperty("--lead", lead.toFixed(3));
    }
    if (/^\s*\n\s*$/.test(token.text)) shown.classList.add("newline");
    this.text.append(shown);
    if (!token.weights) return;
    this.weighed += 1;
    token.weights.forEach((weight, k) => (this.sums[k] += weight));
    let span = this.spans.at(-1);
    if (span?.number !== token.span) {
      const column = this.#column(this.spans.length, token.weights);
      span = { number: token.span, weights: token.weights, tokens: [], column };
      this.spans.push(span);
      this.strip.append(column);
    }
    span.tokens.push(i);
    this.spanOf[i] = this.spans.length - 1;
    span.column.style.flexGrow = span.tokens.length;
    const told = this.members.map((name, k) => `${name} ${number(span.weights[k], 2)}`).join(", ");
    span.column.setAttribute("aria-label", `Span ${token.span + 1}: ${told}`);
  }

  #column(p, weights) {
    // Weights of hidden states lie in [0, 1] each and may sum to more than 1.
    const scale = Math.max(1, weights.reduce((a, b) => a + b, 0));
    const parts = weights.map((weight, k) => {
      const part = mark(element("span", { class: "part" }), k);
      part.style.flexBasis = `${(100 * weight) / scale}%`;
      return part;
    });
    return element("span", { class: "column", role: "img", "data-i": p, tabindex: p ? "-1" : "0" }, ...parts);
  }

  /** Pointer, focus and keys of the text's tokens or the strip's columns; of each the Tab key reaches one. */
  #listen(list, show, step) {
    const index = (event) => {
      const item = event.target.closest("[data-i]");
      return item && list.contains(item) ? Number(item.dataset.i) : null;
    };
    const focused = () => (list.contains(document.activeElement) ? document.activeElement.dataset.i : undefined);
    const back = () => (focused() === undefined ? this.hide() : show(Number(focused())));
    list.addEventListener("pointerover", (event) => (index(event) === null ? back() : show(index(event))));
    list.addEventListener("pointerleave", back);
    list.addEventListener("focusin", (event) => {
      if (index(event) === null) return;
      for (const other of list.querySelectorAll("[tabindex='0']")) other.tabIndex = -1;
      event.target.tabIndex = 0;
      show(index(event));
    });
    list.addEventListener("focusout", () => this.hide());
    list.addEventListener("click", (event) => event.target.closest("[data-i]")?.focus());
    list.addEventListener("keydown", (event) => {
      const at = index(event);
      if (event.key === "Escape") this.hide();
      if (at === null || event.ctrlKey || event.altKey || event.metaKey) return;
      const last = list.children.length - 1;
      let to = null;
      if (event.key.startsWith("Arrow")) to = step(at, event.key);
      else if (event.key === "Home") to = 0;
      else if (event.key === "End") to = last;
      if (to === null) return;
      event.preventDefault();
      list.children[least(0, to, last)].focus();
    });
  }

  /** Where an arrow key leads from a token: to its neighbour, or to the first token of the span before or after. */
  #step(i, key) {
    if (key === "ArrowLeft") return i - 1;
    if (key === "ArrowRight") return i + 1;
    const p = this.spanOf[i];
    if (p === null) return key === "ArrowUp" ? i - 1 : i + 1;
    if (key === "ArrowDown") return this.spans[p + 1]?.tokens[0] ?? this.tokens.length - 1;
    const [start] = this.spans[p].tokens;
    return start < i ? start : (this.spans[p - 1]?.tokens[0] ?? 0);
  }

  #showToken(i) {
    const token = this.tokens[i];
    const span = this.spans[this.spanOf[i]];
    const where = `token ${i + 1}` + (span ? ` · span ${span.number + 1}` : "");
    const each = shares(token.member_logprobs);
    const { member } = favourite(token.member_logprobs);
    let verdict = "About alike for all members";
    if (member !== null) {
      verdict = `Favoured by ${this.members[member]}: ${Math.round(100 * each[member])}% of the members’ p`;
    }
    const rows = this.members.map((name, k) => {
      const logprob = token.member_logprobs?.[k];
      const weight = token.weights ? number(token.weights[k], 2) : "–";
      return [name, k, [probability(logprob), logProbability(logprob), weight], each ? each[k] : 0];
    });
    const fused = token.logprob === undefined ? null : [probability(token.logprob), logProbability(token.logprob)];
    this.#fill(named(token.text), where, verdict, ["p", "log p", "weight"], rows, fused);
    this.#place(this.text.children[i], span ? [span.column] : []);
  }

  #showSpan(p) {
    const span = this.spans[p];
    const first = span.tokens[0];
    const text = span.tokens.map((i) => this.tokens[i].text).join("");
    const last = first + span.tokens.length - 1;
    const rows = this.members.map((name, k) => [name, k, [number(span.weights[k], 3)], span.weights[k]]);
    const many = first === last ? `token ${first + 1}` : `tokens ${first + 1} to ${last + 1}`;
    this.#fill(named(text), `span ${span.number + 1} · ${many}`, null, ["weight"], rows, null);
    this.#place(span.column, span.tokens.map((i) => this.text.children[i]));
  }

  #fill(title, where, verdict, heads, rows, fused) {
    const columns = heads.map((name) => element("th", { scope: "col" }, name));
    const first = element("th", { scope: "col" }, element("span", { class: "unseen" }, "member"));
    const head = element("tr", {}, first, element("td"), ...columns);
    const body = rows.map(([name, k, numbers, share]) => {
      const bar = mark(element("span", { class: "bar" }), k);
      bar.style.width = `${100 * least(0, share, 1)}%`;
      const label = element("th", { scope: "row" }, mark(element("span", { class: "name" }, name), k));
      const cells = numbers.map((value) => element("td", { class: "number" }, value));
      return element("tr", {}, label, element("td", { class: "bars", "aria-hidden": "true" }, bar), ...cells);
    });
    if (fused) {
      const cells = [...fused, ""].map((value) => element("td", { class: "number" }, value));
      const label = element("th", { scope: "row" }, "together");
      body.push(element("tr", { class: "fused" }, label, element("td"), ...cells));
    }
    this.card.replaceChildren(
      element("div", { class: "card-head" }, element("strong", {}, title), element("span", {}, where)),
      element("table", {}, element("thead", {}, head), element("tbody", {}, ...body)),
      ...(verdict ? [element("p", {}, verdict)] : []),
    );
  }

  /** Puts the card beside an item, inside the answer's width and, if there is room, inside the window. */
  #place(item, others) {
    this.#unmark();
    this.marked = [item, ...others];
    for (const one of this.marked) one.classList.add("current");
    item.setAttribute("aria-describedby", this.card.id);
    this.card.hidden = false;
    const host = this.root.getBoundingClientRect();
    const at = item.getClientRects()[0] ?? item.getBoundingClientRect();
    const size = this.card.getBoundingClientRect();
    const left = least(0, at.left - host.left - 12, Math.max(0, host.width - size.width));
    const fits = at.bottom + 8 + size.height <= visibleHeight() || at.top - 8 - size.height < 0;
    this.card.style.left = `${left}px`;
    this.card.style.top = `${(fits ? at.bottom + 8 : at.top - 8 - size.height) - host.top}px`;
  }

  #unmark() {
    for (const one of this.marked) {
      one.classList.remove("current");
      one.removeAttribute("aria-describedby");
    }
    this.marked = [];
  }

  hide() {
    this.#unmark();
    this.card.hidden = true;
  }
}

/** Draws a file's answers: {members, answers: [{prompt, ends, spans, tokens}]}. */
export function drawFile(root, { members, answers }) {
  for (const { prompt, ends, ...written } of answers) {
    const figure = element("div");
    const meta = element("p", { class: "meta" }, `${written.tokens.length} tokens · ${ends}`);
    root.append(element("article", { class: "panel" }, element("p", { class: "prompt" }, prompt), figure, meta));
    new Answer(figure, members).add(written);
  }
}
