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
    text.dir = "auto";
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
