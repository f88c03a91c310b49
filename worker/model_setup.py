"""The model of a worker: how it is loaded, what is measured of it once, and what reports say of it."""

from collections.abc import Sequence

from torch import Tensor

from ..kernels.fast_paths import SETTING, compiles_allowed
from ..kvtransfer.calibration.balance import balance_path, ensure_balance
from ..model.cache import cache_root
from ..model.load.loader import load_model
from ..model.model import Model
from ..model.phases import phase, start_counters
from ..model.text.tokenizer import Tokenizer
from ..proto.worker_pb2 import ModelReport, WorkerReport
from .config import WorkerConfig
from .start import gently


async def load_configured(config: WorkerConfig) -> Model:
    """Loads the model of the settings; raises what loading raises."""
    return await gently(
        load_model, config.model, dtype=config.dtype, device=config.device, manifest=config.model_manifest
    )


async def load_balance(config: WorkerConfig, model: Model) -> Sequence[Tensor]:
    """The balance of the model's channels for packed pages (`kvtransfer/calibration`), measured where it is not known.

    Raises what is wrong with a file that the settings name.
    """
    with phase("balance"):
        return await gently(
            ensure_balance,
            balance_path(cache_root(), model.fingerprint, config.page_tokens),
            model.fingerprint,
            model.forward,
            lambda text: Tokenizer(model.path).encode(text),
            model.layers,
            config.page_tokens,
            config.balance,
        )


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
