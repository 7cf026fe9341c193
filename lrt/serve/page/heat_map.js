// The heat map: a column for each token, a row for each quantity. It is painted, as it has thousands of cells; to the
// keyboard and to screen readers it is a grid, of which the cell that the cursor is on stands below it in words.
import { make, round } from "./dom.js";

const CELL = 14, TITLE = 20;
let maps = 0;

export class HeatMap {
  /** `tokens`: the pane's own list; `onSelect(t, options)` is called where a column is selected here. */
  constructor(name, tokens, onSelect) {
    Object.assign(this, { tokens, onSelect, rows: [], row: 0, column: null, number: ++maps });
    this.names = make("ol", { attributes: { "aria-hidden": "true" } });
    this.canvas = make("canvas", { attributes: { "aria-hidden": "true" } });
    this.marks = [make("i", { className: "column" }), make("i", { className: "cell" })];
    this.cell = make("div", { id: `map-${this.number}-row`, className: "readout", attributes: { role: "row" } },
      make("span", { textContent: "Move over the map, or use the arrow keys.", attributes: { role: "gridcell" } }));
    this.scroll = make("div", {
      className: "scroll", tabIndex: 0,
      attributes: {
        role: "grid", "aria-label": `Heat map of ${name}: a row for each quantity, a column for each token; arrow keys move`,
        "aria-owns": this.cell.id, "aria-readonly": "true",
      },
    }, make("div", { className: "paper", attributes: { role: "presentation" } }, this.canvas, ...this.marks));
    this.node = make("div", { className: "map", hidden: true }, this.names, this.scroll, this.cell);
    const at = event => this.point(event.offsetX, event.offsetY);
    this.canvas.addEventListener("pointermove", at);
    this.canvas.addEventListener("click", at);
    this.scroll.addEventListener("keydown", event => this.move(event));
  }

  /** Paint groups of rows ({title, kind, rows: [name, value of token t]}), each on the scale of its kind. */
  draw(groups, scales) {
    const columns = this.tokens.length, density = devicePixelRatio || 1;
    this.node.hidden = columns < 2;
    const items = groups.flatMap(({ title, kind, rows }) => [
      make("li", { className: "gap", textContent: `${title}, ${scales[kind].range()}` }),
      ...rows.map(([name]) => make("li", { textContent: name }))]);
    this.names.replaceChildren(...items);
    let y = 0;
    this.rows = groups.flatMap(({ title, kind, rows }) => {
      y += TITLE;
      return rows.map(([name, value]) => ({ name: `${title}, ${name}`, value, scale: scales[kind], y: (y += CELL) - CELL }));
    });
    const size = { width: columns * CELL, height: y };
    for (const side of ["width", "height"]) {
      this.canvas[side] = size[side] * density;
      this.canvas.style[side] = `${size[side]}px`;
    }
    const pen = this.canvas.getContext("2d"), style = getComputedStyle(document.documentElement);
    pen.scale(density, density);
    const colours = Object.fromEntries(["good", "bad", "heat"].map(name => [name, style.getPropertyValue(`--${name}`).trim()]));
    for (const row of this.rows) {
      for (let t = 0; t < columns; t++) {
        const value = row.value(t);
        pen.fillStyle = value == null ? "rgb(128 128 128 / .07)" : row.scale.ink(value).replace(/var\(--(\w+)\)/, (_, name) => colours[name]);
        pen.fillRect(t * CELL, row.y, CELL - 1, CELL - 1);
      }
    }
    this.row = Math.min(this.row, Math.max(0, this.rows.length - 1));
    this.scroll.setAttribute("aria-rowcount", this.rows.length);
    this.scroll.setAttribute("aria-colcount", columns);
  }

  /** Mark the column of token t, and say what its cell holds. `follow`: bring it into view. */
  mark(t, follow = false) {
    const row = this.rows[this.row];
    if (!row) return;
    this.column = t;
    const [column, cell] = this.marks;
    Object.assign(column.style, { left: `${t * CELL - 1}px`, top: `${TITLE - 1}px`, width: `${CELL + 1}px`,
      height: `${parseInt(this.canvas.style.height) - TITLE + 1}px` });
    Object.assign(cell.style, { left: `${t * CELL - 1}px`, top: `${row.y - 1}px`, width: `${CELL + 1}px`, height: `${CELL + 1}px` });
    if (follow) this.scroll.scrollLeft = Math.max(0, t * CELL - this.scroll.clientWidth / 2);
    const value = row.value(t), id = `map-${this.number}-${this.row}-${t}`;
    const text = `${value == null ? "nothing measured" : `${round(value)}${row.scale.kind.unit && ` ${row.scale.kind.unit}`}`}`;
    this.cell.setAttribute("aria-rowindex", this.row + 1);
    this.cell.replaceChildren(make("span", { textContent: row.name, attributes: { role: "rowheader" } }),
      make("span", { id, textContent: `${text} at ${JSON.stringify(this.tokens[t].text)}, position ${t}`,
        attributes: { role: "gridcell", "aria-colindex": t + 1, "aria-label": `${row.name}: ${text} at ${JSON.stringify(this.tokens[t].text)}, position ${t}` } }));
    this.scroll.setAttribute("aria-activedescendant", id);
  }

  point(x, y) {
    const row = this.rows.findIndex(row => y >= row.y && y < row.y + CELL), t = Math.floor(x / CELL);
    if (t < 0 || t >= this.tokens.length) return;
    const moved = row >= 0 && row !== this.row;
    if (moved) this.row = row;
    if (t !== this.column) this.onSelect(t, {});
    else if (moved) this.mark(t);
  }

  move(event) {
    const last = this.tokens.length - 1, { row, column } = this;
    const t = { ArrowRight: (column ?? -1) + 1, ArrowLeft: (column ?? 1) - 1, Home: 0, End: last }[event.key];
    const next = { ArrowDown: row + 1, ArrowUp: row - 1 }[event.key];
    if (t == null && next == null) return;
    event.preventDefault();
    if (next != null) {
      this.row = Math.max(0, Math.min(this.rows.length - 1, next));
      if (column != null) return this.mark(column, true);
    }
    this.onSelect(Math.max(0, Math.min(last, t ?? 0)), { follow: true });
  }
}
