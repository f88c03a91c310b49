"""What a gateway says of the model that it serves."""

from ...proto.generation_pb2 import Model
from ..fleet.worker_table import WorkerTable
from ..router.policies import LocalPrefill
from ..router.router import servable_codecs, token_limit
from ..text.served import ServedModel


class Models:
    """One model on the workers of a fleet."""

    def __init__(self, model: ServedModel, workers: WorkerTable, local_prefill: LocalPrefill) -> None:
        self._model = model
        self._workers = workers
        self._local_prefill: LocalPrefill = local_prefill

    def describe(self, name: str = "") -> Model:
        """The model of that name, as its workers can serve it now; NotFound where there is none."""
        self._model.check_name(name)
        model, table = self._model, self._workers.routing
        return Model(
            name=model.name,
            fingerprint=model.fingerprint,
            architecture=model.architecture,
            context_length=model.context_length,
            vocab_size=model.vocab_size,
            has_chat_template=model.tokenizer.has_chat_template,
            codecs=servable_codecs(table, self._local_prefill),
            default_codec=self._workers.default_codec(),
            max_request_tokens=min(model.context_length, token_limit(table, None, self._local_prefill)[1]),
        )
