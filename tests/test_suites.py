"""Every test file is of the suite that it belongs to, without anybody listing it."""

from pathlib import Path

import pytest
from suites import SUITES, TESTS, suite_of


@pytest.mark.parametrize(
    ("file", "suite"),
    [
        ("test_layering.py", "unit"),
        ("cluster/router/test_router.py", "unit"),
        ("prefill/test_worker.py", "model"),
        ("test_cancellation.py", "model"),
        ("test_packaging.py", "process"),
        ("integration/test_without_ray.py", "process"),  # by its helper
        ("chaos/test_frames.py", "chaos"),
        ("image/test_image.py", "image"),
        ("pods/test_release.py", "pods"),
        ("browser/test_page.py", "browser"),
    ],
)
def test_a_file_is_of_its_suite(file: str, suite: str) -> None:
    assert suite_of(TESTS / file) == suite


def test_a_helper_counts_as_what_imports_it(tmp_path: Path) -> None:
    file = tmp_path / "test_it.py"
    file.write_text("from clusters import run\n")
    assert suite_of(file) == "process"


def test_all_suites_have_files() -> None:
    assert {suite_of(file) for file in TESTS.rglob("test_*.py")} == set(SUITES)
