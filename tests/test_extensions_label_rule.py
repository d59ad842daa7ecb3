"""A label rule from outside: one entry of the registry, and it arrives in the labels' manifest and rows."""

from __future__ import annotations

from rich.console import Console

from pmpd import storage
from pmpd.cli.flags.label import LabelJob
from pmpd.cli.label import main
from pmpd.labeling.rule import RULES, LabelRule


def as_long(trajectory, reference):
    """The likeness of lengths."""
    return -abs(len(trajectory.tokens) - len(reference.tokens))


def test_a_rule_of_another_package_labels_prompts(monkeypatch, dense_folder, anyprec_folder, tmp_path):
    monkeypatch.setitem(RULES, "as_long", LabelRule("as_long", 7, as_long))
    (tmp_path / "texts.txt").write_text("one text here\n\nanother text there")
    job = LabelJob(
        model_path=str(anyprec_folder()),
        reference_model_path=str(dense_folder()),
        dataset=str(tmp_path / "texts.txt"),
        max_new_tokens=4,
        rule="as_long",
        output_dir=str(tmp_path / "out"),
        kernel="reference",
        num_workers=0,
    )
    main(job, Console(quiet=True))
    labels = storage.join(job.output_dir, "labels")
    assert storage.read_manifest(labels)["config"]["rule"] == "as_long/3/v7"
    rows = storage.read_table(labels).to_pylist()
    assert [row["rule"] for row in rows] == ["as_long/3/v7"] * 2
    for row in rows:
        for pair in row["pairs"]:
            lengths = [len(row["reference_ids"]) - count for count in pair["branch_tokens"]]
            assert pair["scores"] == [-abs(difference) for difference in lengths]
