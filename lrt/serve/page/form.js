// The form: what is asked, in the labels' own words, and the link that holds it.
import { $ } from "./dom.js";

/** Fields of the form: id, the server's parameter, and its name in links. */
const FIELDS = [
  { id: "prompt", param: "prompt" },
  { id: "model-0", param: "model", link: "model" },
  { id: "model-1", link: "beside" },
  { id: "reads", link: "reads" },
  { id: "max", param: "max_tokens", link: "tokens" },
  { id: "temperature", param: "temperature" },
  { id: "top-p", param: "top_p", link: "top_p" },
  { id: "seed", param: "seed" },
  { id: "prefill", param: "prefill" },
  { id: "by", link: "by" },
];
const nameOf = field => field.link ?? field.param;
const label = id => document.querySelector(`label[for="${id}"]`).textContent.trim();

/** What is wrong with a number, in words; "" where nothing is. */
const problem = input => {
  const { value, min, max } = input, name = label(input.id);
  if (value.trim() === "" || !Number.isFinite(Number(value))) return `${name} must be a number`;
  if (min !== "" && Number(value) < Number(min)) return `${name} must be at least ${min}`;
  if (max !== "" && Number(value) > Number(max)) return `${name} must be at most ${max}`;
  if (input.dataset.whole != null && !Number.isInteger(Number(value))) return `${name} must be a whole number`;
  return "";
};

/** Say what is wrong, at the form; "" for nothing. The field that it is about is marked, shown and has the focus. */
export const complain = (message, id) => {
  $("message").textContent = message;
  for (const { id: each } of FIELDS) $(each).removeAttribute("aria-invalid");
  if (!id) return;
  if ($("more").contains($(id))) $("more").open = true;
  $(id).setAttribute("aria-invalid", "true");
  $(id).focus();
};

/** A server's message in the words of the labels: its parameters' names are replaced. */
export const inLabels = error => FIELDS.filter(field => field.param).reduce((text, { id, param }) =>
  text.replace(new RegExp(`(?<![\\w.])${param}(?=:| is| must)`, "g"), label(id)), error.message);

/** What /playground/generate is asked for, without the model; null, with a message, where a field is wrong. */
export const settings = () => {
  for (const input of document.querySelectorAll("#form input[type=number]")) {
    const wrong = problem(input);
    if (wrong) { complain(wrong, input.id); return null; }
  }
  complain("");
  return {
    prompt: $("prompt").value, max_tokens: Number($("max").value), temperature: Number($("temperature").value),
    top_p: Number($("top-p").value), seed: Number($("seed").value), prefill: $("prefill").value,
  };
};

/** All of the form as a URL's fragment. The API key is no part of it. `run`: opening it runs at once. */
export const toFragment = run => {
  const values = new URLSearchParams(FIELDS.map(field => [nameOf(field), $(field.id).value]));
  if (run) values.set("run", "1");
  return values.toString();
};

/** Fill the form from a fragment: {run, missing}, whether it is to run, and what it names and is not to be had here. */
export const fromFragment = fragment => {
  const values = new URLSearchParams(fragment), missing = [];
  for (const field of FIELDS) {
    const value = values.get(nameOf(field)), node = $(field.id);
    if (value == null) continue;
    if (node.tagName === "SELECT" && ![...node.options].some(option => option.value === value)) missing.push(`${label(field.id)} “${value}”`);
    else node.value = value;
  }
  $("more").open = ["top-p", "seed"].some(id => $(id).value !== $(id).defaultValue);
  return { run: values.get("run") === "1", missing };
};
