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
