"""FlowerTune's four challenges as configurations, and its score of answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.flowertune.multiple_choice import answered, scores
from rayfed_sub import load_config, run
from rayfed_sub.evaluation.named_metrics import load_metrics
from rayfed_sub.export.exported import export_peft
from rayfed_sub.planning.sampling import learning_rate

FOLDER = Path(__file__).parents[2] / "experiments" / "flowertune"
CHALLENGES = {"general": (20, 2), "medical": (20, 2), "finance": (50, 5), "code": (10, 2)}
TINY = [
    "model.path=random",
    "model.random={type: llama, hidden_size: 64, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2, "
    "num_key_value_heads: 2, max_position_embeddings: 1024}",
    "resources.workers=0",
]


@pytest.mark.parametrize("name", CHALLENGES)
def test_challenges_have_the_fixed_settings(name: str) -> None:
    config = load_config(FOLDER / f"{name}.yaml")
    federation = config.federation
    assert (federation.clients, federation.sampled) == CHALLENGES[name]
    assert (federation.rounds, federation.local_steps, federation.batch_size) == (200, 10, 16)
    assert not federation.same_batches
    assert (config.method["rank"], config.method["alpha"], config.method["dropout"]) == (32, 64, 0.075)
    assert (config.task.max_length, config.model.targets, config.method["optimizer_state"]) == (512, "peft", "reset")
    # The cosine from 5e-5 to 1e-6 over the rounds, at its beginning and in its middle.
    assert [learning_rate(config, n) for n in (0, 100)] == pytest.approx([5e-5, 2.55e-5])
    assert isinstance(config.task.prompt, str)
    shown = config.task.prompt.format(instruction="Add.", input="1 + 2")
    told = {"general": "Add.", "medical": "1 + 2"}.get(name, "Add. 1 + 2")
    begin = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    assert shown == f"{begin}\n### Instruction:\n{told}\n### Response: "


def test_answers_are_read_as_flowertune_reads_them() -> None:
    letters = {"B": "b", " (c) because": "c", "d": "d", "The answer is B": None, "": None, "\n## A\nB": "a", "F": None}
    assert {text: answered(text, letter=True) for text in letters} == letters
    words = {"Yes.": "yes", "no": "no", "yesno": "yes", "nono!": "no", "Yes, it is": None, "maybe": None}
    assert {text: answered(text, letter=False) for text in words} == words


def test_score_tells_form_from_knowledge() -> None:
    """Two of four are right, one of them by its own text; of the two in form one is.  "An" counts as A."""
    found = scores(["A", "b.", "The answer is C", "maybe"], ["A", "C", "C", "maybe"])
    assert found == {"accuracy": 0.5, "in_form": 0.5, "accuracy_in_form": 0.5}
    assert scores(["The", "An"], ["A", "A"]) == {"accuracy": 0.5, "in_form": 0.5, "accuracy_in_form": 1.0}
    metric = load_metrics([str(FOLDER / "multiple_choice.py")], ["one of two", "a second answer"])["multiple_choice"]
    wanted = {"accuracy": 0.5, "in_form": 1.0, "accuracy_in_form": 0.5}
    assert metric(["A", "b."], ["A", "C"]) == {f"multiple_choice/{name}": value for name, value in wanted.items()}


@pytest.mark.slow
def test_challenge_runs_its_adapter_loads_in_peft_and_is_judged(tmp_path: Path) -> None:
    from peft import PeftConfig, PeftModel
    from transformers import AutoModelForCausalLM

    pairs = [(a, b) for a in range(60) for b in range(4)]
    sums = [{"instruction": f"Add {a} and {b}.", "input": "", "output": f"{a + b}"} for a, b in pairs]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, sums)))
    few = ["federation.rounds=3", "federation.local_steps=2", "federation.clients=5", "evaluation.every=3"]
    config = load_config(FOLDER / "general.yaml", [f"task.path={tmp_path}/sums.jsonl", *few, *TINY])
    summary = run(config, tmp_path / "run")
    assert summary.rounds == 3
    # q_proj and v_proj of one layer: 32 (64 + 64) numbers each, from two clients in three rounds.
    assert summary.uplink_bytes == 3 * 2 * 2 * 32 * (64 + 64) * 4
    export_peft(tmp_path / "run", tmp_path / "adapter")
    loaded = PeftConfig.from_pretrained(str(tmp_path / "adapter"))
    assert (loaded.r, loaded.lora_alpha) == (32, 32)  # the scale of 2 is in B
    assert {name.rpartition(".")[2] for name in loaded.target_modules} == {"q_proj", "v_proj"}
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter" / "base")
    assert PeftModel.from_pretrained(base, str(tmp_path / "adapter")).active_adapter == "default"

    options = {"A": "1", "B": "2", "C": "9", "D": "0", "target": "B"}
    questions = [{"input": f"{a} + 1 - {a} + 1?", **options} for a in range(20)]
    (tmp_path / "mmlu.jsonl").write_text("\n".join(map(json.dumps, questions)))
    asked = [f"task.path={tmp_path}/mmlu.jsonl", f"model.start_from={tmp_path}/run", *TINY]
    asked.append(f"evaluation.metrics=[{FOLDER}/multiple_choice.py]")
    judged = run(load_config(FOLDER / "judge.yaml", asked), tmp_path / "judge")
    for score in ("accuracy", "in_form", "accuracy_in_form"):
        assert judged.metrics[f"multiple_choice/{score}"] == judged.metrics[f"multiple_choice/{score}_before"]
