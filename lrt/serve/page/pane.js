// One checkpoint's text: what it says, what each token cost, and what the memory did.
import { info, make, round, signed } from "./dom.js";
import { HeatMap } from "./heat_map.js";
import { StateView } from "./state_view.js";
import { VIEWS, bits, gateOf, groupsOf, headline, scalesOf, wasRead } from "./views.js";

/** What a model is, in short, and in full for who asks. */
const size = parameters => parameters < 1e6 ? `${Math.round(parameters / 1e3)} k` : `${(parameters / 1e6).toFixed(1)} M`;
const inShort = model => `${size(model.parameters)} parameters, ${model.depth} layers`
  + (model.recurrent ? "" : ", no memory");
const inFull = model => `${model.parameters.toLocaleString("en")} parameters in ${model.depth} layers of width ${model.width}; `
  + `a vocabulary of ${model.vocabulary.toLocaleString("en")} tokens; ${model.context == null ? "no limit of context" : `a context of ${model.context} tokens`}. `
  + (model.recurrent
    ? `The memory enters by ${{ both: "the residual stream and by keys and values", residual: "the residual stream", key_value: "keys and values" }[model.injection] ?? model.injection}`
      + `${model.projection ? `, through ${model.projection} projections` : ""}.`
    : "It is a Transformer without a memory, so that its tokens are always coloured by surprisal.");

export class Pane {
  /** `onSelect(pane, t)` is called where a token is selected here. */
  constructor(model, onSelect) {
    Object.assign(this, { model, onSelect, tokens: [], text: "", inspection: null, selected: null, view: VIEWS.live, author: model.id });
    this.scales = scalesOf([]);
    this.headline = make("p", { className: "headline", hidden: true });
    this.status = make("span", { textContent: " " });
    this.more = make("span"); // how the prompt was computed
    this.bar = make("div", { className: "bar" });
    this.ticks = make("div", { className: "ticks" });
    this.words = [make("span"), make("span")]; // what the ends of the scale mean
    this.meaning = make("p", { className: "meaning" });
    this.spans = make("div", {
      className: "text empty", tabIndex: 0, textContent: "Nothing yet.",
      attributes: { role: "group", "aria-label": `Text of ${model.id}; arrow keys select a token` },
    });
    this.about = make("div", { className: "about", attributes: { "aria-live": "polite" } });
    this.state = new StateView();
    this.map = new HeatMap(model.id, this.tokens, (t, here) => this.select(t, here));
    this.save = make("button", { type: "button", className: "quiet", textContent: "Save picture", disabled: true });
    this.node = make("section", { className: "card pane", attributes: { "aria-label": model.id } },
      make("div", { className: "title" }, make("h2", { textContent: model.id }),
        make("small", {}, inShort(model), info("this checkpoint", inFull(model))), this.save),
      this.headline, make("p", { className: "facts" }, this.status, this.more),
      make("div", { className: "legend" }, make("div", { className: "scale" }, this.words[0], make("div", {}, this.bar, this.ticks), this.words[1]),
        this.meaning),
      make("div", { className: "reading" }, this.spans, this.state.node), this.about, this.map.node);
    const at = event => event.target.token != null && this.select(event.target.token);
    this.spans.addEventListener("pointerover", at);
    this.spans.addEventListener("click", at);
    this.spans.addEventListener("keydown", event => this.move(event));
    this.explain();
    this.draw();
  }

  /** Say what goes on; as an alarm it is announced. `more`: what few want to know. */
  say(text, { alarm = false, more = "" } = {}) {
    this.status.textContent = text;
    alarm ? this.status.setAttribute("role", "alert") : this.status.removeAttribute("role");
    this.more.replaceChildren(...(more ? [info("how the prompt was computed", more)] : []));
  }

  /** A token that has come: {id, text, prompt, bits, top}. */
  add(token) {
    if (!this.tokens.length) { this.spans.textContent = ""; this.spans.classList.remove("empty"); }
    const span = make("span", { textContent: token.text, token: this.tokens.length });
    span.classList.toggle("prompt", token.prompt);
    span.classList.toggle("line", token.text.includes("\n"));
    span.classList.toggle("half", token.text === "" && this.tokens.length > 0);
    this.spans.append(span);
    this.tokens.push({ ...token, span, start: this.text.length, end: this.text.length + token.text.length });
    this.text += token.text;
    const value = this.view.of(this, this.tokens.length - 1), scale = this.scales[this.view.kind];
    if (value != null && Math.abs(value) > scale.top) this.show(this.view, scalesOf([this]));
    else span.style.background = scale.ink(value);
    this.spans.scrollTop = this.spans.scrollHeight;
  }

  /** What the server measured of the text. */
  look(inspection) {
    this.inspection = inspection;
    this.headline.textContent = headline(this);
    this.headline.hidden = false;
    this.save.disabled = false;
  }

  /** Colour by a view, as far as there is something to show of it, on such scales. */
  show(view, scales) {
    this.view = this.model.recurrent && this.inspection ? view : VIEWS.live;
    this.scales = scales;
    this.draw();
  }

  draw() {
    const scale = this.scales[this.view.kind];
    this.tokens.forEach((token, t) => { token.span.style.background = scale.ink(this.view.of(this, t)); });
    const least = scale.twoSided ? -1 : 0, places = [...Array(25).keys()].map(i => least + (1 - least) * i / 24);
    this.bar.style.background = `linear-gradient(to right, ${places.map(place => scale.inkAt(place)).join(", ")})`;
    this.ticks.replaceChildren(...scale.ticks().map(([fraction, text]) => {
      const tick = make("span", { textContent: text });
      tick.style.left = `${100 * fraction}%`;
      tick.style.transform = `translateX(${-100 * fraction}%)`;
      return tick;
    }));
    this.words.forEach((word, end) => { word.textContent = scale.kind.words[end]; });
    const waits = this.model.recurrent && !this.inspection && this.tokens.length > 0;
    this.meaning.replaceChildren(`Colour: ${this.view.name}${scale.log ? ", on a logarithmic scale" : ""}. ${this.view.says}`,
      info(this.view.name, this.view.more), waits ? " What the memory did comes when the text is done." : "");
    this.map.draw(groupsOf(this), this.scales);
    this.select(this.selected, { quiet: true });
  }

  /** The token that gained most of the memory; without one, that which surprised most. */
  strongest() {
    const view = this.model.recurrent ? VIEWS.gain : VIEWS.live;
    const values = this.tokens.map((_, t) => view.of(this, t) ?? -Infinity);
    return values.indexOf(Math.max(...values));
  }

  /** Select a token. `follow`: bring it into view; `linked`: another pane's selection led here; `quiet`: nobody did. */
  select(t, { follow = false, linked = false, quiet = false } = {}) {
    if (t == null || t < 0 || t >= this.tokens.length || (t === this.selected && !follow && !quiet)) return;
    this.tokens[this.selected]?.span.classList.remove("on");
    this.selected = t;
    this.tokens[t].span.classList.add("on");
    if (follow || linked) this.reveal(this.tokens[t].span);
    this.about.setAttribute("aria-live", linked ? "off" : "polite"); // one voice at a time
    this.explain();
    this.state.show(this.inspection?.state, t);
    this.map.mark(t, follow || linked);
    if (!linked && !quiet) this.onSelect(this, t);
  }
  reveal(span) { // within the text alone: scrollIntoView would move the page too
    const top = span.offsetTop, bottom = top + span.offsetHeight; // from the edge of the text, which is positioned
    if (top < this.spans.scrollTop) this.spans.scrollTop = top;
    else if (bottom > this.spans.scrollTop + this.spans.clientHeight) this.spans.scrollTop = bottom - this.spans.clientHeight;
  }
  move(event) {
    const last = this.tokens.length - 1, now = this.selected ?? -1;
    const to = { ArrowRight: now + 1, ArrowLeft: now - 1, Home: 0, End: last }[event.key];
    if (to == null || last < 0) return;
    event.preventDefault();
    this.select(Math.max(0, Math.min(last, to)), { follow: true });
  }

  /** What is known of the selected token. */
  explain() {
    const t = this.selected, { recurrent } = this.model;
    if (t == null) {
      const what = `Select a token to see what it cost in bits${recurrent ? ", with and without the memory" : ""}.`;
      return this.about.replaceChildren(make("div", { className: "full empty", textContent: what }));
    }
    const token = this.tokens[t], [live, zero, embedding] = ["live", "zero", "embedding"].map(name => bits(this, name, t));
    const head = make("div", { className: "full" }, make("code", { textContent: JSON.stringify(token.text) }),
      ` at position ${t}, ${token.prompt ? "from the prompt" : `written by ${this.author}`}`,
      info("the token", `Token ${token.id} of the vocabulary of ${this.model.vocabulary}.`));
    const costs = [[recurrent ? "with recurrence" : "surprisal", live], ["memory zeroed", zero], ["previous embedding", embedding]]
      .filter(([, value]) => value != null);
    const left = make("div", {}, meters("What it cost, in bits", costs.map(([name, value]) => [name, value, round(value)]),
      Math.max(12, ...costs.map(([, value]) => value))));
    if (zero != null && live != null) left.append(make("p", {}, "The memory gains ", make("b", { textContent: signed(zero - live) }),
      " bits, over the previous embedding ", make("b", { textContent: signed(embedding - live) }), "."));
    if (token.top) left.append(make("p", { className: "facts", textContent: "Likeliest were " + token.top.map(
      ([text, chance]) => `${text.startsWith("bytes:") ? text : JSON.stringify(text)} ${(100 * chance).toFixed(0)} %`).join(", ") }));
    const blocks = this.inspection?.inside?.blocks ?? [], right = make("div");
    if (wasRead(this, t) && blocks.length) {
      right.append(meters("How far the memory was let in", blocks.map(block =>
        [`layer ${block.layer}`, gateOf(block, t), round(gateOf(block, t))]), 2, "good"));
    }
    this.about.replaceChildren(head, left, right);
  }
}

/** A table of numbers, each with a bar: rows of [name, value, text]. */
const meters = (caption, rows, most, kind = "") => make("table", {}, make("caption", { textContent: caption }),
  ...rows.map(([name, value, text]) => {
    const meter = make("div", { className: `meter ${kind}` });
    meter.style.width = `${Math.min(100, 100 * value / most)}%`;
    return make("tr", {}, make("th", { textContent: name, scope: "row" }), make("td", { textContent: text }),
      make("td", { attributes: { "aria-hidden": "true" } }, meter));
  }));

/** The token of another pane at the place of `from`'s token t; null where the texts have parted before it. */
export const counterpart = (from, t, to) => {
  if (t === 0) return to.tokens.length ? 0 : null;
  const { start } = from.tokens[t];
  if (!to.text.startsWith(from.text.slice(0, start))) return null;
  const at = to.tokens.findIndex(token => token.start <= start && token.end > start);
  return at < 0 ? null : at;
};
