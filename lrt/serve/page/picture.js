// A picture of a text as it is coloured, to save and to send: drawn here, without a network.
import { download, make } from "./dom.js";

const WIDTH = 960, EDGE = 40, SIZE = 17, LINE = 30, LONGEST = 300; // LONGEST: lines of text
const SANS = "system-ui, sans-serif", MONO = `${SIZE}px ui-monospace, monospace`;

/** Words in lines of at most `width`. */
const wrap = (pen, text, width) => text.split(" ").reduce((lines, word) => {
  const longer = lines.length ? `${lines.at(-1)} ${word}` : word;
  return lines.length && pen.measureText(longer).width <= width ? [...lines.slice(0, -1), longer] : [...lines, word];
}, []);

/** Pieces of tokens by the line that they are on: {text, x, line, t}. */
const layOut = (pen, tokens) => {
  const pieces = [];
  let [x, line] = [0, 0];
  tokens.forEach(({ text }, t) => {
    for (const character of text) {
      if (character === "\n") { [x, line] = [0, line + 1]; continue; }
      const width = pen.measureText(character).width, last = pieces.at(-1);
      if (x + width > WIDTH - 2 * EDGE) [x, line] = [0, line + 1];
      if (last?.t === t && last.line === line) { last.text += character; last.width += width; }
      else pieces.push({ text: character, x, line, t, width });
      x += width;
    }
  });
  return pieces;
};

/** The picture of a pane, as a canvas. */
export const draw = pane => {
  const canvas = make("canvas"), pen = canvas.getContext("2d"), style = getComputedStyle(document.documentElement);
  const variable = name => style.getPropertyValue(`--${name}`).trim();
  const solid = colour => colour.replace(/var\(--(\w+)\)/, (_, name) => variable(name));
  const scale = pane.scales[pane.view.kind], put = (text, x, y, font, colour = variable("ink")) => {
    Object.assign(pen, { font, fillStyle: colour, textBaseline: "alphabetic" });
    pen.fillText(text, x, y);
  };
  pen.font = `600 22px ${SANS}`;
  const head = wrap(pen, pane.headline.textContent, WIDTH - 2 * EDGE);
  pen.font = MONO;
  const pieces = layOut(pen, pane.tokens).filter(piece => piece.line < LONGEST);
  const lines = 1 + Math.max(0, ...pieces.map(piece => piece.line)), top = EDGE + 26 + head.length * 30 + 62;
  const height = top + lines * LINE + EDGE + 22, density = 2;
  Object.assign(canvas, { width: WIDTH * density, height: height * density });
  pen.scale(density, density);
  pen.fillStyle = variable("card");
  pen.fillRect(0, 0, WIDTH, height);
  put(pane.model.id, EDGE, EDGE + 12, `600 15px ${SANS}`, variable("soft"));
  head.forEach((line, i) => put(line, EDGE, EDGE + 44 + i * 30, `600 22px ${SANS}`));
  const bar = { x: EDGE + 60, y: top - 44, width: 320, height: 10 }, least = scale.twoSided ? -1 : 0;
  for (let x = 0; x < bar.width; x++) {
    pen.fillStyle = solid(scale.inkAt(least + (1 - least) * x / bar.width));
    pen.fillRect(bar.x + x, bar.y, 1, bar.height);
  }
  scale.ticks().forEach(([fraction, text]) => {
    pen.font = `12px ${SANS}`;
    put(text, bar.x + fraction * (bar.width - pen.measureText(text).width), bar.y + 24, `12px ${SANS}`, variable("soft"));
  });
  const [low, high] = scale.kind.words, small = `13px ${SANS}`;
  pen.font = small;
  put(low, bar.x - pen.measureText(low).width - 10, bar.y + 10, small, variable("soft"));
  put(high, bar.x + bar.width + 10, bar.y + 10, small, variable("soft"));
  put(`${pane.view.name}${scale.log ? ", logarithmic" : ""}`, bar.x + bar.width + 96, bar.y + 10, small, variable("soft"));
  for (const { text, x, line, t, width } of pieces) {
    pen.fillStyle = solid(scale.ink(pane.view.of(pane, t)));
    pen.fillRect(EDGE + x, top + line * LINE, width, LINE - 6);
    put(text, EDGE + x, top + line * LINE + SIZE, MONO);
  }
  put("A window into the memory · lrt serve", EDGE, height - EDGE + 14, `13px ${SANS}`, variable("soft"));
  return canvas;
};

/** Save it as MODEL.png. */
export const save = pane => draw(pane).toBlob(blob => download(blob, `${pane.model.id}.png`));
