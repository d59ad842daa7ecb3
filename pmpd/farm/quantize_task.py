"""Quantization on the farm: one item, the model, on whichever worker has the GPU for it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pmpd import storage
from pmpd.decode.pulse import Pulse
from pmpd.errors import UserError
from pmpd.farm.driver import run
from pmpd.farm.options import FarmOptions
from pmpd.farm.task import BuiltTask, FarmTask, Item, Place
from pmpd.labeling.prompts import PromptConfig, records
from pmpd.quantize.config import QuantizeConfig
from pmpd.storage.lease import Lease

if TYPE_CHECKING:
    from pmpd.quantize.convert import Summary

MODELS = storage.table_schema("models", [("model_id", pa.string()), ("model_path", pa.string())])
QUANTIZED = storage.table_schema(
    "quantized",
    [
        ("model_id", pa.string()),
        ("summary", pa.string()),  # JSON of `pmpd.quantize.convert.Summary`
        ("worker", pa.string()),
        ("error", pa.string()),
    ],
)

STALL_SECONDS = 3600.0
"""One layer of a large model may take minutes; on a CPU, many."""

STAGES = {
    "inputs": "inputs of the layers on calibration texts",
    "layers": "layers quantized",
    "tuning": "tuning steps",
    "validation": "precisions validated",
}
"""What is counted in each stage, for people to read."""

Told = Callable[[str, int, int], None]
"""Called with (stage, done, total) after every step."""


@dataclass(frozen=True)
class QuantizeTask(FarmTask):
    """MODELS -> QUANTIZED, and beside them the checkpoint: in `output`, which may be a URI. What is finished
    is kept next to it, so another worker goes on where one was lost."""

    model_path: str
    output: str
    settings: QuantizeConfig
    texts: PromptConfig
    """Calibration texts."""
    dtype: str | None = None
    trust_remote_code: bool = False
    table = "quantized"
    id_column = "model_id"

    def identity(self) -> dict[str, Any]:
        return {
            "model_path": self.model_path,
            "output": storage.shown(self.output),
            "settings": asdict(self.settings),
            "texts": [self.texts.dataset, self.texts.resolved_config, self.texts.resolved_split],
            "dtype": self.dtype,
        }

    def quantize(self, device: str | None, on_progress: Told) -> Summary:
        """Does it in this process. UserError: see `quantize_checkpoint`."""
        import torch

        from pmpd.quantize.convert import quantize_checkpoint
        from pmpd.weights.hub import local_folder

        remote = storage.is_uri(self.output)
        folder = storage.cache_folder(self.output) if remote else self.output
        summary = quantize_checkpoint(
            local_folder(self.model_path),
            folder,
            self.settings,
            (text for _, text, problem in records(self.texts) if problem is None),
            trust_remote_code=self.trust_remote_code,
            device=None if device is None else torch.device(device),
            dtype=getattr(torch, self.dtype) if self.dtype else None,
            work_copy=self.output if remote else None,
            on_progress=on_progress,
        )
        if remote:
            storage.upload_folder(storage.cache_folder(self.output), self.output)
        return summary

    def build(self, place: Place) -> BuiltTask:
        import torch

        from pmpd.farm.load_model import cpu_name

        torch.set_num_threads(place.threads)
        pulse = Pulse()
        on_gpu = place.device == "cuda" and torch.cuda.is_available()

        def told(stage: str, done: int, total: int) -> None:
            pulse.step([16])
            pulse.doing = f"{STAGES[stage]} {done}/{total}"

        def quantize(items: list[Item]) -> Iterable[dict[str, Any]]:
            for item in items:
                summary = self.quantize("cuda" if on_gpu else "cpu", told)
                yield {"model_id": item["models"]["model_id"], "summary": json.dumps(asdict(summary))}

        device = torch.cuda.get_device_name() if on_gpu else cpu_name()
        return BuiltTask(run=quantize, schema=QUANTIZED, device=device, pulse=pulse)


def beside(output: str, what: str) -> str:
    """A folder for what is kept until the output is whole. Of a URI it is below it: how to connect to a store
    is known for what was given, and a local output folder must be empty."""
    if storage.is_uri(output):
        return storage.join(output, f".{what}")
    return storage.join(storage.parent(output), f".{storage.base_name(output)}.{what}")


def quantize_on_farm(task: QuantizeTask, options: FarmOptions) -> Summary:
    """Quantizes on one worker of the cluster that `farm.connect` joined; goes on where an earlier call with
    the same task was stopped. What the farm keeps meanwhile lies beside the output and is removed at the end.

    UserError: what the worker says that a user can cure, or the row's error.
    """
    from pmpd.quantize.convert import Summary

    folder = beside(task.output, "farm")
    models, results, identity = storage.join(folder, "models"), storage.join(folder, "done"), task.identity()
    with Lease(folder) as lease:
        for dataset in (models, results):
            storage.discard_unused(dataset, identity, [])
        row = {"model_id": storage.ascii_id(identity), "model_path": task.model_path}
        storage.write_dataset(models, MODELS, lambda counts: iter([row]), identity, rows_per_shard=1)
        run(task, {"models": models}, results, identity, options, lease)
        (found,) = storage.read_table(results).to_pylist()
    if found["error"]:
        kind, _, text = found["error"].partition(": ")
        raise UserError(text.splitlines()[0] if kind == UserError.__name__ else found["error"])
    storage.remove_dataset(folder)
    return Summary(**json.loads(found["summary"]))
