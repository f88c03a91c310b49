"""What a worker tells of its model."""

from ..proto.worker_pb2 import ModelReport, WorkerReport
from .model import Model


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
    if model.weight_dtype != model.dtype:
        report.dtype += f" ({str(model.weight_dtype).removeprefix('torch.')} weights)"
