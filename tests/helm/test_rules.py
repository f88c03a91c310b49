"""The rules of `lint/` find nothing in the chart, whatever its values, and every mistake that is planted."""

from pathlib import Path

import pytest
from helm.cases import cluster_of
from helm.charts import VALUES, name_of, rendered_case
from helm.lint.rules import problems
from helm.mistakes import MISTAKES, Mistake


@pytest.mark.parametrize("values", VALUES, ids=name_of)
@pytest.mark.parametrize("version", ["helm", "helm3"])
def test_rules_find_nothing(values: Path, version: str) -> None:
    name = name_of(values)
    assert problems(cluster_of(name, rendered_case(name, version))) == []


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_rules_find_a_planted_mistake(mistake: Mistake) -> None:
    objects = rendered_case(mistake.case)
    mistake.change(objects)
    assert any(mistake.found in problem for problem in problems(cluster_of(mistake.case, objects)))


def test_there_are_many_mistakes() -> None:
    assert len(MISTAKES) == len({mistake.name for mistake in MISTAKES}) >= 40
