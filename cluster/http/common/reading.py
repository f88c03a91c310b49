"""The answers to one chat, told apart into content, reasoning and calls of tools."""

from ....proto.generation_pb2 import GenerateEvent, GenerateRequest
from ...requests.request import ResolvedRequest
from ...text.answer_parser import AnswerParser, Delta, ToolChoice
from ...text.served import ServedModel
from .events import Tally, is_of_answer


class ChatReader:
    """Reads the events of one request, each of its answers by a parser of its own."""

    def __init__(self, model: ServedModel, request: GenerateRequest, choice: ToolChoice) -> None:
        self._model, self._request, self._choice = model, request, choice
        self._parsers: dict[int, AnswerParser] = {}
        self.prompt: list[int] = []
        self.tally = Tally()

    @property
    def begun(self) -> int:
        """How many answers have begun."""
        return len(self._parsers)

    def accept(self, resolved: ResolvedRequest) -> None:
        """What the prompt was tokenized to."""
        self.prompt = resolved.prompt_token_ids

    def has_begun(self, index: int) -> bool:
        """Whether this answer has."""
        return index in self._parsers

    def calls_tools(self, index: int) -> bool:
        """Whether this answer has called a tool so far."""
        return self._parsers[index].tool_calls > 0

    def read(self, event: GenerateEvent) -> list[Delta]:
        """What became certain with an event; with the last one of an answer all of it."""
        self.tally.push(event)
        if not is_of_answer(event):
            return []
        parser = self._parsers.get(event.choice)
        if parser is None:
            parser = self._model.new_answer_parser(self._request.chat, self._choice, self.prompt)
            self._parsers[event.choice] = parser
        deltas = parser.push(event.text, event.token_ids)
        return [*deltas, *parser.finish()] if event.finish_reason else deltas
