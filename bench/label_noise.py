"""How much of a label is noise: agreement of labels of the same records, made twice.

    python -m bench.label_noise --base noise/base --others noise/bfloat16 noise/space noise/tokens128

Each folder is the --output-dir of a `pmpd label` of the same file of records; prompts are joined by their
line of it. `--rule agreement` stores ROUGE-L too, so one run gives the labels of both rules.
`bench/label_noise.sh` makes the folders.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import tyro

from bench import _record
from pmpd import storage
from pmpd.labeling.noise import agreement, read_label_sets


@dataclass(frozen=True)
class Config:
    base: tuple[str, ...]
    """Output folders of pmpd label, one a rule: what the others are compared with."""
    others: tuple[str, ...]
    """Likewise; the last part of a folder's path is its name in the table."""
    name: str = "label_noise"
    """Write bench/results/NAME.json."""


def main(config: Config) -> list[dict]:
    base: dict = {}
    for folder in config.base:
        base |= read_label_sets(folder)
    rows = []
    for folder in config.others:
        for rule, pairs in read_label_sets(folder).items():
            for (high, low), labels in pairs.items():
                found = agreement(base.get(rule, {}).get((high, low), {}), labels)
                rows.append(
                    {
                        "rule": rule,
                        "pair": f"{high}-{low}",
                        "against": storage.base_name(folder),
                        **asdict(found),
                        "ceiling": found.ceiling,
                        "kappa": found.kappa,
                    }
                )
    print("| rule | pair | against | prompts | agreement | interval | kappa | ceiling | majority |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['rule']} | {row['pair']} | {row['against']} | {row['prompts']} "
            f"| {row['agreement']:.2f} | "
            f"[{row['low']:.2f}, {row['high']:.2f}] | {row['kappa']:.2f} | {row['ceiling']:.2f} | "
            f"{row['majority']:.2f} |"
        )
    _record.write(config.name, rows)
    return rows


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
