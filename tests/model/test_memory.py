"""What a model takes of a machine's memory, and what is said where it does not fit."""

import json
from pathlib import Path

import pytest
import torch
from models import model_path

from isthmus.decode.config import DecodeConfig
from isthmus.decode.memory import plan_memory as plan_decode
from isthmus.model import memory
from isthmus.model.load.blueprint import blueprint
from isthmus.model.load.loader import load_model
from isthmus.model.memory import GIB, Budget, excess, machine_bytes, refuse_oversized, require_memory, size_of
from isthmus.prefill.config import PrefillConfig
from isthmus.prefill.memory import plan_memory as plan_prefill
from isthmus.proto.errors import InvalidRequest

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gemma3", "tiny-mistral", "tiny-mixtral"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_blueprint_is_the_size_of_the_loaded_model(name: str, dtype: str) -> None:
    path = model_path(name)
    planned, loaded = blueprint(path, dtype=dtype), size_of(load_model(path, dtype=dtype))
    shapes = [[(layer.kv_heads, layer.head_dim) for layer in size.layers] for size in (planned, loaded)]
    assert shapes[0] == shapes[1]
    assert (planned.dtype, planned.hidden, planned.context_length) == (
        loaded.dtype,
        loaded.hidden,
        loaded.context_length,
    )
    assert planned.weight_bytes == pytest.approx(loaded.weight_bytes, rel=0.2)


def test_what_does_not_fit_says_what_to_lower(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "machine_bytes", lambda: 4 * GIB)
    budgets = [
        Budget(name="weights", nbytes=GIB),
        Budget(name="KV pages", nbytes=2 * GIB, lower="pool_gib"),
        Budget(name="page cache", nbytes=GIB, lower="host_cache_gib", on_device=False),
    ]
    assert excess(budgets, CPU) == ""
    more = [*budgets, Budget(name="local prompts", nbytes=1, lower="pool_gib")]
    with pytest.raises(InvalidRequest, match=r"takes up to 4.00 GiB, and this machine has 4.00 GiB") as raised:
        require_memory(more, CPU)
    assert str(raised.value).endswith(": lower pool_gib or host_cache_gib")


def test_a_gpu_and_its_host_are_counted_each_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "machine_bytes", lambda: GIB)
    monkeypatch.setattr(memory, "device_bytes", lambda device: 2 * GIB)
    gpu = torch.device("cuda", 0)
    fits = [Budget(name="KV pages", nbytes=2 * GIB), Budget(name="inbox", nbytes=GIB, on_device=False)]
    assert excess(fits, gpu) == ""
    assert "cuda:0 has 2.00 GiB" in excess([*fits, Budget(name="weights", nbytes=1)], gpu)
    assert "this machine has 1.00 GiB" in excess([*fits, Budget(name="process", nbytes=1, on_device=False)], gpu)


def test_weights_that_cannot_fit_are_refused_before_they_are_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(2000))
    refuse_oversized(tmp_path, CPU, torch.float32)
    monkeypatch.setattr(memory, "machine_bytes", lambda: 1999)
    with pytest.raises(InvalidRequest, match="a larger machine"):
        refuse_oversized(tmp_path, CPU, torch.float32)
    refuse_oversized(tmp_path, CPU, torch.bfloat16)  # the file may hold them in fp32


def test_weights_that_a_folder_holds_twice_count_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "machine_bytes", lambda: 2500)
    for name in ("model-00001-of-00001", "consolidated", "other"):
        (tmp_path / f"{name}.safetensors").write_bytes(bytes(2000))
    with pytest.raises(InvalidRequest, match="a larger machine"):
        refuse_oversized(tmp_path, CPU, torch.float32)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00001.safetensors"}}))
    refuse_oversized(tmp_path, CPU, torch.float32)
    index.write_text("[]")
    with pytest.raises(InvalidRequest, match="a larger machine"):
        refuse_oversized(tmp_path, CPU, torch.float32)


def test_a_container_is_given_less_than_its_machine_has(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(memory, "_CGROUP", (str(limit), str(tmp_path / "missing")))
    limit.write_text("max\n")
    everything = machine_bytes()
    limit.write_text("1000000\n")
    assert machine_bytes() == 1_000_000 < everything


def test_every_budget_of_a_setting_is_what_the_setting_says() -> None:
    size = blueprint(model_path("tiny-llama"))
    prefill = plan_prefill(PrefillConfig(model="m", host_buffer_gib=0.5, host_cache_gib=3, store_dir="/tmp"), size)
    by_name = {budget.name: budget.nbytes for budget in prefill.budgets}
    assert (by_name["send buffer"], by_name["page cache"], by_name["store queue"]) == (GIB // 2, 3 * GIB, 256 << 20)
    assert 2 * GIB - prefill.page_bytes < by_name["KV pages"] <= 2 * GIB
    decode = {
        budget.name: budget.nbytes for budget in plan_decode(DecodeConfig(model="m", pool="packed"), size).budgets
    }
    assert sum(decode[name] for name in ("KV pages", "raw pages", "local prompts")) <= 2 * GIB
    assert (decode["preempted"], decode["inbox"]) == (2 * GIB, 64 << 20)
