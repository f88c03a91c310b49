"""Labels of jobs: what clients may attach, and ask for."""

from collections.abc import Mapping

from ...proto.errors import InvalidRequest

MAX_LABELS, MAX_LABEL_KEY, MAX_LABEL_VALUE = 32, 63, 255


def check_labels(labels: Mapping[str, str]) -> dict[str, str]:
    """A copy of labels; InvalidRequest for too many, or one that cannot be kept."""
    if len(labels) > MAX_LABELS:
        raise InvalidRequest(f"{len(labels)} labels; allowed: at most {MAX_LABELS}")
    for key, value in labels.items():
        if not 1 <= len(key) <= MAX_LABEL_KEY or len(value) > MAX_LABEL_VALUE or not (key + value).isprintable():
            raise InvalidRequest(
                f"label {key[:MAX_LABEL_KEY]!r}; allowed: keys of 1 to {MAX_LABEL_KEY} printable characters, "
                f"values of at most {MAX_LABEL_VALUE}"
            )
    return dict(labels)
