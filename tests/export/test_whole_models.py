"""Models of more than one part end to end: those that see as well, whose language model is trained and whose export is
whole, and encoder-decoders.  Runs have one process, without Ray."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from rayfed_sub import load_config, run
from rayfed_sub.config.schema import Config
from rayfed_sub.core.errors import UserError
from rayfed_sub.export.exported import export_hf, export_peft
from rayfed_sub.models.weights import assemble, load_weights
from rayfed_sub.planning.job import prepare
from rayfed_sub.runtime import worker
from rayfed_sub.training.inference import answers
from tests.export.test_exported import job_of, stored, trained
from tests.helpers.model_types import built
from tests.helpers.tiny_models import VOCABULARY
from tests.helpers.word_tokenizers import numbers

PARTS = (
    "{% for m in messages %}9 {% for part in m['content'] if part['type'] == 'text' %}{{ part['text'] }} {% endfor %}"
    "10 {% endfor %}{% if add_generation_prompt %}11{% endif %}"
)
"""A chat template that wants a message's text as a part of it, as those with images do."""


def folder_of(kind: str, name: str, to: Path) -> Path:
    """A tiny checkpoint as its publisher would save it."""
    _, bones = built(name, kind, blocks=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        auto = "AutoModelForImageTextToText" if kind == "image-text-to-text" else "AutoModelForSeq2SeqLM"
        getattr(transformers, auto).from_config(bones.hf_config).save_pretrained(to)
    tokenizer = numbers(template=PARTS if kind == "image-text-to-text" else None, size=VOCABULARY)
    tokenizer.save_pretrained(to)
    if kind == "image-text-to-text":
        (to / "preprocessor_config.json").write_text('{"image_processor_type": "CLIPImageProcessor"}', encoding="utf-8")
    return to


def configured(model: Path, method: str, **task: Any) -> Config:
    rows = [f"{10 + i % 40} {11 + i % 30},{20 + i % 20}" for i in range(60)]
    (model.parent / "rows.csv").write_text("q,a\n" + "\n".join(rows) + "\n", encoding="utf-8")
    return load_config(
        {
            "name": "whole",
            "model": {"path": str(model)},
            "task": {
                **{"name": "table", "path": str(model.parent / "rows.csv"), "max_length": 24},
                **(task or {"prompt": "{q}", "answer": "a"}),
            },
            "federation": {"clients": 2, "rounds": 1, "local_steps": 2, "partition": {"kind": "iid"}},
            "method": {"name": method, "rank": 2},
            "optimizer": {"lr": 0.05},
            "evaluation": {"generate_rows": 2, "max_new_tokens": 4},
            "resources": {"workers": 0},
        }
    )


def after(folder: Path) -> tuple[Any, dict[str, Tensor], frozenset[str]]:
    """The trained model by our own means, the checkpoint's tensors, and the names of the trained ones."""
    job, (server, _) = job_of(folder), stored(folder)
    tensors = load_weights(job.config.model, job.architecture, job.config.seed)
    changes = job.method.model(server, job.architecture.shape)
    changed = {f"{layer}.weight": change.apply(tensors[f"{layer}.weight"]) for layer, change in changes.items()}
    return assemble(job.architecture, {**tensors, **changed}), tensors, frozenset(changed)


@torch.inference_mode()
def logits(model: Any) -> Tensor:
    ids = torch.randint(5, 40, (3, 12), generator=torch.Generator().manual_seed(0))
    answer = {"decoder_input_ids": ids[:, :5]} if model.config.is_encoder_decoder else {}
    return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids), **answer).logits


def check_exports(folder: Path, checkpoint: Path, auto: Any, to: Path) -> None:
    """Both formats have our logits; the whole model has every other weight as it was."""
    ours, tensors, changed = after(folder)
    export_hf(folder, to / "hf")
    whole = auto.from_pretrained(to / "hf")
    assert float((logits(ours) - logits(auto.from_pretrained(checkpoint))).abs().max()) > 1e-3
    torch.testing.assert_close(logits(whole), logits(ours), atol=1e-5, rtol=0)
    for name, tensor in whole.state_dict().items():
        if name in tensors and name not in changed:
            assert torch.equal(tensor, tensors[name]), name
    given, written = (load_file(place / "model.safetensors") for place in (checkpoint, to / "hf"))
    assert given.keys() == written.keys()
    for place in (checkpoint, to / "hf"):
        assert json.loads((place / "config.json").read_text())["architectures"] == [type(whole).__name__]
    from peft import PeftModel

    export_peft(folder, to / "peft")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # peft only warns of tensors that are missing or unexpected
        adapted = PeftModel.from_pretrained(auto.from_pretrained(checkpoint), str(to / "peft"))
    torch.testing.assert_close(logits(adapted), logits(ours), atol=1e-5, rtol=0)


def test_model_that_sees_is_trained_on_text_and_exported_whole(tmp_path: Path) -> None:
    checkpoint = folder_of("image-text-to-text", "qwen2_5_vl", tmp_path / "model")
    trained(tmp_path / "run", configured(checkpoint, "fedit"))
    job = job_of(tmp_path / "run")
    # The text is in the row although the template looks for parts.
    assert job.processor.prompt("20 30") == [9, 20, 30, 10, 11]
    assert all("language_model" in layer.name for layer in job.architecture.shape.targets)
    check_exports(tmp_path / "run", checkpoint, transformers.AutoModelForImageTextToText, tmp_path)
    for folder in ("hf", "peft"):
        assert (tmp_path / folder / "preprocessor_config.json").read_text() == (
            checkpoint / "preprocessor_config.json"
        ).read_text()
        assert (tmp_path / folder / "tokenizer_config.json").exists()
    readme = (tmp_path / "hf" / "README.md").read_text()
    assert "AutoModelForImageTextToText" in readme
    assert "lm_eval" not in readme  # it takes models that transformers has for causal language modelling


def test_encoder_decoder_is_trained_from_text_to_text(tmp_path: Path) -> None:
    checkpoint = folder_of("seq2seq-lm", "t5", tmp_path / "model")
    summary = run(configured(checkpoint, "fedit"), tmp_path / "run")
    assert {"held_out_loss", "perplexity", "token_accuracy", "rouge_l"} <= summary.metrics.keys()
    given = pd.read_parquet(tmp_path / "run" / "answers.parquet")
    assert len(given) >= 2
    check_exports(tmp_path / "run", checkpoint, transformers.AutoModelForSeq2SeqLM, tmp_path)
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "hf")
    assert generation.decoder_start_token_id == 0
    assert 'tokenizer(text)["input_ids"]' in (tmp_path / "hf" / "README.md").read_text()
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["task_type"] == "SEQ_2_SEQ_LM"


@pytest.mark.slow
def test_language_with_which_answers_begin_is_the_tokenizer_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """mBART learns to begin with an answer's last token, its language, whatever its configuration names."""
    checkpoint = folder_of("seq2seq-lm", "mbart", tmp_path / "model")
    numbers(end="</s> 63", size=VOCABULARY).save_pretrained(checkpoint)
    for file in ("config.json", "generation_config.json"):
        content = json.loads((checkpoint / file).read_text()) | {"decoder_start_token_id": 5}
        (checkpoint / file).write_text(json.dumps(content), encoding="utf-8")
    begun = []

    def noted(*given: Any, **how: Any) -> Any:
        begun.append(how["start"])
        return answers(*given, **how)

    monkeypatch.setattr(worker, "answers", noted)
    run(configured(checkpoint, "fedit"), tmp_path / "run")
    assert set(begun) == {63}
    export_hf(tmp_path / "run", tmp_path / "hf")
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "hf").decoder_start_token_id == 63


def test_what_an_encoder_decoder_cannot_learn_is_refused(tmp_path: Path) -> None:
    checkpoint = folder_of("seq2seq-lm", "t5", tmp_path / "model")
    for task, field, text in (
        ({"text": "q"}, "task.text", "an encoder-decoder, which reads one text and writes another"),
        ({"prompt": "{q}", "answer": "a", "mask_prompt": False}, "task.mask_prompt", "true with an encoder-decoder"),
        ({"messages": "q"}, "task.messages", "an encoder-decoder that has no chat template"),
    ):
        config = configured(checkpoint, "fedit", **task)
        config = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"generate_rows": 0})})
        with pytest.raises(UserError, match=text) as refused:
            prepare(config)
        assert refused.value.field == field
