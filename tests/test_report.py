"""The report: figures, tables and browser are on the page, numbers come from the scores, and nothing is asked
from the network."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pmpd import storage
from pmpd.cli.main import main as run_command
from pmpd.evaluation.compare import compare
from pmpd.evaluation.score import ScoreConfig, score
from pmpd.report.build import Report, Source, unfinished, write_report
from tests.generation_rows import generation_rows

CHROMIUM = shutil.which("chromium")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--virtual-time-budget=4000",
)  # fmt: skip
FIGURES = ("quality", "speed", "switches", "lengths")
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
        assert (
            f">{value}</span><br><span class='ci'>{low} to {high}</span><br><span class='ci'>{to}</span>"
            in line
        )
        assert f"| {value} [{low}, {high}] {to} |" in listed


def test_every_precision_has_its_own_colour() -> None:
    from pmpd.report.page import CSS

    rules = {
        bits: re.search(rf"\.b{bits} {{ background: (var\(--p{bits}\));", CSS) for bits in (*range(2, 9), 16)
    }
    assert all(rules.values()), rules
    for scheme in CSS.split("@media (prefers-color-scheme: dark)")[:2]:
        colours = dict(re.findall(r"--p(\d+): (#\w+);", scheme))
        assert len(set(colours.values())) == len(rules)


def test_every_number_has_its_source_and_the_manifest_is_there(page: str) -> None:
    assert page.count('<a href="#source-1">[1]</a>') == 11, "all runs but the oracle, which is derived"
    assert 'id="source-1"' in page
    assert "&quot;git_commit&quot;: &quot;0123abc&quot;" in page
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
    with pytest.raises(ValueError, match=r"run pmpd generate --schedulers fp"):
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
    from pmpd.cli.report import ReportJob, main

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
    page = main(ReportJob((str(tmp_path / "in"),), str(tmp_path / "out"), resamples=200))
    assert 'id="source-2"' in page.read_text()
    scores = storage.read_table(tmp_path / "out" / "scores").to_pylist()
    assert {row["run"] for row in scores} >= {"fp", "uniform-4", "oracle"}
    assert run_command(["inspect", str(tmp_path / "out" / "scores")]) == 0
    with pytest.raises(
        ValueError, match="--output-dir s3://bucket/report: a report is written to a local folder"
    ):
        ReportJob((str(tmp_path / "in"),), "s3://bucket/report")
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
    probe = """<script>
    const seen = {figures: [...document.querySelectorAll("figure svg")]
        .filter(s => s.getBoundingClientRect().height > 80).length,
      rows: document.querySelectorAll("#demo-runs tbody tr").length,
      tokens: document.querySelectorAll(".answer .text span").length,
      loaded: performance.getEntriesByType("resource").map(e => e.name),
      wide: document.documentElement.scrollWidth - innerWidth,
      widest: [...document.querySelectorAll("body *")].
        .filter(e => e.getBoundingClientRect().right > innerWidth).map(e => e.outerHTML)};
    document.body.append(
      Object.assign(document.createElement("pre"), {id: "probe", textContent: JSON.stringify(seen)}));
    </script></body>"""
    keep = Path(os.environ.get("PMPD_SCREENSHOTS", tmp_path))
    keep.mkdir(parents=True, exist_ok=True)
    server = Server(page.replace("</body>", probe).encode())
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
    probe = """<script>
    const widest = Math.max(
      ...[...document.querySelectorAll("table")].map(e => e.getBoundingClientRect().right));
    document.body.append(Object.assign(document.createElement("pre"), {id: "probe", textContent: widest}));
    </script></body>"""
    narrow = (
        page.replace("@media print", "@media screen")
        .replace("</body>", probe)
        .replace("<body>", '<body style="width: 700px">')
    )
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
