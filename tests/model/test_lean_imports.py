"""What a worker imports: transformers without the parts that cost seconds and serve nothing here."""

import subprocess
import sys

from models import model_path

HEAVY = ("torch._dynamo", "torch.distributed.tensor", "torch.distributed.fsdp", "torch._inductor")


def run(code: str) -> str:
    """What a process of its own prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_model_is_loaded_and_run_without_dynamo_and_distributed_tensors() -> None:
    code = f"""
import sys
from isthmus.model.load.loader import load_model
model = load_model({model_path("tiny-llama")!r}, dtype="fp32")
print(sorted(set({HEAVY!r}) & set(sys.modules)))
"""
    assert run(code) == "[]"


def test_afterwards_the_real_modules_are_there_for_whoever_wants_them() -> None:
    code = """
import isthmus.model.lean_imports, torch
distributed = torch.distributed.is_available()
twice = torch.compile(lambda x: 2 * x, backend="eager")
from transformers.generation.continuous_batching import PagedAttentionCache
print(distributed == hasattr(torch._C, "_c10d_init"), int(twice(torch.tensor(3))), len(vars(PagedAttentionCache)) > 5)
"""
    assert run(code) == "True 6 True"


def test_the_gateway_knows_a_converted_model_without_torch() -> None:
    code = """
import sys
import isthmus.cluster.launch.supervisor, isthmus.cluster.launch.ray_cluster
from isthmus.cluster.text.served import load_served_model
load_served_model("smollm2-135m")
print([name for name in ("torch", "numba", "transformers.modeling_utils") if name in sys.modules])
"""
    assert run(code) == "[]"
