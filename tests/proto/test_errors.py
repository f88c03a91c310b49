"""The error tree stands alone, and texts of the system lose their paths before clients see them."""

import subprocess
import sys

from isthmus.proto.errors import without_paths


def test_texts_of_the_system_lose_their_paths() -> None:
    assert without_paths("[Errno 2] No such file or directory: '/srv/models/x.bin'") == (
        "[Errno 2] No such file or directory: '(a path)'"
    )
    assert without_paths('socket "/run/pg/.s.PGSQL.5432" failed') == 'socket "(a path)" failed'
    assert without_paths("loss of 3/4 of a page at http://host/a/b") == "loss of 3/4 of a page at http://host/a/b"


def test_the_error_tree_needs_no_grpc() -> None:
    program = "import sys; import isthmus.proto.errors; sys.exit('grpc' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
