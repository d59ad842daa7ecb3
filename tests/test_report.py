"""The report: figures, tables and browser are on the page, numbers come from the scores, and nothing is asked
from the network."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from rich.console import Console

from pmpd import storage
from pmpd.cli.main import main as run_command
from pmpd.evaluation.compare import compare
from pmpd.evaluation.score import ScoreConfig, score
from pmpd.report import figures, fonts, provenance
from pmpd.report.build import notes, unfinished, write_report
from pmpd.report.page import StyleSheet
from pmpd.report.source import Report, Source
from pmpd.report.view import section_of
from tests.generation_rows import generation_rows

CHROMIUM = shutil.which("chromium")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--virtual-time-budget=4000",
)  # fmt: skip
FIGURES = ("quality", "speed", "switches")
MANIFEST = {
    "written": "2026-01-02T03:04:05Z", "git_commit": "0123abc", "device": "test machine", "seconds": 12.5,
    "complete": True,
    "counts": {"rows": 192}, "models": {"model": "quant0"}, "config": {"benchmark": "demo"},
    "schema_version": 1, "table": "generations",
}  # fmt: skip


def make_report(folder: Path, rows: list[dict]) -> tuple[Report, dict[str, Path]]:
    config = ScoreConfig(resamples=200)
    comparisons = compare(rows)
    scores = [row for comparison in comparisons for row in score(comparison, config)]
    keys = {(row["benchmark"], row["split"], row["run"]): [1] for row in rows}
    report = Report(
        comparisons, scores, [Source(1, "results/generate/demo/quantized", MANIFEST)], keys, config
    )
    return report, write_report(report, folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Report, dict[str, Path]]:
    return make_report(tmp_path_factory.mktemp("report"), generation_rows())


@pytest.fixture(scope="module")
def page(made) -> str:
    return made[1]["report.html"].read_text(encoding="utf-8")


def test_every_figure_is_a_file_twice_and_on_the_page(made, page: str) -> None:
    _, written = made
    for name in FIGURES:
        assert written[f"demo-{name}.png"].read_bytes().startswith(b"\x89PNG")
        assert b"<svg" in written[f"demo-{name}.svg"].read_bytes()
        assert f'<figure id="demo-{name}"><svg' in page
        assert f"figures/demo-{name}.png" in written["report.md"].read_text()


def test_ids_on_the_page_are_unique_and_every_reference_has_its_target(page: str) -> None:
    without_data = re.sub(r'<script type="application/json">.*?</script>', "", page, flags=re.DOTALL)
    ids = re.findall(r'\bid="([^"]+)"', without_data)
    assert len(ids) == len(set(ids))
    wanted = set(re.findall(r'href="#([^"]+)"', without_data)) | set(
        re.findall(r"url\(#([^)]+)\)", without_data)
    )
    assert wanted <= set(ids)


def test_the_page_names_no_address_that_a_browser_would_load(page: str) -> None:
    assert "default-src 'none'" in page
    assert not re.findall(r'(?:src|href)="(?!#)[^"]*"', page)
    assert "@import" not in page
    assert not re.findall(r"url\((?!#)", page)


def test_the_table_shows_the_scores_as_they_are(made, page: str) -> None:
    report, _ = made
    table = page[page.index('id="demo-runs"') : page.index("</table>", page.index('id="demo-runs"'))]
    rows = [
        row
        for row in report.scores
        if (row["metric"], row["against"], row["turn"]) == ("rouge_l", "reference_output", None)
    ]
    assert len(rows) == 12
    for row in rows:
        line = table[table.index(f"</span>{row['run']}</th>") :].partition("</tr>")[0]
        assert f"<td>{row['average_bits']:.3f}</td>" in line
        assert f"<td>{row['value']:.4f}<br>" in line
        assert f"{row['low']:.3f} to {row['high']:.3f}" in line


def test_mixing_is_compared_with_uniform_at_nearest_bits_on_page_and_in_markdown(made, page: str) -> None:
    report, written = made
    table = page[page.index('id="demo-runs"') : page.index("</table>", page.index('id="demo-runs"'))]
    rows = {
        row["run"]: row
        for row in report.scores
        if (row["metric"], row["against"], row["turn"]) == ("rouge_l", "reference_output", None)
    }
    for row in rows.values():
        line = table[table.index(f"</span>{row['run']}</th>") :].partition("</tr>")[0]
        (listed,) = [
            text
            for text in written["report.md"].read_text().splitlines()
            if text.startswith(f"| {row['run']} |")
        ]
        if row["kind"] in ("fp", "uniform"):
            assert "bits)" not in line + listed
            continue
        bits, other = row["average_bits"], rows[row["nearest_uniform"]]
        low, value, high = (
            f"{row[f'nearest_difference{end}']:+.3f}".replace("-", "−") for end in ("_low", "", "_high")
        )
        to = f"to {other['run']} ({bits - other['average_bits']:+.3f} bits)".replace("-0", "−0")
        shown = f'<span class="ci">{low} to {high}</span><br><span class="ci">{to}</span>'
        assert re.search(rf">{re.escape(value)}(</span>)?<br>{re.escape(shown)}", line)
        assert f"| {value} [{low}, {high}] {to} |" in listed.replace("\\", "")


def test_every_precision_has_its_own_colour() -> None:
    css = StyleSheet().text()
    rules = {
        bits: re.search(rf"\.b{bits} {{ background: (var\(--p{bits}\));", css) for bits in (*range(2, 9), 16)
    }
    assert all(rules.values()), rules
    for scheme in css.split("@media (prefers-color-scheme: dark)")[:2]:
        colours = dict(re.findall(r"--p(\d+): (#\w+);", scheme))
        assert len(set(colours.values())) == len(rules)


def test_every_number_has_its_source_and_the_manifest_is_there(page: str) -> None:
    assert page.count('<a href="#source-1">[1]</a>') == 11, "all runs but the oracle, which is derived"
    assert 'id="source-1"' in page
    assert "&#34;git_commit&#34;: &#34;0123abc&#34;" in page
    assert "signature nrefs:1" in page


def test_text_of_prompts_and_answers_cannot_become_markup(tmp_path: Path) -> None:
    rows = generation_rows(questions=6, two_turns=2)
    for row in rows:
        row["prompt_text"] = "</script><script>alert(1)</script><!--"
        row["output_pieces"] = ["</script><img src=x>"] * row["output_tokens"]
    _, written = make_report(tmp_path, rows)
    page = written["report.html"].read_text()
    assert "<img" not in page
    assert page.count("<script>") == 1
    data = re.search(r'<script type="application/json">(.*?)</script>', page, flags=re.DOTALL).group(1)
    assert json.loads(data)["questions"][0]["prompt"] == rows[0]["prompt_text"]


NAMES = ('"><script>document.title = "mine"</script>', "../../x", "/_/x")
"""Names of benchmarks that nobody should trust."""


def hostile_rows() -> list[dict]:
    rows = [
        row
        for name in NAMES
        for row in generation_rows(questions=2, two_turns=1, benchmark=name)
        if row["kind"] in ("fp", "uniform", "static", "kv_cache")
    ]
    for row in rows:
        row["run"] += r' $\frac{$ <i>"x"</i>'
        row["model_id"] = "<script>document.title = 1</script>"
    return rows


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> tuple[Path, dict[str, Path]]:
    folder = tmp_path_factory.mktemp("hostile")
    return folder, make_report(folder / "a" / "b" / "report", hostile_rows())[1]


def test_names_of_benchmarks_and_runs_are_text_and_write_nothing_outside(hostile) -> None:
    folder, written = hostile
    page = written["report.html"].read_text()
    assert page.count("<script>") == 1
    assert "<i>" not in page
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.resolve() for path in files} == {path.resolve() for path in written.values()}
    assert all(path.is_relative_to(folder / "a" / "b" / "report") for path in files)
    assert all(re.fullmatch(r"[A-Za-z0-9_-]+\.(png|svg|html|md)", path.name) for path in files)
    anchors = re.findall(r'<section id="([^"]*)"', page)
    assert len(set(anchors)) == len(NAMES) + 1, "every benchmark has its own, and the provenance"
    assert r"$\frac{$" in page
    assert re.search(r"<text[^>]*>[^<]*\$\\frac\{\$", page), "the figures name the run as it is called"


def test_the_policy_names_the_one_script_and_style_sheet_by_hash(page: str) -> None:
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page).group(1)
    assert "unsafe" not in policy
    for tag in ("style", "script"):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, flags=re.DOTALL)
        assert f"{tag}-src {hash_of(text)}" in policy
    assert not re.findall(r"<[^>]+\sstyle=", page), "no attribute that the policy would have to allow"
    assert not re.findall(r"<[^>]+\son\w+=", page)


def hash_of(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def allow(page: str, script: str) -> str:
    """The page with a further script that its policy lets run."""
    return page.replace("script-src ", f"script-src {hash_of(script)} ").replace(
        "</body>", f"<script>{script}</script></body>"
    )


def test_lengths_are_drawn_only_where_the_runs_differ_in_them() -> None:
    rows = generation_rows(questions=3, two_turns=0)
    assert not figures.lengths_differ(compare(rows)[0]), "every run answers at the same length"
    longer = [
        {**row, "output_tokens": row["output_tokens"] * (2 if row["run"] == "uniform-2" else 1)}
        for row in rows
    ]
    assert figures.lengths_differ(compare(longer)[0])


def test_decode_times_have_a_range_and_say_whether_the_machine_was_idle(tmp_path: Path) -> None:
    rows = generation_rows(questions=3, two_turns=0)
    for row in rows:
        for measured in row["forward_seconds"]:
            measured["idle"] = row["worker"] == "w0"
            slow = 1.5 if measured["bits"] == 2 else 1
            measured["repeats"] = [measured["seconds"] * slow, measured["seconds"]]
    (comparison,) = compare(rows)
    assert comparison.speed.ratio_range({2: 7}, 4) == pytest.approx((0.5, 0.75)), "measured in turn"
    assert comparison.speed.ratio_range({2: 7}, 16) == pytest.approx((0.25, 0.375))
    assert comparison.speed.ratio_range({8: 1}, 4) is None
    report = Report([comparison], score(comparison, ScoreConfig(resamples=100)), [], {}, ScoreConfig())
    section = section_of(comparison, report)
    (row,) = [row for row in section.table.rows if row.name == "uniform-2"]
    assert [line.text for line in row.cells[4].lines] == ["0.50×", "0.50 to 0.75"]
    assert "not known to be idle" in section.table.note
    assert "on a machine not known to be idle)" in section.conclusion
    for row in rows:
        for measured in row["forward_seconds"]:
            measured["idle"] = True
    assert compare(rows)[0].speed.idle


def test_settings_and_costs_stand_beside_the_numbers() -> None:
    manifest = {**MANIFEST, "models": {"model": {"fingerprint": "quant0", "dtype": "bfloat16"}}}
    summary = {"runs": [{}], "total": {"rows_per_worker_hour": 1234.5, "cost_per_1000_rows": 0.25, "rows": 1}}
    source = Source(1, "in", manifest, summary)
    facts = dict(provenance.shown(source)["facts"])
    assert facts["rows per worker-hour"] == "1,234.5"
    assert facts["cost of 1,000 rows"] == "0.25"
    assert facts["computed in"] == "bfloat16"
    (comparison,) = compare(generation_rows(questions=2, two_turns=0))
    report = Report([comparison], [], [source], {("demo", "test", "fp"): [1]}, ScoreConfig())
    said = provenance.settings(report, comparison)
    assert said == "Prompts in the template plain; computed in bfloat16; answered by commit 0123abc."
    assert provenance.shown(Source(1, "in", MANIFEST, {"total": "none"}))["facts"]


def test_the_conclusion_says_what_the_intervals_say(made) -> None:
    report, written = made
    (comparison,) = report.comparisons
    section = section_of(comparison, report)
    rows = {
        row["run"]: row
        for row in report.scores
        if (row["metric"], row["against"], row["turn"]) == ("rouge_l", "reference_output", None)
    }
    row = rows["kv_cache"]
    assert section.conclusion.startswith(f"kv_cache decoded at {row['average_bits']:.2f} bits")
    worse = row["difference_high"] < 0
    assert ("is worse than that of uniform 4 bit" in section.conclusion) == worse
    static = [row for row in rows.values() if row["kind"] == "static"]
    good = [row for row in static if row["difference_high"] >= 0]
    assert good
    best = min(good, key=lambda row: (row["average_bits"], -row["value"]))
    cheapest = "the cheapest fixed plan that is not surely worse than uniform 4 bit"
    assert f"{cheapest}, {best['run']}," in section.conclusion
    assert any(best["run"].removeprefix("static-") in card.label for card in section.cards)
    rival = max(
        (other for other in static if other["average_bits"] <= row["average_bits"]),
        key=lambda other: other["value"],
    )
    if rival is not best:
        assert f"the best fixed plan with no more bits, {rival['run']}, has" in section.conclusion
    more = rows[row["nearest_uniform"]]["average_bits"] - row["average_bits"]
    told = f"; that run has {abs(more):.2f} bits {'more' if more > 0 else 'less'})"
    assert told in section.conclusion
    page = written["report.html"].read_text()
    assert section.conclusion.replace("'", "&#39;") in page


def test_a_character_that_no_font_has_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fonts, "families", lambda: [fonts.FIRST])
    assert fonts.missing_characters(["static-0/84", "naïve – ok"]) == ""
    assert fonts.missing_characters(["计划 a"]) == "划计"
    rows = generation_rows(questions=2, two_turns=0)
    for row in rows:
        row["run"] = row["run"].replace("kv_cache", "计划")
    comparisons = compare(rows)
    (note,) = notes(Report(comparisons, [], [], {}, ScoreConfig()))
    assert "boxes in the place of 划计" in note


def test_excluded_turns_are_told_at_the_top(tmp_path: Path) -> None:
    rows = generation_rows()
    victim = next(row for row in rows if row["run"] == "random-0")
    victim |= {"error": "RuntimeError: boom", "output_text": None, "precision_trace": None}
    _, written = make_report(tmp_path, rows)
    sentence = (
        "1 turns are left out of every number, because not all runs have an answer to them (1 failed "
        "in random-0)."
    )
    assert sentence in written["report.html"].read_text()
    assert sentence in written["report.md"].read_text()


def test_a_run_that_failed_as_a_whole_is_named_and_the_others_are_reported(tmp_path: Path) -> None:
    lost = {
        "error": "RuntimeError: boom\nTraceback",
        "output_text": None,
        "output_ids": None,
        "precision_trace": None,
    }
    rows = [
        {**row, **lost} if row["run"] == "random-0" else row
        for row in generation_rows(questions=6, two_turns=2)
    ]
    report, written = make_report(tmp_path, rows)
    sentence = "random-0 is in no number, since all its 8 turns failed, the first with: RuntimeError: boom."
    assert sentence in written["report.html"].read_text()
    assert sentence in written["report.md"].read_text()
    assert {
        row["rows"] for row in report.scores if row["against"] == "reference_output" and row["turn"] is None
    } == {8}


def test_a_benchmark_without_anything_to_compare_with_says_what_to_run(tmp_path: Path) -> None:
    rows = [row for row in generation_rows(questions=3, two_turns=3) if row["kind"] != "fp"]
    with pytest.raises(ValueError, match="run pmpd generate --schedulers fp"):
        make_report(tmp_path, rows)


def test_a_benchmark_with_references_needs_no_unquantized_model(tmp_path: Path) -> None:
    rows = [
        row
        for row in generation_rows(questions=6, two_turns=0, benchmark="cnn_dm")
        if row["kind"] not in ("fp", "kv_cache")
    ]
    report, written = make_report(tmp_path, rows)
    assert {row["against"] for row in report.scores} == {"dataset"}
    assert "ROUGE-L F1, stemmed" in written["report.html"].read_text()


def test_an_unfinished_run_is_named() -> None:
    assert unfinished([Source(1, "a", MANIFEST), Source(2, "b", {**MANIFEST, "complete": False})]) == ["b"]


def test_the_job_reads_folders_writes_scores_and_refuses_a_mixture(tmp_path: Path) -> None:
    from pmpd.cli.flags.report import ReportJob
    from pmpd.cli.report import main

    rows = generation_rows(questions=6, two_turns=2)
    for name, fp in (("fp", True), ("quantized", False)):
        chosen = [row for row in rows if (row["kind"] == "fp") == fp]
        storage.write_shard(
            storage.to_table(chosen, storage.GENERATIONS),
            tmp_path / "in" / name / "answers" / "data" / "part-0.parquet",
        )
        storage.write_manifest(
            tmp_path / "in" / name / "answers",
            storage.GENERATIONS,
            {"a": 1},
            table="generations",
            complete=True,
            counts={"rows": len(chosen)},
        )
    told = io.StringIO()
    job = ReportJob((str(tmp_path / "in"),), str(tmp_path / "out"), resamples=200)
    page = main(job, Console(file=told, width=100))
    assert "demo: kv_cache decoded at " in told.getvalue(), "the conclusion is not told"
    assert 'id="source-2"' in page.read_text()
    scores = storage.read_table(tmp_path / "out" / "scores").to_pylist()
    assert {row["run"] for row in scores} >= {"fp", "uniform-4", "oracle"}
    assert run_command(["inspect", str(tmp_path / "out" / "scores")]) == 0
    with pytest.raises(ValueError, match="is there twice"):
        main(ReportJob((str(tmp_path / "in"), str(tmp_path / "in")), str(tmp_path / "out")))
    with pytest.raises(ValueError, match="no generations in it"):
        main(ReportJob((str(tmp_path / "out"),), str(tmp_path / "out2")))
    manifest = tmp_path / "in" / "fp" / "answers" / "manifest.json"
    manifest.write_text(
        manifest.read_text().replace(f'"schema_version": {storage.SCHEMA_VERSION}', '"schema_version": 0')
    )
    with pytest.raises(ValueError, match="schema version 0"):
        main(ReportJob((str(tmp_path / "in"),), str(tmp_path / "out2")))


def test_reports_load_neither_torch_nor_ray() -> None:
    code = "import sys, pmpd.cli.report; print(sorted({'torch', 'ray', 'transformers'} & set(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    import sys

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "[]", done.stderr


# ------------------------------------------------------------------------------------------------------------


class Server(ThreadingHTTPServer):
    """Serves the page and writes down every request."""

    def __init__(self, page: bytes) -> None:
        self.requests: list[str] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.requests.append(self.path)
                self.send_response(200 if self.path == "/" else 404)
                self.send_header("Content-Type", "text/html; charset=utf-8")
                self.end_headers()
                if self.path == "/":
                    self.wfile.write(page)

            def log_message(self, *_: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt-get install chromium)")
def test_chromium_shows_figures_table_and_answers_and_requests_nothing_else(
    page: str, tmp_path: Path
) -> None:
    # What the script itself sees, written into the page, so that it is part of the dump.
    probe = """
    const seen = {figures: [...document.querySelectorAll("figure svg")]
        .filter(s => s.getBoundingClientRect().height > 80).length,
      rows: document.querySelectorAll("#demo-runs tbody tr").length,
      tokens: document.querySelectorAll(".answer .text span").length,
      loaded: performance.getEntriesByType("resource").map(e => e.name),
      wide: document.documentElement.scrollWidth - innerWidth,
      widest: [...document.querySelectorAll("body *")]
        .filter(e => e.getBoundingClientRect().right > innerWidth).map(e => e.outerHTML)};
    document.body.append(
      Object.assign(document.createElement("pre"), {id: "probe", textContent: JSON.stringify(seen)}));
    """
    keep = Path(os.environ.get("PMPD_SCREENSHOTS", tmp_path))
    keep.mkdir(parents=True, exist_ok=True)
    server = Server(allow(page, probe).encode())
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        for name, size in (("desktop", "1280,2400"), ("phone", "500,2400")):
            address = f"http://127.0.0.1:{server.server_address[1]}/"
            picture = keep / f"report-{name}.png"
            dump = browse(
                address, tmp_path / name, f"--window-size={size}", f"--screenshot={picture}", "--dump-dom"
            )
            seen = json.loads(re.search(r'<pre id="probe">(.*?)</pre>', dump).group(1))
            assert seen["figures"] == len(FIGURES), name
            assert seen["rows"] == 12, name
            assert seen["tokens"] > 30, "the browser of answers shows coloured tokens"
            assert seen["loaded"] == [], "the page asked the network for something"
            assert seen["wide"] <= 0, f"{name}: the page is wider than its window: {seen['widest'][:3]}"
    finally:
        server.shutdown()
    assert set(server.requests) <= {"/", "/favicon.ico"}, "the icon is the browser's own idea"
    assert (keep / "report-phone.png").stat().st_size > 20_000


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt-get install chromium)")
def test_chromium_runs_no_script_but_the_pages_own(hostile, tmp_path: Path) -> None:
    page = hostile[1]["report.html"].read_text()
    planted = page.replace("</main>", "<script>document.title = 'mine'</script></main>")
    (tmp_path / "planted.html").write_text(planted, encoding="utf-8")
    dump = browse((tmp_path / "planted.html").as_uri(), tmp_path / "profile", "--dump-dom")
    title = re.search("<title>(.*?)</title>", dump, flags=re.DOTALL).group(1)
    assert title.startswith("Precision and quality: &lt;script&gt;")
    assert '<option value="0"' in dump, "the page's own script fills the lists"


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt-get install chromium)")
def test_chromium_prints_the_page_with_all_columns(page: str, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text(page, encoding="utf-8")
    printed = tmp_path / "report.pdf"
    browse((tmp_path / "report.html").as_uri(), tmp_path / "profile", f"--print-to-pdf={printed}")
    content = printed.read_bytes()
    assert content.startswith(b"%PDF")
    assert len(re.findall(rb"/Type\s*/Page\b", content)) >= 3, (
        "figures, tables and provenance do not fit on fewer"
    )
    # As wide as A4 less its margins, and with the rules of print: what is wider would be cut off.
    probe = """
    document.body.style.width = "700px";
    const widest = Math.max(
      ...[...document.querySelectorAll("table")].map(e => e.getBoundingClientRect().right));
    document.body.append(Object.assign(document.createElement("pre"), {id: "probe", textContent: widest}));
    """
    css = re.search("<style>(.*?)</style>", page, flags=re.DOTALL).group(1)
    screen = css.replace("@media print", "@media screen")
    narrow = allow(page.replace(css, screen).replace(hash_of(css), hash_of(screen)), probe)
    (tmp_path / "narrow.html").write_text(narrow, encoding="utf-8")
    dump = browse(
        (tmp_path / "narrow.html").as_uri(), tmp_path / "profile2", "--window-size=1280,2400", "--dump-dom"
    )
    assert float(re.search(r'<pre id="probe">(.*?)</pre>', dump).group(1)) <= 700


def browse(address: str, profile: Path, *options: str) -> str:
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", *options, address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    return done.stdout
