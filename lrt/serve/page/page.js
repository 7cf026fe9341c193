// The page: writes texts by one checkpoint or two, and has them looked into.
import { $, count, info, make, round } from "./dom.js";
import { complain, fromFragment, inLabels, settings, toFragment } from "./form.js";
import { Pane, counterpart } from "./pane.js";
import { save } from "./picture.js";
import { ask, events } from "./server.js";
import { VIEWS, comparison, lookedInto, scalesOf } from "./views.js";

let panes = [], models = [], limit = 512, running = null, ran = false;

const served = id => models.find(model => model.id === $(id).value);
const sameText = () => panes.length > 1 && $("reads").value === "same";

/** Two scales would lie: where something new is known, all panes get the same ones. */
function recolour() {
  const scales = scalesOf(panes);
  panes.forEach(pane => pane.show(VIEWS[$("by").value], scales));
  const both = sameText() && panes.every(pane => pane.inspection) && panes[0].text === panes[1].text;
  $("comparison").textContent = both ? comparison(...panes) : "";
}

function link(from, t) {
  for (const pane of panes) {
    const there = pane === from ? null : counterpart(from, t, pane);
    if (there != null) pane.select(there, { linked: true });
  }
}

function lay() {
  panes = [served("model-0"), served("model-1")].filter(Boolean).map(model => new Pane(model, link));
  if (sameText()) panes[1].author = panes[0].model.id;
  panes.forEach(pane => pane.save.addEventListener("click", () => save(pane)));
  $("panes").replaceChildren(...panes.map(pane => pane.node));
  $("panes").classList.toggle("two", panes.length > 1);
  $("reads-field").hidden = panes.length < 2;
  $("comparison").textContent = "";
  ran = false;
  recolour();
}

const certificate = c => `Prefill ${c.path}` + (c.sweeps ? `: ${count(c.sweeps, "sweep")} of stride ${c.groups}` : "")
  + (c.residual ? `, residual ${c.residual.toExponential(1)}` : "") + (c.forwards ? `, cost ${round(c.forwards, 1)} forwards` : "")
  + `: ${c.reason}.`;

/** Let a pane's model read a prompt and go on. True where it came to its end, or was stopped. */
async function write(pane, asked, promptLength, signal) {
  pane.say("waiting for the first token …");
  pane.spans.classList.add("busy");
  const begin = performance.now(), seconds = () => ((performance.now() - begin) / 1000).toFixed(1);
  let more = asked.prefill === "exact" ? "Prefill token by token: exact." : `Prefill: ${asked.prefill}.`, written = 0;
  const add = token => pane.add({ ...token, prompt: pane.text.length < promptLength || pane.tokens.length === 0 });
  try {
    for await (const e of events(await ask("/playground/generate", { model: pane.model.id, ...asked }, signal))) {
      if (e.type === "prompt") e.tokens.forEach((id, i) => add({ id, text: e.texts[i], bits: null }));
      else if (e.type === "prefill") more = certificate(e);
      else if (e.type === "token") { add({ id: e.token, text: e.text, bits: e.bits, top: e.top }); written++; }
      else if (e.type === "error") throw new Error(e.message);
      if (e.type !== "end") pane.say(count(written, "token"), { more });
    }
    pane.say(asked.max_tokens ? `${count(written, "token")} written in ${seconds()} s.` : `Read in ${seconds()} s.`, { more });
    return true;
  } catch (error) {
    if (error.name !== "AbortError") { pane.say(inLabels(error), { alarm: true }); return false; }
    pane.say(`Stopped after ${count(written, "token")}.`, { more });
    return true;
  } finally {
    pane.spans.classList.remove("busy");
    recolour();
  }
}

/** What the memory did with a pane's text; then the token that gained most is selected, unless one is already. */
async function look(pane) {
  const tokens = pane.tokens.slice(0, Math.min(limit, (pane.model.context ?? limit) + 1)).map(token => token.id);
  if (tokens.length < 2) return;
  pane.node.classList.add("looking");
  try {
    pane.look(await (await ask("/playground/inspect", { model: pane.model.id, tokens })).json());
    pane.status.textContent += lookedInto(pane, tokens.length);
    recolour();
    if (pane.selected == null) pane.select(pane.strongest(), { follow: true });
  } catch (error) {
    pane.say(inLabels(error), { alarm: true });
  } finally { pane.node.classList.remove("looking"); }
}

async function go(event) {
  event?.preventDefault();
  const asked = settings();
  if (!asked) return;
  running?.abort();
  const control = running = new AbortController();
  lay();
  $("stop").disabled = false;
  const run = async (pane, what) => {
    pane.node.setAttribute("aria-busy", "true");
    const done = await write(pane, what, asked.prompt.length, control.signal);
    const looked = done && pane.tokens.length ? look(pane) : null;
    return { done, end: Promise.resolve(looked).then(() => pane.node.setAttribute("aria-busy", "false")) };
  };
  const [first, second] = panes;
  const one = run(first, asked);
  const other = !second ? null : !sameText() ? run(second, asked) : one.then(({ done }) => done && !control.signal.aborted
    ? run(second, { ...asked, prompt: first.text, max_tokens: 0 })
    : { end: second.say("There is no whole text to read.") });
  await Promise.all([one, other].map(async each => (await each)?.end));
  if (running !== control) return;
  [running, ran] = [null, true];
  $("stop").disabled = true;
}

/** A link to what is on the page, in the address bar and on the clipboard. */
async function share() {
  history.replaceState(null, "", `#${toFragment(ran)}`);
  const copied = await navigator.clipboard?.writeText(location.href).then(() => true, () => false);
  $("shared").textContent = copied ? "The link is copied." : "The link is in the address bar.";
}

function offerExamples() {
  const short = text => text.length > 36 ? `${text.slice(0, 35).trimEnd()}…` : text;
  $("examples").replaceChildren(...(served("model-0")?.examples ?? []).map(text => {
    const chip = make("button", { type: "button", className: "chip", textContent: short(text.replaceAll("\n", " ")), title: text });
    chip.addEventListener("click", () => { $("prompt").value = text; $("prompt").focus(); });
    return chip;
  }));
}

function followLink() {
  if (location.hash.length < 2) return;
  running?.abort();
  const { run, missing } = fromFragment(location.hash.slice(1));
  lay();
  offerExamples();
  if (missing.length) return complain(`This link asks for ${missing.join(" and ")}, which this server does not have.`);
  if (run) go();
}

async function start() {
  try {
    ({ models, inspect: limit } = await (await ask("/playground/models")).json());
    const options = () => models.map(model => make("option", { textContent: model.id, value: model.id }));
    $("model-0").replaceChildren(...options());
    $("model-1").replaceChildren(make("option", { textContent: "none", value: "" }), ...options());
    $("prefill").value = models[0].prefill;
    $("prompt").value ||= models[0].examples[0] ?? "";
    complain("");
    lay();
    offerExamples();
    followLink();
  } catch (error) { complain(error.message); }
}

for (const holder of document.querySelectorAll("[data-info]")) holder.append(info(holder.dataset.about, holder.dataset.info));
$("by").replaceChildren(...Object.entries(VIEWS).map(([value, view]) => make("option", { value, textContent: view.name })));
$("by").addEventListener("change", recolour);
$("form").addEventListener("submit", go);
$("stop").addEventListener("click", () => running?.abort());
$("share").addEventListener("click", share);
for (const id of ["model-0", "model-1", "reads"]) $(id).addEventListener("change", () => { running?.abort(); lay(); offerExamples(); });
for (const input of document.querySelectorAll("#form input, #form textarea, #form select")) input.addEventListener("input", () => { ran = false; $("shared").textContent = ""; });
$("key").addEventListener("change", start);
addEventListener("hashchange", followLink);
addEventListener("keydown", event => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) go(event);
  else if (event.key === "Escape" && !document.querySelector(":popover-open")) running?.abort();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => panes.forEach(pane => pane.draw()));
start();
