"""What a worker tells of its model."""

from ..kernels.fast_paths import SETTING, compiles_allowed
from ..model.model import Model
from ..model.starting import start_counters
from ..proto.worker_pb2 import ModelReport, WorkerReport


def report_model(report: WorkerReport, model: Model) -> None:
    """Fills in everything of a report that the loaded model decides."""
    report.model.CopyFrom(
        ModelReport(
            name=model.name,
            fingerprint=model.fingerprint,
            architecture=model.architecture,
            path=str(model.path),
            context_length=model.context_length,
            vocab_size=model.vocab_size,
        )
    )
    report.device = str(model.device)
    report.dtype = str(model.dtype).removeprefix("torch.")
    notes = [f"{str(model.weight_dtype).removeprefix('torch.')} weights"] if model.weight_dtype != model.dtype else []
    if not compiles_allowed():
        notes.append(f"{SETTING}=never")
    if notes:
        report.dtype += f" ({', '.join(notes)})"
    for name, count in start_counters().items():
        report.counters[name] = count
