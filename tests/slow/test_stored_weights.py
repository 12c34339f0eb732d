"""Every method on a file of llama.cpp's whose weights stay packed, in a run that goes on in the middle."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayfed_sub import load_config, run
from rayfed_sub.config.schema import Model
from rayfed_sub.methods import METHODS
from rayfed_sub.models.architecture import architecture
from rayfed_sub.models.weights import load_weights
from tests.helpers.gguf_files import write_gguf

TINY = Path(__file__).parents[2] / "experiments" / "tiny.yaml"
LLAMA = {
    **{"type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"num_key_value_heads": 1, "max_position_embeddings": 64},
}


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    model = Model(path="random", random=LLAMA)
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, load_weights(model, architecture(model, "causal-lm"), seed=0), "Q8_0", "Q8_0")
    return [
        *(f"model={{path: {path}, dtype: bfloat16, quantize: stored}}", "task.max_length=48", "task.max_rows=200"),
        *("federation.clients=3", "federation.partition={kind: iid}", "federation.local_steps=2"),
        *("federation.rounds=2", "checkpoint.every=1", "resources.workers=0"),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_method_trains_on_packed_weights_and_goes_on(name: str, settings: list[str], tmp_path: Path) -> None:
    method = "method={name: fedavg}" if name == "fedavg" else f"method={{name: {name}, rank: 4}}"
    whole = run(load_config(TINY, [*settings, method]), tmp_path / "whole")
    assert whole.metrics["held_out_loss"] < whole.metrics["held_out_loss_before"]
    run(load_config(TINY, [*settings, method, "federation.rounds=1"]), tmp_path / "parts")
    parts = run(load_config(TINY, [*settings, method]), tmp_path / "parts", resume=True)
    assert parts.weights_sha256 == whole.weights_sha256
