// What can be shown of a token: its value, the scale that it is on, and its colour.
import { count, round } from "./dom.js";

const mean = (lists, i) => lists.reduce((sum, list) => sum + (list[i] ?? 0), 0) / lists.length;

/** What can be measured. `high`: the end of the linear scale; beyond it the scale is logarithmic. */
const KINDS = {
  surprisal: { high: 12, unit: "bits", words: ["sure", "surprised"] },
  gain: { high: 4, unit: "bits", words: ["hurts", "helps"], signed: true },
  gate: { high: 2, middle: 1, unit: "", words: ["shut", "open"] }, // 1 at the start of training
  norm: { high: 2, unit: "", words: ["nothing", "large"] },
  ratio: { high: 2, unit: "", words: ["nothing", "large"] },
  share: { high: 1, unit: "", words: ["all wrong", "all right"], colour: "good" },
};
const STRONGEST = 0.55; // of a colour behind text, which has to stay readable

export class Scale {
  /** `most`: the largest absolute value that is shown. */
  constructor(kind, most = 0) {
    this.kind = KINDS[kind];
    this.log = most > this.kind.high;
    this.power = Math.ceil(Math.log2(1 + most) - 1e-9);
    this.top = this.log ? 2 ** this.power - 1 : this.kind.high;
  }
  /** Where a value lies between -1 or 0 and 1. */
  place(value) {
    const { middle = 0 } = this.kind, size = Math.abs(value - middle);
    const part = this.log ? Math.log2(1 + size) / this.power : size / (this.top - middle);
    return Math.sign(value - middle) * Math.min(1, part);
  }
  get twoSided() { return this.kind.signed || this.kind.middle != null; }
  /** A colour, as CSS. */
  ink(value) { return value == null ? "transparent" : this.inkAt(this.place(value)); }
  inkAt(place) {
    const name = this.twoSided ? (place > 0 ? "good" : "bad") : this.kind.colour ?? "heat";
    return `rgb(var(--${name}) / ${(Math.abs(place) ** 0.8 * STRONGEST).toFixed(3)})`;
  }
  /** [fraction of the bar, text] of what is written below it. */
  ticks() {
    const { unit, signed } = this.kind;
    const apart = signed ? Math.ceil(this.power / 2) : Math.ceil(this.power / 5);
    const powers = [...Array(this.power).keys()].map(n => this.power - n).filter((_, n) => n % apart === 0).reverse();
    const sizes = this.log ? powers.map(n => 2 ** n - 1) : [this.top / 2, this.top];
    const ends = signed ? [-sizes.at(-1), -sizes[0], 0, sizes[0], sizes.at(-1)] : [0, ...sizes];
    const values = [...new Set(ends)].sort((a, b) => a - b);
    const least = signed ? -this.top : 0;
    return values.map((value, i) => {
      const from = this.twoSided ? this.place(least) : 0, fraction = (this.place(value) - from) / (1 - from);
      const text = `${value < 0 ? "−" : value > 0 && signed ? "+" : ""}${Math.abs(value)}`;
      return [fraction, i === values.length - 1 && unit ? `${text} ${unit}` : text];
    });
  }
  /** Its ends, in words. */
  range() {
    const { signed, unit } = this.kind;
    return `${signed ? `−${this.top}` : 0} to ${this.top}${unit && ` ${unit}`}${this.log ? ", log" : ""}`;
  }
}

/** Bits of token t under `name`; null where there are none. While a text is written, those that were sent with it. */
export const bits = (pane, name, t) =>
  (t ? pane.inspection?.bits[name]?.[t - 1] : null) ?? (name === "live" ? pane.tokens[t].bits : null) ?? null;
const less = name => (pane, t) => {
  const [other, live] = [bits(pane, name, t), bits(pane, "live", t)];
  return other == null || live == null ? null : other - live;
};
/** Whether it was measured what token t read of the memory: not of the first, nor behind what was looked into. */
export const wasRead = (pane, t) => t > 0 && t <= (pane.inspection?.inside?.norm[0]?.length ?? 0);
const inside = read => (pane, t) => wasRead(pane, t) ? read(pane.inspection.inside, t - 1) ?? null : null;

/** What tokens can be coloured by. */
export const VIEWS = {
  gain: {
    name: "what the memory gains", kind: "gain", of: less("zero"),
    says: "Bits that the memory saved on this token.",
    more: "How many bits the token would cost more if the memory were zeroed. Blue: the memory made it likelier; orange: less likely.",
  },
  over: {
    name: "what it gains over the previous word's embedding", kind: "gain", of: less("embedding"),
    says: "Bits that recurrence proper saved.",
    more: "How many bits the token would cost more if the memory held the previous token's embedding, which needs no recurrence, in place of its hidden state.",
  },
  live: {
    name: "surprisal", kind: "surprisal", of: (pane, t) => bits(pane, "live", t),
    says: "How surprised the model was.",
    more: "Surprisal: −log₂ of the probability that the model gave the token, decoding token by token.",
  },
  zero: {
    name: "surprisal with the memory zeroed", kind: "surprisal", of: (pane, t) => bits(pane, "zero", t),
    says: "How surprised it would be without the memory.",
    more: "Every token reads zeros in place of its predecessor's hidden state.",
  },
  embedding: {
    name: "surprisal with the previous word's embedding as memory", kind: "surprisal",
    of: (pane, t) => bits(pane, "embedding", t),
    says: "How surprised it would be if the memory were only the previous word.",
    more: "Every token reads its predecessor's embedding in place of its hidden state.",
  },
  gate: {
    name: "how far the memory's gates are open", kind: "gate",
    of: inside((f, i) => f.blocks.length ? f.blocks.reduce((sum, b) => sum + mean(b.memory, i), 0) / f.blocks.length : null),
    says: "How much of the memory is let in; 1 is as at the start of training.",
    more: "2σ(G u): the factor on the memory's keys and values, mean over heads and layers. Below, layer by layer.",
  },
  norm: {
    name: "size of the memory", kind: "norm", of: inside((f, i) => mean(f.norm, i)),
    says: "How large the memory is that is read.",
    more: "‖m‖/√D of the memory read. Memories are RMS-normalised: 1, and 0 where a document begins.",
  },
  change: {
    name: "change of the memory", kind: "norm", of: inside((f, i) => mean(f.change, i)),
    says: "How far the memory moved from one token to the next.",
    more: "‖m − the memory before it‖/√D.",
  },
};

/** The share of a state's variables that the probe reads right after token t; null where the true state is not known. */
export const shareRight = (pane, t) => {
  const state = pane.inspection?.state, truth = state?.truth[t];
  return truth ? truth.filter((value, v) => value === state.read[t][v]).length / truth.length : null;
};

/** The rows of a pane's heat map, in groups: {title, kind, rows: [name, value of token t]}. */
export const groupsOf = pane => {
  const inner = pane.inspection?.inside, layers = inner?.blocks ?? [], recurs = pane.model.recurrent;
  const view = (name, key) => [name, t => VIEWS[key].of(pane, t)];
  const each = read => layers.map(block => [`layer ${block.layer}`, t => wasRead(pane, t) ? read(block, t - 1) ?? null : null]);
  return [
    {
      title: "surprisal", kind: "surprisal",
      rows: [view(recurs ? "with recurrence" : "by token", "live"),
        ...(recurs ? [view("memory zeroed", "zero"), view("previous embedding", "embedding")] : [])],
    },
    ...(recurs ? [{ title: "gain", kind: "gain", rows: [view("over zeroed", "gain"), view("over embedding", "over")] }] : []),
    ...(inner ? [{ title: "memory", kind: "norm", rows: [view("size", "norm"), view("change", "change")] }] : []),
    ...(layers.length ? [
      { title: "memory gate", kind: "gate", rows: each((b, i) => mean(b.memory, i)) },
      { title: "memory ÷ own keys", kind: "ratio", rows: each((b, i) => mean(b.key_ratio, i)) },
      { title: "memory ÷ own values", kind: "ratio", rows: each((b, i) => mean(b.value_ratio, i)) },
    ] : []),
    ...(pane.inspection?.state ? [{ title: "the state", kind: "share", rows: [["read right", t => shareRight(pane, t)]] }] : []),
  ];
};
export const gateOf = (block, t) => mean(block.memory, t - 1);

/** One scale for each kind, the same in all panes, so that equal colours are equal values. */
export const scalesOf = panes => {
  const most = {};
  for (const pane of panes) {
    for (const { kind, rows } of groupsOf(pane)) {
      for (const [, value] of rows) {
        for (let t = 0; t < pane.tokens.length; t++) most[kind] = Math.max(most[kind] ?? 0, Math.abs(value(t) ?? 0));
      }
    }
  }
  return Object.fromEntries(Object.keys(KINDS).map(kind => [kind, new Scale(kind, most[kind])]));
};

/** A text's bits under `name`, and of how many tokens. */
export const total = (pane, name) => {
  const values = pane.inspection.bits[name].filter(value => value != null);
  return { bits: values.reduce((sum, value) => sum + value, 0), tokens: values.length };
};
const whole = value => {
  const size = Math.abs(value);
  return size >= 0.05 && size < 10 ? size.toFixed(1) : Math.round(size).toString();
};

/** What the memory did with a text, in a sentence. */
export const headline = pane => {
  const live = total(pane, "live"), per = sum => round(sum / live.tokens, 1);
  if (!pane.model.recurrent) return `This text costs ${whole(live.bits)} bits: ${per(live.bits)} bits per token. There is no memory.`;
  const zero = total(pane, "zero").bits, over = total(pane, "embedding").bits - live.bits, saved = zero - live.bits;
  const did = saved >= 0 ? `saved ${whole(saved)} of ${whole(zero)} bits` : `cost ${whole(-saved)} bits on top of ${whole(zero)}`;
  const beyond = whole(over) === "0" ? "over the previous word's embedding, nothing"
    : over > 0 ? `over the previous word's embedding, ${whole(over)} bits`
      : `the previous word's embedding would save ${whole(over)} bits more`;
  return `The memory ${did}: ${per(live.bits)} instead of ${per(zero)} bits per token; ${beyond}.`;
};

/** Which of two models needs fewer bits for one text, in a sentence. */
export const comparison = (one, other) => {
  const [a, b] = [one, other].map(pane => total(pane, "live").bits), [few, many] = a <= b ? [one, other] : [other, one];
  const fewer = Math.abs(a - b);
  return `The same text costs ${one.model.id} ${whole(a)} bits and ${other.model.id} ${whole(b)}: `
    + (fewer < 0.05 ? "no difference." : `${few.model.id} needs ${whole(fewer)} bits (${Math.round(100 * fewer / Math.max(a, b))}\u00a0%) fewer than ${many.model.id}.`);
};
export const lookedInto = (pane, tokens) => tokens < pane.tokens.length ? ` The first ${count(tokens, "token")} were looked into.` : "";
