"""The Python door: rows, modules, losses and methods of the caller's own, handed to `run`."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import datasets
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from rayfed_sub import Config, Decision, OwnModel, Progress, RunError, UserError, load_config, run
from rayfed_sub.cli import main
from rayfed_sub.core.text import number
from rayfed_sub.core.types import LocalStep, Tensors
from rayfed_sub.methods.fedit import FedIT
from rayfed_sub.methods.hooks import nothing_at_server, nothing_kept, nothing_moved, nothing_received, nothing_refused
from rayfed_sub.reports.curves import quality
from rayfed_sub.reports.overview import results
from rayfed_sub.reports.page import Facts, Figure
from rayfed_sub.reports.run_reader import read_run
from rayfed_sub.telemetry.events import RoundDone, Summary
from tests.helpers.pictures import KINDS, drawn, filed

# --- a module, a loss and a data set in thirty lines


class Net(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.encode = nn.TransformerEncoderLayer(8, 2, width, batch_first=True)  # dropout, which never acts
        self.mix, self.head = nn.Linear(8, 12), nn.Linear(12, 3)

    def forward(self, x_BTk: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.relu(self.mix(self.encode(x_BTk))).mean(1))
        return logits


def loss(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x_BTk, y_B = batch
    return nn.functional.cross_entropy(module(x_BTk), y_B)


def measure(module: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, float]:
    x_BTk, y_B = batch
    p_BC = module(x_BTk).softmax(-1)
    wrong = 1 - p_BC.gather(-1, y_B[:, None])
    return {"accuracy": (p_BC.argmax(-1) == y_B).float().mean().item(), "wrong": wrong.mean().item()}


def rows(client: int) -> TensorDataset:
    rng = torch.Generator().manual_seed(client)
    x_RTk = torch.randn(30 + client, 4, 8, generator=rng) + 0.1 * client
    return TensorDataset(x_RTk, x_RTk.mean(1)[:, :3].argmax(-1))


DATA = {f"hospital {client}": rows(client) for client in range(3)}
KEYS: dict[str, Any] = {
    "name": "own",
    "model": {"targets": "linear|mix"},
    "federation": {"rounds": 2, "local_steps": 3, "batch_size": 8},
    "method": {"name": "fedftg", "rank": 4},
    "optimizer": {"lr": 0.01},
    "resources": {"workers": 0},
}


def net(seed: int = 0, width: int = 16) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net(width)


def model(**others: Any) -> OwnModel:
    return OwnModel(**{"module": net(), "loss": loss, "measure": measure, "head": ("head",), **others})


def config(*overrides: str) -> Config:
    return load_config(KEYS, overrides)


@pytest.fixture(autouse=True)
def unreported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports take longer than these runs."""
    monkeypatch.setattr("rayfed_sub.reports.report.report_run", lambda place, notify: None)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Summary:
    """An undisturbed run of it."""
    return run(config(), tmp_path_factory.mktemp("own") / "run", data=DATA, model=model())


def test_own_module_learns_and_stays_as_it_was(tmp_path: Path) -> None:
    module, said = net(), list[str]()
    module.train()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}

    def listen(record: Any) -> None:
        said.append(getattr(record, "text", ""))

    done = run(config("federation.rounds=3"), tmp_path / "run", listen, data=DATA, model=model(module=module))
    assert done.metrics["held_out_loss"] < done.metrics["held_out_loss_before"]
    assert done.metrics["accuracy"] > done.metrics["accuracy_before"]
    assert done.one_at_a_time
    assert "Net is the caller's own: clients train one at a time, and memory is not planned" in said
    assert module.training
    assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in before.items())
    assert (done.rows["train"], done.rows["held_out"], done.split) == (84, 9, "held-out share")


def test_score_that_is_not_defined_is_none(tmp_path: Path) -> None:
    """As correlations are: NaN would be no JSON."""
    found = run(
        config("federation.rounds=1"),
        tmp_path / "run",
        data=DATA,
        model=model(measure=lambda module, batch: {"never": float("nan"), "rows": float(len(batch[1]))}),
    )
    assert "never" not in found.metrics
    assert found.metrics["rows"] > 0
    json.loads((tmp_path / "run" / "summary.json").read_text(), parse_constant=pytest.fail)


def test_exported_state_dict_loads_into_the_module(
    finished: Summary, tmp_path: Path, cli: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Judged by hand, the module has the run's last score: the mean over held-out rows, client by client."""
    assert cli("export", finished.folder, "--to", str(tmp_path / "out")) == 0
    module = net(seed=7).eval()
    module.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))
    pretrained = net().state_dict()
    for name, tensor in module.state_dict().items():
        trained = name.startswith("head.") or name in [
            f"{t}.weight" for t in ("mix", "encode.linear1", "encode.linear2")
        ]
        assert torch.equal(tensor, pretrained[name]) != trained
    folder = Path(finished.folder)
    from rayfed_sub.planning.call import given, named
    from rayfed_sub.planning.job import prepare

    objects = given(data=DATA, model=model())
    held = prepare(named(config(), objects), objects).dataset.held_out
    batch = held.batch_of(torch.arange(len(held)).numpy())  # type: ignore[union-attr]
    assert loss(module, batch.content).item() == pytest.approx(finished.metrics["held_out_loss"], rel=1e-5)
    assert cli("report", str(folder), "--out", str(tmp_path / "report.html")) == 0
    for form in ("hf", "peft"):
        assert cli("export", str(folder), "--to", str(tmp_path / form), "--format", form) == 2
        assert f"--format: got '{form}'; allowed: state-dict" in capsys.readouterr().err
    runs = {"run": read_run(folder)}
    facts, curves = results(runs).parts[0], quality(runs)
    assert isinstance(facts, Facts)
    assert facts.pairs["model"] == "of the Python call, float32"
    assert (facts.pairs["task"], facts.pairs["partition"]) == ("of the Python call", "of the Python call")
    begun, ended = (finished.metrics[name] for name in ("wrong_before", "wrong"))
    assert facts.pairs["wrong"] == f"{number(begun)} before training, {number(ended)} after 2 rounds"
    assert curves is not None
    captions = {part.title: part.caption for part in curves.parts if isinstance(part, Figure)}
    assert captions["Accuracy"] == "Over all held-out rows; higher is better."
    assert captions["Wrong"] == "Over all held-out rows."  # of a score of the caller's own nobody knows


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The exit code of the command line."""

    def called(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["rayfed-sub", *words])
        return main._code()

    return called


# --- resuming


def interrupted(folder: Path, **objects: Any) -> None:
    def stop(record: Any) -> None:
        if isinstance(record, RoundDone):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(config(), folder, stop, **objects)


def other_loss(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return loss(module, batch) + TEMPERATURE * module(batch[0]).square().mean()


TEMPERATURE = 0.1


class Deeper(Net):
    def forward(self, x_BTk: Tensor) -> Tensor:
        return super().forward(x_BTk) * 2


class Patient:
    """A callback with a setting."""

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds

    def __call__(self, progress: Progress) -> Decision | None:
        return Decision(stop="enough") if progress.finished > self.rounds else None


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "callback's setting": ({"callbacks": [Patient(8)]}, "callbacks"),
    "no callback": ({"callbacks": []}, "callbacks"),
    "loss": ({"model": model(loss=other_loss)}, "loss"),
    "measure": ({"model": model(measure=None)}, "measure"),
    "batch": ({"model": model(batch=lambda some: torch.utils.data.default_collate(some[:1]))}, "batch"),
    "weights": ({"model": model(module=net(seed=1))}, "model.path"),
    "code": ({"model": model(module=Deeper())}, "model"),
    "rows": ({"data": {**DATA, "hospital 2": rows(5)}}, "--resume"),
    "no objects": ({"data": None, "model": None}, "task.name"),
    "no model": ({"model": None}, "model.path"),
}


def test_same_call_goes_on_and_others_are_refused(
    finished: Summary, tmp_path: Path, cli: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    same = {"data": DATA, "model": model(), "callbacks": [Patient(9)]}
    interrupted(tmp_path / "run", **same)
    for others, field in OTHERS.values():
        with pytest.raises(UserError) as caught:
            run(config(), tmp_path / "run", **{**same, **others}, resume=True)
        assert caught.value.field == field
        assert "\n" not in str(caught.value)
    folder = str(tmp_path / "run")
    assert cli("run", f"{folder}/config.yaml", "callbacks=[]", "--out", folder, "--resume") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "got 'given'" in line
    assert "in Python" in line
    assert cli("run", f"{folder}/config.yaml", "--out", folder, "--resume") == 2
    assert capsys.readouterr().err.strip() == line  # no callback is asked for, which would not help
    done = run(config(), tmp_path / "run", **same, resume=True)
    assert (done.weights_sha256, done.resumed) == (finished.weights_sha256, (1,))


# --- workers


def as_in_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    """Functions and classes that workers cannot import."""
    for thing in (Net, loss, measure, OwnMethod):
        monkeypatch.setattr(thing, "__module__", "__main__")


@dataclass(frozen=True)
class OwnMethod(FedIT):
    """FedIT under another name."""

    name: ClassVar[str] = "own-method"


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_workers_get_objects_of_a_notebook(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The same weights as without Ray; a method of the caller's own, whose class no worker can import."""
    as_in_a_notebook(monkeypatch)
    one, two = (
        run(
            config(f"resources.workers={workers}", "resources.cpus_per_worker=1"),
            tmp_path / str(workers),
            data=DATA,
            model=model(),
            method=OwnMethod(rank=2),
        )
        for workers in (0, 2)
    )
    assert one.weights_sha256 == two.weights_sha256
    assert one.metrics == two.metrics
    assert one.method == "__main__:OwnMethod"


def test_reference_executor_takes_own_modules(finished: Summary, tmp_path: Path) -> None:
    done = run(config("resources.executor=reference"), tmp_path / "run", data=DATA, model=model())
    assert done.metrics["held_out_loss"] == pytest.approx(finished.metrics["held_out_loss"], rel=1e-4)
    assert done.weights_sha256 != finished.weights_sha256


@dataclass(frozen=True)
class Halved:
    """A hook of the caller's own, known to nobody else: every gradient counts half."""

    name: ClassVar[str] = "halved"
    paper: ClassVar[str] = ""
    wire: ClassVar[str] = "0 / 0"
    departs: ClassVar[str] = ""
    share: float = 0.5

    check = nothing_refused
    init_server = nothing_at_server
    broadcast = nothing_received
    upload = client_state = nothing_kept
    aggregate = nothing_moved

    def begin(self, received: Tensors, kept: Tensors, trained: Tensors) -> Tensors:
        return {}

    def correct(self, memory: Tensors, step: LocalStep) -> tuple[Tensors, Tensors]:
        return {name: self.share * g for name, g in step.gradients.items()}, memory


def test_hook_of_the_caller_s_own_changes_steps_of_an_own_module(tmp_path: Path) -> None:
    """Half of each gradient moves SGD as half the rate does."""
    plain = ("optimizer.name=sgd", "method={name: fedavg}")
    half = run(config(*plain, "optimizer.lr=0.05"), tmp_path / "half", data=DATA, model=model())
    whole = run(config(*plain, "optimizer.lr=0.1"), tmp_path / "hooked", data=DATA, model=model(), hooks=[Halved()])
    assert whole.metrics["held_out_loss"] == pytest.approx(half.metrics["held_out_loss"], rel=1e-6)
    again = run(
        config(*plain, "optimizer.lr=0.1"), tmp_path / "hooked", data=DATA, model=model(), hooks=[Halved()], resume=True
    )
    assert again.weights_sha256 == whole.weights_sha256
    with pytest.raises(UserError, match=r"hook"):
        run(
            config(*plain, "optimizer.lr=0.1"),
            *(tmp_path / "hooked",),
            **{"data": DATA, "model": model(), "hooks": [Halved(share=0.25)], "resume": True},
        )


def test_random_draws_of_the_caller_s_code_repeat(tmp_path: Path) -> None:
    """Noise in batch and loss follows from seed, client and step; the caller's own generators are left alone."""

    def noisy(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return loss(module, (batch[0] + torch.randn_like(batch[0]), batch[1]))

    objects = {"data": DATA, "model": model(loss=noisy)}
    torch.manual_seed(0)
    first = run(config(), tmp_path / "a", **objects)
    here = torch.random.get_rng_state()
    torch.manual_seed(1)
    assert run(config(), tmp_path / "b", **objects).weights_sha256 == first.weights_sha256
    torch.manual_seed(0)
    assert torch.equal(here, torch.random.get_rng_state())


# --- with a tokenizer


QUESTIONS = {name: [{"q": f"{name} {20 + i}", "a": f"{10 + i % 3} 13"} for i in range(12)] for name in ("4", "5")}
TEXTS: dict[str, Any] = {
    **{key: value for key, value in KEYS.items() if key != "model"},
    "task": {"name": "table", "prompt": "{q}", "answer": "a", "max_length": 32},
    "federation": {"rounds": 1, "local_steps": 2, "batch_size": 4},
}


def words() -> Any:
    from tests.export.test_exported import tokenizer

    return tokenizer()


class Recurrent(nn.Module):
    """A causal language model of the caller's own, which takes tokens alone."""

    def __init__(self, vocabulary: int, *, both: bool = False) -> None:
        super().__init__()
        self.config = {"both": both}  # not one of transformers'
        self.embed = nn.Embedding(vocabulary, 16)
        self.rnn = nn.GRU(16, 8 if both else 16, batch_first=True, bidirectional=both)
        self.mix, self.out = nn.Linear(16, 16), nn.Linear(16, vocabulary)

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.out(torch.tanh(self.mix(self.rnn(self.embed(input_ids))[0])))
        return logits


def test_module_with_a_tokenizer_reads_the_tasks_of_a_configuration(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vocabulary = len(words())
    texts = load_config(TEXTS, ["model.targets=mix|out", "federation.rounds=3", "optimizer.lr=0.05"])
    own = OwnModel(Recurrent(vocabulary), tokenizer=words())
    done = run(texts, tmp_path / "run", data=QUESTIONS, model=own)
    assert done.metrics["held_out_loss"] < done.metrics["held_out_loss_before"]
    assert done.metrics["token_accuracy"] >= 0
    with pytest.raises(UserError, match=r"^model\.path: .*tokens see later tokens"):
        run(texts, tmp_path / "x", data=QUESTIONS, model=OwnModel(Recurrent(vocabulary, both=True), tokenizer=words()))
    with pytest.raises(UserError, match=r"^resources\.pack_size: got 4; allowed: auto or 1 with a module"):
        run(
            load_config(TEXTS, ["model.targets=mix", "resources.pack_size=4"]),
            tmp_path / "x",
            data=QUESTIONS,
            model=own,
        )


def test_transformers_model_trains_as_its_folder_does(tmp_path: Path) -> None:
    """Packs and all: the same weights from an object as from `model.path`."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    tokenizer = words()
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    module.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    named = load_config(TEXTS, [f"model.path={tmp_path / 'model'}"])
    there = run(named, tmp_path / "there", data=QUESTIONS)
    here = run(load_config(TEXTS), tmp_path / "here", data=QUESTIONS, model=OwnModel(module, tokenizer=tokenizer))
    assert here.weights_sha256 == there.weights_sha256
    assert not here.one_at_a_time


def test_state_dict_of_a_mixture_holds_its_trained_experts(tmp_path: Path) -> None:
    """In the parameter where the module has them, all in one."""
    from transformers import AutoModelForCausalLM, MixtralConfig

    from rayfed_sub.export.exported import export_state

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    mixture = MixtralConfig(vocab_size=len(words()), num_key_value_heads=1, num_local_experts=3, **sizes)
    module = AutoModelForCausalLM.from_config(mixture)
    run(load_config(TEXTS), tmp_path / "run", data=QUESTIONS, model=OwnModel(module, tokenizer=words()))
    export_state(tmp_path / "run", tmp_path / "state")
    state, before = load_file(tmp_path / "state" / "model.safetensors"), module.state_dict()
    changed = {name for name in before if not torch.equal(state[name], before[name])}
    assert changed == {"model.layers.0.mlp.experts.gate_up_proj"}
    module.load_state_dict(state)  # without a key too many


def test_export_of_given_rows_with_a_named_model(tmp_path: Path, cli: Any) -> None:
    """Nobody has the rows any more; the model and its method have names."""
    labels = {
        name: [{"q": row["q"], "l": "odd" if i % 2 else "even"} for i, row in enumerate(own)]
        for name, own in QUESTIONS.items()
    }
    random = {
        "type": "bert",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    keys = {
        **TEXTS,
        "model": {"path": "random", "random": random},
        "task": {"name": "table", "prompt": "{q}", "label": "l"},
    }
    done = run(load_config(keys), tmp_path / "run", data=labels, method=FedIT(rank=2))
    assert done.method == "fedit"
    assert cli("export", done.folder, "--to", str(tmp_path / "hf")) == 0
    assert (tmp_path / "hf" / "model.safetensors").exists()


@pytest.mark.slow
def test_rows_give_one_hash_from_anywhere(tmp_path: Path) -> None:
    """The same texts as CSV, TSV, JSONL, Parquet, a list and a `datasets` object; the same images as folder, Parquet
    and `datasets` object."""
    texts = [{**row, "at": name} for name, own in QUESTIONS.items() for row in own]
    frame = pd.DataFrame(texts)
    frame.to_csv(tmp_path / "t.csv", index=False)
    frame.to_csv(tmp_path / "t.tsv", index=False, sep="\t")
    frame.to_json(tmp_path / "t.jsonl", orient="records", lines=True)
    frame.to_parquet(tmp_path / "t.parquet")
    llama = {"type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    keys = {**TEXTS, "model": {"path": "random", "random": {**llama, "num_attention_heads": 2}}}
    column = ["federation.clients=2", "federation.partition.column=at"]
    files = [f"task.path={tmp_path / 't'}{suffix}" for suffix in (".csv", ".tsv", ".jsonl", ".parquet")]
    found = [run(load_config(keys, [path, *column]), tmp_path / str(n)) for n, path in enumerate(files)]
    found.append(run(load_config(keys), tmp_path / "list", data=QUESTIONS))
    sets = {name: datasets.Dataset.from_list(own) for name, own in QUESTIONS.items()}
    found.append(run(load_config(keys), tmp_path / "set", data=sets))
    chosen = {name: whole.shuffle(seed=0) for name, whole in sets.items()}
    found.append(run(load_config(keys), tmp_path / "chosen", data=chosen))
    assert len({done.weights_sha256 for done in found}) == 1

    pictures = [("a", kind, drawn(kind, n)) for n in range(6) for kind in KINDS]
    pictures += [("b", kind, drawn(kind, n)) for n in range(6, 10) for kind in KINDS]
    for n, (client, kind, image) in enumerate(pictures):
        (tmp_path / "folder" / client / kind).mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / "folder" / client / kind / f"{n}.png")
    rows = [{"image": filed(image), "label": kind, "at": client} for client, kind, image in pictures]
    pd.DataFrame(rows).to_parquet(tmp_path / "images.parquet")
    vit = {"type": "vit", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "image_size": 24}
    keys["model"] = {"path": "random", "random": {**vit, "num_attention_heads": 2, "patch_size": 8}}
    keys["task"] = {"name": "table", "image": "image", "label": "label"}
    folder = [f"task.path={tmp_path / 'folder'}", "federation.clients=2", "federation.partition.kind=files"]
    found = [run(load_config(keys, folder), tmp_path / "of folder")]
    found.append(run(load_config(keys, [f"task.path={tmp_path / 'images.parquet'}", *column]), tmp_path / "of table"))
    types = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(KINDS))})
    sets = {
        name: datasets.Dataset.from_list(
            [{"image": image, "label": kind} for client, kind, image in pictures if client == name], features=types
        )
        for name in ("a", "b")
    }
    found.append(run(load_config(keys), tmp_path / "of sets", data=sets))
    assert len({done.weights_sha256 for done in found}) == 1


# --- mistakes


def bad(**others: Any) -> dict[str, Any]:
    return {"data": DATA, "model": model(**others)}


def raising(module: nn.Module, batch: Any) -> Tensor:
    raise KeyError("x")


def failing(some: list[Any]) -> Any:
    """Fails on rows of the smallest client."""
    if any(client == 0 for _, _, client in some):
        raise ValueError("too large a number")
    return torch.utils.data.default_collate([row[:2] for row in some])


def tired(module: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Fails on batches that are smaller than those of training."""
    if len(batch[0]) < 8:
        raise ValueError("tired")
    return {}


LOCK = threading.Lock()


class Locked(Net):
    def __init__(self) -> None:
        super().__init__()
        self.lock = LOCK


class Tied(Net):
    def __init__(self) -> None:
        super().__init__()
        self.again = self.mix


class Unused(Net):
    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.Linear(8, 8)


MISTAKES: dict[str, tuple[Mapping[str, Any], tuple[str, ...], str]] = {
    "plain module": ({"data": DATA, "model": net()}, (), r"^model: got 'Net'; allowed: OwnModel\(module, tokenizer"),
    "neither": (bad(loss=None, measure=None), (), r"^model: got 'neither'; allowed: OwnModel with one of"),
    "both": (bad(tokenizer=1), (), r"^model: got 'both'; allowed: OwnModel with one of tokenizer and loss"),
    "measure alone": (bad(loss=None, tokenizer=1), (), r"^measure: got 'measure'; allowed: nothing without loss"),
    "no function": (bad(loss=3), (), r"^loss: got 'int'; allowed: a function"),
    "no module": (bad(module="net"), (), r"^model: got 'str'; allowed: OwnModel\(module=\.\.\.\) with a torch"),
    "double": (bad(module=net().double()), (), r"^model: got 'Net'; allowed: float32 or bfloat16 parameters; it has"),
    "lazy": (bad(module=nn.LazyLinear(3)), (), r"^model: got 'LazyLinear'; allowed: a module with initialised"),
    "no such head": (bad(head=("top",)), (), r"^model: got 'top'; allowed: head with names of linear layers: encode"),
    "no targets": (bad(), ("model.targets=conv",), r"^model\.targets: got 'conv'.*linear layers: encode\.linear1"),
    "lower-mlp": (
        bad(),
        ("model.targets=lower-mlp",),
        r"^model\.targets: got 'lower-mlp'; allowed: all-linear or a reg",
    ),
    "attention": (bad(), ("model.targets=out_proj",), r"^model\.targets: got 'out_proj'.*matches only encode\.self"),
    "two names": (bad(module=Tied()), (), r"^model\.targets: .*layers with one name each; mix is again as well"),
    "unused": (bad(module=Unused()), ("model.targets=idle",), r"^model\.targets: .*it does not on idle"),
    "nothing used": (bad(module=Unused(), head=()), ("model.targets=idle",), r"^loss: .*without a gradient to any"),
    "rank": (bad(), ("method.rank=99",), r"^method\.rank: got 99; allowed: 1 to 8"),
    "no scalar": (
        bad(loss=lambda module, batch: module(batch[0])),
        (),
        r"^loss: got 'OwnModel\.loss'; allowed: .*client hospital 2 it returns a tensor of shape \(8, 3\) in place",
    ),
    "a number": (bad(loss=lambda module, batch: 1.0), (), r"^loss: .*it returns a float in place of a scalar tensor"),
    "detached": (bad(loss=lambda module, batch: loss(module, batch).detach()), (), r"^loss: .*without a gradient to"),
    "raises": (bad(loss=raising), (), r"^loss: .*it raises KeyError: 'x'"),
    "bad measure": (bad(measure=lambda module, batch: [1]), (), r"^measure: .*returns no mapping of names to numbers"),
    "bad batch": (bad(batch=lambda some: 1 / 0), (), r"^batch: .*with 8 of client hospital 2 it raises; ZeroDivision"),
    "columns": (bad(), ("task.name=table", "task.prompt='{q}'"), r"^task\.prompt: got '{q}'; allowed: nothing with"),
    "sources": (bad(), ("task.name=table", "task.path=a.csv"), r"^task\.path: got 'a\.csv'; allowed: nothing with dat"),
    "named task": (bad(), ("task.name=medquad",), r"^task\.name: got 'medquad'; allowed: table with data"),
    "partition": (bad(), ("federation.partition.kind=iid",), r"^federation\.partition\.kind: got 'iid'; allowed"),
    "answers": (bad(), ("evaluation.generate_rows=2",), r"^evaluation\.generate_rows: got 2; allowed: 0 with a loss"),
    "class of a callback": (
        {**bad(), "callbacks": [Locked]},
        (),
        r"^callbacks: got '\[a class\]'; allowed: a list of functions",
    ),
    "bare callback": ({**bad(), "callbacks": loss}, (), r"^callbacks: got 'function'; .*give e\.g\. callbacks=\[on_pl"),
    "best of tokens": (
        bad(),
        (
            "early_stopping.metric=token_accuracy",
            "evaluation.split=validation",
            *("task.name=given", "task.validation_share=0.2"),
        ),
        r"^early_stopping\.metric: got 'token_accuracy'; allowed: held_out_loss, the score of a model with a loss",
    ),
    "no data": ({"model": model()}, (), r"^data: got None; allowed: rows for the model's own loss"),
    "test alone": ({"test": [1]}, (), r"^test: got 'rows'; allowed: nothing without data"),
    "class of a method": ({"method": FedIT}, (), r"^method: got 'FedIT'; allowed: an instance of a dataclass"),
    "method's field": ({"method": FedIT(rank=0)}, (), r"^method\.rank: got 0; allowed: an integer >= 1"),
    "lock in the module": (
        bad(module=Locked()),
        ("resources.workers=1",),
        r"^model: got 'Locked'; .*cannot pickle",
    ),
    "lock in the loss": (
        bad(loss=lambda module, batch, lock=LOCK: loss(module, batch)),
        ("resources.workers=1",),
        r"^loss: got '.*lambda.*'; allowed: what cloudpickle can send to workers: TypeError: cannot pickle '_thread",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line_and_leave_no_folder(mistake: str, tmp_path: Path) -> None:
    objects, overrides, message = MISTAKES[mistake]
    with pytest.raises(UserError, match=message) as caught:
        run(config(*overrides), tmp_path / "run", **objects)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_failure_later_names_client_round_and_stage(tmp_path: Path) -> None:
    """Hospital 0, the smallest, is client 2; the first batches, those of client 0, are fine."""
    data = {name: [(*row, k) for row in own] for k, (name, own) in enumerate(DATA.items())}
    test = [(*row, 9) for row in rows(9)]
    objects = {"data": data, "test": test, "model": model(batch=failing)}
    with pytest.raises(RunError, match=r"^round 0, client 2, local training: batch of local step 0: ValueError: too"):
        run(config(), tmp_path / "run", **objects)
    done = run(config("federation.on_client_failure=skip"), tmp_path / "skipped", **objects)
    assert done.rounds == 2
    with pytest.raises(RunError, match=r"^round 0, client \d, evaluation: measure raises ValueError: tired$"):
        run(config(), tmp_path / "judged", data=DATA, model=model(measure=tired))


@pytest.mark.parametrize("function", ["start_client", "upload", "accumulate", "aggregate", "model"])
def test_failure_of_a_method_names_round_and_function(function: str, tmp_path: Path) -> None:
    def raises(*arguments: object) -> Any:
        raise KeyError("left out")

    whose = r", client \d" if function in ("start_client", "upload", "accumulate") else ""
    failures = [
        (raises, "it raises KeyError: 'left out'"),
        (lambda *arguments: None, "it gives nothing, not [A-Z]\\w+"),
    ]
    for turn, (found, said) in enumerate(failures):
        kind = type("Fails", (FedIT,), {function: found, "name": "fails", "__module__": __name__})
        with pytest.raises(RunError, match=rf"^round 0{whose}, method fails\.{function}: {said}$"):
            run(config(), tmp_path / f"run-{turn}", data=DATA, model=model(), method=kind(rank=2))


def test_answer_of_a_method_is_held_against_the_model(tmp_path: Path) -> None:
    """Where it is given, and not where somebody computes with it."""
    mine, names = {"name": "mine", "__module__": __name__}, dict.fromkeys(name for name, _ in net().named_modules())

    def shorter(self: FedIT, *arguments: Any) -> Any:
        update = FedIT.upload(self, *arguments)
        return replace(update, tensors={name: x[:1] for name, x in update.tensors.items()})

    def infinite(self: FedIT, *arguments: Any) -> Any:
        update = FedIT.upload(self, *arguments)
        return replace(update, tensors={name: x / 0 for name, x in update.tensors.items()})

    answers = [
        ({"upload": shorter}, r"round 1, method mine\.model: it gives \S+ a change of 1 x \d+, not \d+ x \d+"),
        ({"upload": infinite}, r"round 0, client \d, method mine\.upload: it gives non-finite values in \S+"),
        ({"model": lambda *arguments: {}}, r"round 0, method mine\.model: it gives no change of \S+"),
        ({"model": lambda *arguments: names}, r"round 0, method mine\.model: it gives nothing, not Change"),
    ]
    for turn, (functions, said) in enumerate(answers):
        kind = type("Mine", (FedIT,), {**functions, **mine})
        with pytest.raises(RunError, match=f"^{said}$"):
            run(config(), tmp_path / f"run-{turn}", data=DATA, model=model(), method=kind(rank=2))


def test_failure_of_a_method_ends_the_plan_of_a_run_in_the_same_way(tmp_path: Path) -> None:
    """A plan walks the method's functions before the run does."""

    @dataclass(frozen=True)
    class Fails(FedIT):
        def accumulate(self, *arguments: object) -> Any:
            raise KeyError("left out")

    Fails.__module__ = __name__
    said = r"^round 0, client \d, method fedit\.accumulate: it raises KeyError: 'left out'$"
    rows = [{"text": f"{number} is a number"} for number in range(20)]
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    random = {"type": "llama", "num_hidden_layers": 1, "max_position_embeddings": 256, **sizes}
    keys = {**KEYS, "model": {"path": "random", "random": random}, "task": {"name": "given", "text": "text"}}
    with pytest.raises(RunError, match=said):
        run(load_config(keys), tmp_path / "run", data={"a": rows}, method=Fails(rank=2))
    assert not (tmp_path / "run").exists()
