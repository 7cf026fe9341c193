// The state at work: what a linear probe reads from the memory after the selected token, beside what is true.
import { info, make } from "./dom.js";

const PIECES = { P: "♙", N: "♘", B: "♗", R: "♖", Q: "♕", K: "♔", p: "♟", n: "♞", b: "♝", r: "♜", q: "♛", k: "♚" };
const glyph = piece => piece === "" ? "" : `${PIECES[piece]}\ufe0e`; // as text, not as a picture
const percent = part => `${(100 * part).toFixed(0)} %`;

/** A variable as the probe reads it: its name, what is read, what is true (null: not known). */
const cells = (state, t) => state.names.map((name, v) => ({
  name, read: state.values[state.read[t][v]], truth: state.truth[t] && state.values[state.truth[t][v]],
}));
const isWrong = cell => cell.truth != null && cell.truth !== cell.read;

const board = squares => {
  const ranks = [8, 7, 6, 5, 4, 3, 2, 1];
  const node = make("div", { className: "board", attributes: { role: "img" } }, ...ranks.flatMap(rank => [..."abcdefgh"].map((file, f) => {
    const square = squares.find(one => one.name === file + rank), wrong = isWrong(square);
    const title = `${square.name}: ${square.read || "empty"}${wrong ? `, but it is ${square.truth || "empty"}` : ""}`;
    return make("span", { className: `${(f + rank) % 2 ? "dark" : "light"}${wrong ? " wrong" : ""}`, title, textContent: glyph(square.read) },
      ...(wrong ? [make("small", { textContent: glyph(square.truth) || "∅" })] : []));
  })));
  const wrong = squares.filter(isWrong).map(one => `${one.name} reads ${one.read || "empty"} and is ${one.truth || "empty"}`);
  node.setAttribute("aria-label", `Board as it is read. ${wrong.length ? `Wrong: ${wrong.join("; ")}.` : "Every square is right."}`);
  return node;
};

const variables = list => make("ul", { className: "variables" }, ...list.map(one => make("li", { className: isWrong(one) ? "wrong" : "" },
  make("code", { textContent: `${one.name} = ${one.read}` }),
  one.truth == null ? "" : isWrong(one) ? ` ✗ is ${one.truth}` : " ✓")));

export class StateView {
  constructor() {
    this.node = make("section", { className: "state", hidden: true, attributes: { "aria-label": "The state at work" } });
  }

  /** Show `state` of the server's inspection after token t; nothing where the checkpoint has no probe. */
  show(state, t) {
    this.node.hidden = !state || t >= state.read.length;
    if (this.node.hidden) return;
    const list = cells(state, t), wrong = list.filter(isWrong).length;
    const known = list.every(one => one.truth != null);
    const summary = known ? `${list.length - wrong} of ${list.length} right after this token.`
      : `What is true is not known here: the text has left the rules of ${state.kind}.`;
    const about = `A linear probe reads each variable from the ${state.source} after every token. On held-out texts it is right `
      + `${percent(state.accuracy)} of the time; always naming the most frequent value would be right ${percent(state.chance)}.`;
    this.node.replaceChildren(make("h3", {}, "The state at work", info("the state at work", about)),
      make("p", { className: "facts", textContent: summary }), (state.layout === "board" ? board : variables)(list));
  }
}
