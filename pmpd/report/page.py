# ruff: noqa: E501  (style sheets and scripts have their own line lengths)
"""The report's page: style and script as text, so that one HTML file holds everything and asks the network
for nothing."""

from __future__ import annotations

CSS = """
:root { color-scheme: light dark; --paper: #ffffff; --panel: #f5f7f9; --ink: #1c2733; --soft: #566472; --grid: #d5dbe1; --link: #005a9c;
  --p16: #e3e6ea; --p8: #d9d2ee; --p7: #f3d3ea; --p6: #cdd3fb; --p5: #bdeef2; --p4: #b9d9f3; --p3: #c4ecd9; --p2: #fde3b0; --good: #00664a; --bad: #a33b00; }
@media (prefers-color-scheme: dark) { :root { --paper: #12171d; --panel: #1b222a; --ink: #e6ebf0; --soft: #a3b0bd; --grid: #38434f; --link: #7cc0ff;
  --p16: #3b444e; --p8: #473a6e; --p7: #6b2f5a; --p6: #2f3a8c; --p5: #0b5660; --p4: #174a75; --p3: #0f5540; --p2: #6b4a0a; --good: #5fd3ac; --bad: #ffa36b; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main, header, footer { max-width: 76rem; margin: 0 auto; padding: 0 1.1rem; }
header { padding-top: 2rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .3rem; text-wrap: balance; }
h2 { font-size: 1.35rem; margin: 2.6rem 0 .6rem; padding-top: .8rem; border-top: 2px solid var(--ink); }
h3 { font-size: 1.05rem; margin: 1.8rem 0 .5rem; }
p, li { max-width: 46rem; overflow-wrap: anywhere; }
.lead { font-size: 1.08rem; }
.soft, figcaption, .note { color: var(--soft); font-size: .89rem; }
a { color: var(--link); }
nav ul { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; margin: 1rem 0 0; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: .8rem; margin: 1.2rem 0; padding: 0; list-style: none; }
.cards li { background: var(--panel); border-left: .3rem solid var(--c, var(--link)); border-radius: .3rem; padding: .7rem .9rem; max-width: none; }
.cards b { display: block; font-size: 1.45rem; line-height: 1.2; font-variant-numeric: tabular-nums; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1.4rem; align-items: start; }
figure { margin: 0; break-inside: avoid; }
figure svg { width: 100%; height: auto; display: block; max-width: 38rem; }
.scroll { overflow-x: auto; border: 1px solid var(--grid); border-radius: .3rem; margin: .6rem 0; }
table { border-collapse: collapse; width: 100%; font-size: .89rem; font-variant-numeric: tabular-nums; }
th, td { padding: .32rem .6rem; text-align: right; white-space: nowrap; line-height: 1.3; border-bottom: 1px solid var(--grid); }
th { font-weight: 600; } thead th { vertical-align: bottom; }
td.wide { text-align: left; white-space: normal; overflow-wrap: anywhere; }
thead th { background: var(--panel); }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); }
thead th:first-child { background: var(--panel); }
tbody tr:last-child td, tbody tr:last-child th { border-bottom: 0; }
.ci { color: var(--soft); font-size: .82rem; }
.dot { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .45em; background: var(--c); }
.worse { color: var(--bad); } .better { color: var(--good); }
details { margin: .6rem 0; } summary { cursor: pointer; font-weight: 600; }
pre { overflow-x: auto; background: var(--panel); padding: .7rem .9rem; border-radius: .3rem; font-size: .8rem; white-space: pre-wrap; overflow-wrap: anywhere; }
.browser { background: var(--panel); border-radius: .4rem; padding: .9rem; }
.controls { display: flex; flex-wrap: wrap; gap: .6rem 1rem; align-items: end; }
.controls label { display: flex; flex-direction: column; font-size: .82rem; color: var(--soft); flex: 1 1 13rem; min-width: 0; }
select, button { font: inherit; font-size: .95rem; padding: .4rem .5rem; border: 1px solid var(--soft); border-radius: .3rem; background: var(--paper);
  color: var(--ink); width: 100%; min-height: 2.5rem; }
button { width: auto; padding: .4rem .9rem; cursor: pointer; }
select:focus-visible, button:focus-visible, summary:focus-visible, a:focus-visible { outline: 3px solid var(--link); outline-offset: 1px; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: .9rem; margin-top: .9rem; }
.answer { background: var(--paper); border-radius: .3rem; padding: .7rem .85rem; min-width: 0; }
.answer h4 { margin: 0; font-size: .98rem; } .answer .text { white-space: pre-wrap; overflow-wrap: anywhere; margin-top: .5rem; line-height: 1.75; }
.text span { padding: .1em 0; color: var(--ink); }
.b16 { background: var(--p16); } .b8 { background: var(--p8); } .b7 { background: var(--p7); border-bottom: 2px double var(--soft); }
.b6 { background: var(--p6); border-bottom: 2px dashed var(--soft); } .b5 { background: var(--p5); border-bottom: 1px solid var(--soft); }
.b4 { background: var(--p4); }
.b3 { background: var(--p3); border-bottom: 2px dotted var(--soft); } .b2 { background: var(--p2); border-bottom: 2px solid var(--soft); }
.key { display: flex; flex-wrap: wrap; gap: .5rem; margin: .8rem 0 0; font-size: .85rem; } .key span { padding: .1rem .6rem; border-radius: .2rem; }
.prompt { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--paper); border-radius: .3rem; padding: .6rem .85rem; margin-top: .9rem;
  max-height: 16rem; overflow-y: auto; font-size: .92rem; }
footer { padding-top: 1.5rem; padding-bottom: 3rem; }
@media (max-width: 40rem) { h1 { font-size: 1.4rem; } h2 { font-size: 1.2rem; } th, td { padding: .34rem .5rem; }
  tbody th:first-child { min-width: 6.6rem; max-width: 9rem; white-space: normal; overflow-wrap: break-word; } }
@page { margin: 10mm; }
@media print { main, header, footer { padding: 0; } :root { --paper: #fff; --panel: #fff; --ink: #000; --soft: #333; --grid: #bbb; } body { font-size: 10.5pt; }
  .controls, nav { display: none; } .scroll { overflow: visible; border: 0; } th, td { padding: .2rem .2rem; font-size: 7pt; white-space: normal; } .ci { font-size: 6.5pt; }
  h2 { break-after: avoid; } .answer, .prompt { border: 1px solid #bbb; max-height: none; } .text span { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""

SCRIPT = """
"use strict";
for (const box of document.querySelectorAll(".browser")) {
  const data = JSON.parse(box.querySelector("script").textContent);
  const pick = name => box.querySelector(`[data-role="${name}"]`);
  const question = pick("question"), left = pick("left"), right = pick("right");
  const fill = (select, names) => names.forEach((name, i) => select.add(new Option(name, i)));
  fill(question, data.questions.map(q => q.title));
  for (const select of [left, right]) fill(select, data.runs);
  left.value = data.left; right.value = data.right;
  const element = (tag, cls, text) => { const e = document.createElement(tag); if (cls) e.className = cls; if (text) e.textContent = text; return e; };
  const answer = r => {
    const a = data.answers[question.value][r], card = element("section", "answer");
    card.append(element("h4", "", data.runs[r]));
    if (!a) { card.append(element("p", "note", "no answer: this turn failed in this run")); return card; }
    card.append(element("div", "note", a.note));
    const text = element("div", "text");
    let n = 0;
    for (const [bits, count] of a.trace)
      for (let i = 0; i < count; i++, n++) {
        const span = element("span", "b" + bits, a.pieces[n]);
        span.title = `token ${n + 1}: ${bits} bit` + (n ? "" : " (prefill)");
        text.append(span);
      }
    card.append(text);
    return card;
  };
  const show = () => {
    const q = data.questions[question.value];
    pick("prompt").textContent = q.prompt;
    pick("answers").replaceChildren(answer(left.value), answer(right.value));
    const reference = pick("reference");
    reference.hidden = !q.reference;
    reference.lastElementChild.textContent = q.reference || "";
  };
  const step = by => { question.selectedIndex = (question.selectedIndex + by + question.length) % question.length; show(); };
  pick("previous").onclick = () => step(-1);
  pick("next").onclick = () => step(1);
  for (const select of [question, left, right]) select.onchange = show;
  show();
}
"""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:">
<title>{title}</title>
<style>{css}</style>
</head>
<body>
{body}
<script>{script}</script>
</body>
</html>
"""

BROWSER = """
<div class="browser">
<script type="application/json">{data}</script>
<div class="controls">
<label>Question and turn<select data-role="question"></select></label>
<label>Left<select data-role="left"></select></label>
<label>Right<select data-role="right"></select></label>
<button type="button" data-role="previous">Previous</button><button type="button" data-role="next">Next</button>
</div>
<div class="key" aria-label="colour of a token by the precision of the forward that produced it">{key}</div>
<div class="prompt" data-role="prompt"></div>
<div class="answers" data-role="answers"></div>
<details data-role="reference"><summary>The data set's reference</summary><div class="prompt"></div></details>
</div>
<noscript><p class="note">The browser of answers needs JavaScript; the answers themselves are in the Parquet of the runs.</p></noscript>
"""
