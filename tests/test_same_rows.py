from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import save_file

from bench.same_rows import main


def write(folder, label=1, seconds=0.5, weight=1.0):
    (folder / "data").mkdir(parents=True)
    rows = [
        {"prompt_id": f"{i}", "pairs": [{"label": label if i == 2 else 0}], "seconds": seconds}
        for i in range(3)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "data" / "part-0.parquet")
    save_file({"a": np.asarray([weight], dtype=np.float32)}, folder / "model.safetensors")
    return str(folder)


def test_results_that_differ_only_in_time_are_the_same(tmp_path):
    assert main(write(tmp_path / "a"), write(tmp_path / "b", seconds=9.0)) == 0


def test_one_other_label_or_weight_or_a_missing_row_is_told(tmp_path, capsys):
    before = write(tmp_path / "a")
    assert main(before, write(tmp_path / "b", label=2)) == 1
    assert "2: pairs" in capsys.readouterr().out
    assert main(before, write(tmp_path / "c", weight=1.0000001)) == 1
    assert "1 tensors, 1 differ" in capsys.readouterr().out
    assert main(before, str(tmp_path / "nothing")) == 1


def test_rows_of_a_table_without_an_id_are_told_apart_by_all_that_names_them(tmp_path, capsys):
    for name, second in (("a", 0.5), ("b", 0.75)):
        (tmp_path / name).mkdir()
        rows = [
            {"benchmark": "demo", "turn": t, "value": v} for t, v in ((None, 0.25), (1, second), (2, 0.1))
        ]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name / "scores.parquet")
    assert main(str(tmp_path / "a"), str(tmp_path / "b")) == 1
    assert "3 rows, 1 differ\n  demo 1: value" in capsys.readouterr().out
