"""Text coloured by how surprising it is, for a terminal and as an HTML page."""

from collections.abc import Iterable, Iterator, Sequence
from html import escape

from seqlm.evaluation.score import Row
from seqlm.lab import page as frame

# lower limits of the levels 1, 2, ...; level 0 has no colour
SURPRISE = (1.0, 2.0, 4.0, 8.0)  # bits
DIFFERENCE = (0.5, 1.0, 2.0)  # bits by which one model beats the other
# light backgrounds for black text, one hue for each direction: no red against green
ORANGE = ("#fdebd0", "#fbcb8c", "#f5a04c", "#e0752a")
BLUE = ("#d6e6f7", "#9cc4ec", "#5b9bd8")


def level(row: Row, other: Row | None) -> int:
    """The level of a row: 0 to 4, or from -3 (the first model is better) to 3 for two models."""
    if other is None:
        return sum(row.surprisal_bits >= limit for limit in SURPRISE)
    difference = row.surprisal_bits - other.surprisal_bits
    size = sum(abs(difference) >= limit for limit in DIFFERENCE)
    return size if difference > 0 else -size


def color(number: int) -> str | None:
    """The background of a level; None for level 0."""
    if number == 0:
        return None
    return ORANGE[number - 1] if number > 0 else BLUE[-number - 1]


def legend(runs: Sequence[str]) -> list[tuple[int, str]]:
    """(level, meaning) of every colour; runs: the names of one model or two."""
    if len(runs) == 1:
        limits = (0.0, *SURPRISE)
        ranges = [f"{a:g}-{b:g} bits" for a, b in zip(limits, SURPRISE, strict=False)]
        return list(enumerate([*ranges, f"over {SURPRISE[-1]:g} bits"]))
    first, second = runs
    mine = [(-i, f"{first} better by {d:g} bits") for i, d in enumerate(DIFFERENCE, 1)]
    theirs = [(i, f"{second} better by {d:g} bits") for i, d in enumerate(DIFFERENCE, 1)]
    return [*mine, *theirs]


def numbered(words: Iterable[tuple[Row, Row | None]]) -> Iterator[str]:
    """The words with their bits, or the difference of bits, for output without colours."""
    line = 1
    for row, other in words:
        bits = row.surprisal_bits - (other.surprisal_bits if other else 0.0)
        shown = f"{row.text}[{bits:+.1f}]" if other else f"{row.text}[{bits:.1f}]"
        yield ("\n" if row.line != line else "") + shown + " "
        line = row.line
    yield "\n"


def page(rows: Iterable[tuple[Row, Row | None]], runs: Sequence[str], summary: str) -> str:
    """A self-contained HTML page: the coloured text, and what is known of each character."""
    spans, facts = [], []
    for row, other in rows:
        spans.append(span(row.text, level(row, other)))
        bits = [round(r.surprisal_bits, 2) for r in (row, other) if r is not None]
        facts.append([bits, [[text, round(p, 4)] for text, p in row.alternatives]])
    title = f"How surprising is this text to {' and '.join(runs)}?"
    body = f"<h1>{escape(title)}</h1>\n<p>{escape(summary)}</p>\n{reader(spans, legend(runs))}"
    data = f"const [runs, facts] = {frame.value([list(runs), facts])};\n"
    return frame.page(title, body, STYLE, data + TELL + SCRIPT)


def span(text: str, number: int) -> str:
    """A part of a text in the colour of a level."""
    return f'<i class="l{number}">{escape(text) or "&#8199;"}</i>'


def reader(spans: Iterable[str], meanings: Sequence[tuple[int, str]]) -> str:
    """A coloured text under its legend, for a page with STYLE and SCRIPT.

    The script has to define tell(i), what is said of span i.
    """
    keys = " ".join(span(text, number) for number, text in meanings)
    return f'<p class="keys">{keys}</p>\n{TEXT}{"".join(spans)}</pre>\n{ABOUT}'


TEXT = """<pre id="text" tabindex="0"
 aria-label="The text. The arrow keys move from character to character."
>"""
ABOUT = """<div id="about" role="status">Point at a character, or use the arrow keys.</div>
"""
STYLE = """body { padding-bottom: 9rem }
pre i.at { outline: 2px solid currentColor }
#about { position: fixed; inset: auto 0 0; padding: .6rem 1rem; min-height: 6.5rem;
  background: var(--paper); border-top: 1px solid var(--line); box-sizing: border-box }
"""
STYLE += "".join(f".l{n}{{background:{color(n)};color:#000}}" for n in range(-3, 5) if n) + "\n"
TELL = """function tell(i) {
  const [bits, others] = facts[i];
  const own = bits.map((b, k) => (runs.length > 1 ? runs[k] + ": " : "") + b + " bits").join(", ");
  const percent = p => (100 * p).toFixed(1) + " %";
  const rest = others.map(([t, p]) => JSON.stringify(t) + " " + percent(p)).join("   ");
  return own + (rest ? "   likeliest: " + rest : "");
}
"""
SCRIPT = """const text = document.getElementById("text"), about = document.getElementById("about");
let at = -1;
function show(i) {
  if (i < 0 || i >= text.children.length) return;
  if (at >= 0) text.children[at].classList.remove("at");
  at = i;
  text.children[i].classList.add("at");
  about.textContent = JSON.stringify(text.children[i].textContent) + "   " + tell(i);
}
text.addEventListener("mouseover", e => {
  if (e.target.parentNode === text) show([...text.children].indexOf(e.target));
});
text.addEventListener("keydown", e => {
  const step = {ArrowRight: 1, ArrowLeft: -1}[e.key];
  if (!step) return;
  e.preventDefault();
  show(Math.max(0, at + step));
  text.children[at].scrollIntoView({block: "nearest"});
});
"""
