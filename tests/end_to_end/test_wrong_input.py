"""Wrong input ends before Ray starts: one line on stderr that names field, value and allowed values; exit code 2."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import pandas as pd
import pytest
import yaml

from rayfed_sub import load_config
from rayfed_sub.cli import main
from tests.helpers.written_runs import write_run

TINY = str(Path(__file__).parents[2] / "experiments" / "tiny.yaml")
Refusal = Callable[[Sequence[str]], str]
TABLE = (
    "task.name=table",
    "task.path=rows.parquet",
    "task.prompt='{q}'",
    "task.answer=a",
    "federation.partition.column=by",
    "federation.clients=2",
)


GPT2 = (
    "method.rank=2 task.max_length=48 model.random={} model.random.type=gpt2 model.random.n_layer=1 "
    "model.random.n_head=2 model.random.n_embd=32 model.random.n_positions="
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 rows: `by` is x 12 times and y 8 times, `n` is 0 or 1, `same` is always s; and unusable files."""
    folder = tmp_path_factory.mktemp("files")
    numbers = range(20)
    columns = {
        "q": [f"what {i}" for i in numbers],
        "a": [f"answer {i}" for i in numbers],
        "by": ["x"] * 12 + ["y"] * 8,
        "n": [i % 2 for i in numbers],
        "same": ["s"] * 20,
        "n2": [i % 3 // 2 for i in numbers],
        "x": [i / 4 for i in numbers],
    }
    pd.DataFrame(columns).to_parquet(folder / "rows.parquet")
    pd.DataFrame({name: [] for name in columns}).to_parquet(folder / "empty.parquet")
    (folder / "broken.parquet").write_bytes(b"PAR1 and no more")
    for name, text in {
        "no_rows.csv": "q,a,by\n",
        "nothing.csv": "",
        "rows.doc": "q a by",
        "one_record.json": '{"q": 1}',
        "mixed.jsonl": '{"premise": "a", "hypothesis": "b", "x": 0.5}\n'
        '{"premise": "c", "hypothesis": "d", "x": "high"}\n',
        "broken.jsonl": '{"q": 1}\n{"q": \n',
        "broken-41.jsonl": '{"q": "a", "a": "b", "by": "x"}\n' * 39 + '\n{"q": "a" "a": "b"}\n',
        "list-3.jsonl": '{"q": 1}\n\n[1, 2]\n',
        "broken-3.json": '[{"q": 1},\n{"q": 2},\n{"q" 3}]',
        "fields-3.csv": "q,a,by\n1,2,x\n1,2,x,4\n",
        "broken.yaml": "seed: [1, 2\nname: }",
        "list.yaml": "- seed\n- 1\n",
        "empty.yaml": "",
        "repeated.yaml": "federation: {clients: 8}\nseed: 1\nfederation: {rounds: 2}\n",
        "both.yaml": "federation: {rounds: 3, epochs: 1}\n",
        "pool.yaml": "federation:\n  partition: {kind: pool}\n",
        "numbers.yaml": "federation: {2: 3}\n",
        "number.yaml": "name: 20240101\n",
        "sweep.yaml": f"base: {TINY}\nsweep: {{space: {{seed: {{grid: [0, 1]}}}}}}\n",
        "study.yaml": f"claim: none\nbase: {TINY}\nvariants: {{a: []}}\nseeds: [0]\n",
    }.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "latin.yaml").write_bytes(b"name: \xff\n")
    for name in ("latin-2.jsonl", "latin-2.json", "latin-2.csv"):
        (folder / name).write_bytes(b'{"q": 1}\n{"q": "\xff"}\n')
    for name in ("nothing_in_it", "a_run", "a_sweep", "full"):
        (folder / name).mkdir()
    (folder / "a_sweep" / "sweep.yaml").write_text("name: tiny\n", encoding="utf-8")
    (folder / "a_run" / "config.yaml").write_text("name: tiny\n", encoding="utf-8")
    (folder / "full" / "file").write_text("", encoding="utf-8")
    return folder


@pytest.fixture
def refusal(files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refusal:
    """The refusal of `rayfed-sub ARGUMENTS` on stderr, on a machine of 2 CPUs without a GPU, in the folder of the
    files.  Starting Ray fails the test, and so does a run folder that is left behind."""
    import ray
    import torch

    def started(*args: object, **options: object) -> None:
        pytest.fail("Ray was started")

    monkeypatch.chdir(files)
    monkeypatch.setattr(ray, "init", started)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # other tests keep a session
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)

    def refusal(arguments: Sequence[str]) -> str:
        monkeypatch.setattr(sys, "argv", ["rayfed-sub", *arguments])
        with pytest.raises(SystemExit) as ended:
            main.main()
        message = capsys.readouterr().err
        assert ended.value.code == 2
        assert message.startswith("rayfed-sub: ")
        assert message.endswith("\n")
        assert message.count("\n") == 1, message
        assert not Path("runs").exists()
        return message.removeprefix("rayfed-sub: ")

    return refusal


# For `rayfed-sub run experiments/tiny.yaml OVERRIDES`: the overrides, the line's beginning, and a part of it.
SINGLE = {
    "unknown key": ("colour=red", "colour: got 'red'; allowed: these keys here", "these keys here: name, seed, model"),
    "misspelt key": ("federation.round=3", "federation.round: got 3", "did you mean rounds?"),
    "misspelt key, deeper": ("federation.partition.kinds=iid", "federation.partition.kinds:", "did you mean kind?"),
    "unknown method": ("method.name=fedfgt", "method.name: got 'fedfgt'", "fedftg, fedkrso, fedsub, shared-galore"),
    "method without a name": ("method={}", "method.name: got None", "fedftg, fedkrso"),
    "method that is no method": ("method.name=json:JSONDecoder", "method.name: got 'json:JSONDecoder'", "method"),
    "method that is nowhere": ("method.name=nowhere:Nothing", "method.name: got 'nowhere:Nothing'", "importable"),
    "method as a word": ("method=fedsvd", "method: got 'fedsvd'", "keys with values; set method.name=fedsvd"),
    "model as a word": ("model=gpt2", "model: got 'gpt2'", "; set model.path=gpt2"),
    "architecture as a word": ("model.random=gpt2", "model.random: got 'gpt2'", "; set model.random.type=gpt2"),
    "task as a word": ("task=medquad", "task: got 'medquad'", "; set task.name=medquad"),
    "optimizer as a word": ("optimizer=sgd", "optimizer: got 'sgd'", "; set optimizer.name=sgd"),
    "server as a word": ("server=adam", "server: got 'adam'", "; set server.optimizer=adam"),
    "misspelt field of a method": ("method.ranks=3", "method.ranks: got 3", "did you mean rank?"),
    "field of another method": (
        'method={"name":"fedavg","rank":4}',
        "method.rank: got 4",
        "these keys here: optimizer_state",
    ),
    "rank of nothing": ("method.rank=0", "method.rank: got 0", "1; "),
    "rank above the matrix": ("method.rank=129", "method.rank: got 129", "1 to 128 (model.layers.0.mlp.up_proj is 384"),
    "rank in words": ("method.rank=eight", "method.rank: got 'eight'", "integer"),
    "infinite scale": ("method.scale=.inf", "method.scale: got inf", "a finite number"),
    "unknown projector": ("method.projector=best", "method.projector: got 'best'", "randomized"),
    "FedFTG does not average": ("method.optimizer_state=average", "method.optimizer_state: got 'average'", "reset"),
    "negative rate": ("optimizer.lr=-1", "optimizer.lr: got -1", "a number >= 0; e.g. optimizer.lr=0.001"),
    "rate that is no number": ("optimizer.lr=.nan", "optimizer.lr: got nan", "a finite number >= 0"),
    "rate in words": ("optimizer.lr=fast", "optimizer.lr: got 'fast'", "a number >= 0"),
    "beta of 1": ("optimizer.betas=[0.9,1.0]", "optimizer.betas: got [0.9, 1.0]", "each a number >= 0 and < 1"),
    "one beta": ("optimizer.betas=[0.9]", "optimizer.betas: got [0.9]", "a list of 2"),
    "beta by number": ("optimizer.betas.0=0.8", "optimizer.betas: got {'0': 0.8}", "a list of 2"),
    "unknown optimiser": ("optimizer.name=adam", "optimizer.name: got 'adam'", "adamw or sgd"),
    "negative seed": ("seed=-1", "seed: got -1", "an integer >= 0"),
    "name of a path": ("name=a/b", "name: got 'a/b'", "text that matches"),
    "name of the folder above": ("name=..", "name: got '..'", "text that matches"),
    "name of nothing": ("name=", "name: got None", "e.g. name=run"),
    "no local steps": ("federation.local_steps=0", "federation.local_steps: got 0", "an integer >= 1"),
    "no batch": ("federation.batch_size=0", "federation.batch_size: got 0", "an integer >= 1"),
    "half a round": ("federation.rounds=2.5", "federation.rounds: got 2.5", "an integer >= 1, or null"),
    "more sampled than there are": ("federation.sampled=9", "federation.sampled: got 9", "1 to federation.clients=8"),
    "none sampled": ("federation.sampled=0", "federation.sampled: got 0", "an integer >= 1, or null"),
    "a pool of many": ("federation.partition.kind=pool", "federation.clients: got 8", "1 with partition.kind=pool"),
    "section as a word": (
        "federation.partition=iid",
        "federation.partition: got 'iid'; allowed: keys with values: kind, column, file",
        "; set federation.partition.kind=iid",
    ),
    "empty section": ("federation=", "federation: got None", "keys with values: clients, sampled"),
    "unknown weights": (
        "federation.client_weighting=rows",
        "federation.client_weighting: got 'rows'",
        "samples or uniform",
    ),
    "privacy with weights by rows": (
        'privacy={"clip":1,"noise":1}',
        "federation.client_weighting: got 'samples'",
        "uniform with privacy.clip: every client counts the same; set federation.client_weighting=uniform",
    ),
    "privacy of a method that factorises": (
        'privacy={"clip":1,"noise":1} method.name=fedsvd',
        "privacy.clip: got 1",
        "nothing with method.name=fedsvd",
    ),
    "privacy with averaged moments": (
        'privacy={"clip":1,"noise":1} method.name=fedit method.optimizer_state=average',
        "method.optimizer_state: got 'average'",
        "keep or reset with privacy.clip",
    ),
    "privacy of clients that stay away": (
        'privacy={"clip":1,"noise":1} federation.client_weighting=uniform federation.availability=0.5',
        "federation.availability: got 0.5",
        "1.0 with privacy.clip",
    ),
    "privacy with normalised steps": (
        'privacy={"clip":1,"noise":1} federation.client_weighting=uniform federation.normalise_steps=true',
        "federation.normalise_steps: got True",
        "false with privacy.clip: the denominator is fixed; set federation.normalise_steps=false",
    ),
    "normalised steps of AdamW": (
        "federation.normalise_steps=true optimizer.name=adamw",
        "federation.normalise_steps: got True",
        "false with optimizer.name=adamw: FedNova's rule is for SGD; remove it or set optimizer.name=sgd",
    ),
    "momentum over rounds under FedNova": (
        "federation.normalise_steps=true optimizer.name=sgd optimizer.momentum=0.9",
        "method.optimizer_state: got 'keep'",
        "reset with federation.normalise_steps and optimizer.momentum: the paper's buffer begins a round at zero; "
        "set method.optimizer_state=reset",
    ),
    "weight decay under FedNova": (
        "federation.normalise_steps=true optimizer.name=sgd optimizer.weight_decay=0.1",
        "optimizer.weight_decay: got 0.1",
        "0 with federation.normalise_steps, whose rule knows no decay; set optimizer.weight_decay=0",
    ),
    "a pull beyond where the round began": (
        "federation.normalise_steps=true optimizer.name=sgd optimizer.lr=0.5 federation.proximal=2",
        "federation.proximal: got 2.0",
        "less than 2, 1 / optimizer.lr, with federation.normalise_steps; lower it",
    ),
    "noise of nothing": (
        'privacy={"clip":1,"noise":1e-160} federation.client_weighting=uniform',
        "privacy.noise: got 1e-160",
        "1e-06 to 1e+06, what the accountant can judge",
    ),
    "budget that no noise keeps": (
        'privacy={"clip":1,"epsilon":1e-9,"delta":1e-12} federation.client_weighting=uniform',
        "privacy.epsilon: got 1e-09",
        "a budget that 3 rounds can keep at privacy.delta=1e-12",
    ),
    "alpha of 0": ("federation.partition.alpha=0", "federation.partition.alpha: got 0", "a number > 0"),
    "more clients than modules": ("federation.clients=9999", "federation.clients: got 9999", "the number of values of"),
    "held out more than all": ("task.test_share=1.5", "task.test_share: got 1.5", "a number > 0 and < 1"),
    "short rows": ("task.max_length=7", "task.max_length: got 7", "an integer >= 8"),
    "neither true nor false": ("task.mask_prompt=maybe", "task.mask_prompt: got 'maybe'", "true or false"),
    "unknown task": ("task.name=tables", "task.name: got 'tables'", "python-docs, medquad, dolly"),
    "table without a path": (
        "task.name=table federation.partition.kind=iid",
        "task.path: got None",
        "a file or hub id",
    ),
    "path without a table": ("task.path=rows.parquet", "task.name: got 'python-docs'", "table where task.path is set"),
    "column of the built-in task": ("federation.partition.column=q", "federation.partition.column: got 'q'", "module"),
    "unknown dtype": ("model.dtype=float16", "model.dtype: got 'float16'", "float32 or bfloat16"),
    "model folder that is missing": ("model.path=./none", "model.path: got './none'", "a model folder"),
    "folder without a model": ("model.path=nothing_in_it", "model.path: got 'nothing_in_it'", "a config.json"),
    "GGUF file that is missing": ("model.path=none.gguf", "model.path: got 'none.gguf'", "a GGUF file that exists"),
    "package that is missing": (
        "model.path=package:none/a.gguf",
        "model.path: got 'package:none/a.gguf'",
        "package none",
    ),
    "random without a type": ("model.random={}", "model.random.type: got None", "model.random.type=llama"),
    "random of another type": ("model.random.type=lama", "model.random.type: got 'lama'", "did you mean llama?"),
    "random with another key": ("model.random.sizes=3", "model.random.sizes: got 3", "a key of LlamaConfig"),
    "heads that do not divide": ("model.random.num_attention_heads=3", "model.random: got {'type'", "fit together"),
    "broken pattern": ("model.targets=(", "model.targets: got '('", "a regular expression"),
    "pattern of nothing": ("model.targets=conv", "model.targets: got 'conv'", "it matches no module; linear layers: "),
    "pattern of norms": (
        "model.targets=norm$",
        "model.targets: got 'norm$'",
        "it matches only model.layers.0.input_la",
    ),
    "text that YAML takes for a number": ("model.targets=5", "model.targets: got 5", "put it in quotes"),
    "more workers than CPUs": ("resources.workers=3", "resources.workers: got 3", "1 to 2 with cpus_per_worker=1 on 2"),
    "a worker above all CPUs": ("resources.cpus_per_worker=4", "resources.cpus_per_worker: got 4.0", "at most 2, the"),
    "a GPU where none is": ("resources.gpus_per_worker=1", "resources.gpus_per_worker: got 1.0", "0, for no GPU is"),
    "no CPU": ("resources.cpus_per_worker=0", "resources.cpus_per_worker: got 0", "a number > 0"),
    "validation rows without any": (
        "evaluation.split=validation",
        "evaluation.split: got 'validation'",
        "task.validation names none, task.validation_share is 0; set a share, e.g. task.validation_share=0.05",
    ),
    "unknown executor": ("resources.executor=fast", "resources.executor: got 'fast'", "pack or reference"),
    "no evaluation": ("evaluation.every=0", "evaluation.every: got 0", "an integer >= 1"),
    "negative checkpoint": ("checkpoint.every=-1", "checkpoint.every: got -1", "an integer >= 0"),
    "no override": ("rank", "override: got 'rank'", "dotted.key=value; e.g. method.rank=8"),
    "override of nothing": ("federation..clients=3", "override: got 'federation..clients=3'", "dotted.key=value"),
    "override below a number": ("seed.x=1", "seed: got 0", "a single value, without keys below it; remove seed.x=1"),
    "override with broken YAML": ("name=[a", "name: got '[a'", "a YAML value"),
}


@pytest.mark.parametrize(("asked", "begins", "contains"), SINGLE.values(), ids=SINGLE.keys())
def test_override(asked: str, begins: str, contains: str, refusal: Refusal) -> None:
    message = refusal(["run", TINY, *asked.split()])
    assert message.startswith(begins)
    assert contains in message
    assert "; allowed: " in message


# The same for a table of 20 rows in two clients.
TABLES = {
    "no such file": ("task.path=none.parquet", "task.path: got 'none.parquet'", "a file that exists (.parquet, .jsonl"),
    "unknown kind of file": ("task.path=rows.doc", "task.path: got 'rows.doc'", "a file ending in .parquet, .jsonl,"),
    "folder without data": ("task.path=nothing_in_it", "task.path: got 'nothing_in_it'", "can be loaded"),
    "broken Parquet": ("task.path=broken.parquet", "task.path: got 'broken.parquet'", "a readable .parquet file"),
    "broken JSON": ("task.path=broken.jsonl", "task.path: got 'broken.jsonl'", "a readable .jsonl file"),
    "break in line 41 of JSON lines": (
        "task.path=broken-41.jsonl",
        "task.path: got",
        "; line 41: Expecting",
    ),
    "list in line 3 of JSON lines": (
        "task.path=list-3.jsonl",
        "task.path: got",
        "; line 3 is not a mapping",
    ),
    "break in line 3 of JSON": ("task.path=broken-3.json", "task.path: got", "Expecting ':' delimiter: line 3 column"),
    "four fields in line 3 of three": (
        "task.path=fields-3.csv",
        "task.path: got",
        "line 3 has 4 fields, the header 3 fields",
    ),
    **{
        f"no UTF-8 in line 2 of {kind}": (
            f"task.path=latin-2.{kind}",
            "task.path: got",
            "; line 2: byte 0xff is not",
        )
        for kind in ("jsonl", "json", "csv")
    },
    # "Q: what 10\nA: " is 15 tokens with bos, "answer 10" 10 with eos.
    "rows beyond a model's positions": (
        f"{GPT2}24",
        "task.max_length: got 48",
        "at most 24: random has positions for 24 tokens, and the longest row has 25; set task.max_length=24",
    ),
    "answers beyond a model's positions": (
        f"{GPT2}25 evaluation.generate_rows=2 evaluation.max_new_tokens=12",
        "evaluation.max_new_tokens: got 12",
        "at most 11: random has positions for 25 tokens, and the longest prompt that is answered has 15; set",
    ),
    "answers of XLM": (
        "model.random={} model.random.type=xlm model.random.emb_dim=32 model.random.n_layers=1 model.random.n_heads=2 "
        "evaluation.generate_rows=2",
        "evaluation.generate_rows: got 2",
        "0 with xlm, which transformers lets generate in another way than it learns; remove it",
    ),
    "record without a list": ("task.path=one_record.json", "task.path: got 'one_record.json'", "one list of records"),
    "table without rows": ("task.path=empty.parquet", "task.path: got 'empty.parquet'", "a table with rows"),
    "header alone": ("task.path=no_rows.csv", "task.path: got 'no_rows.csv'", "a table with rows"),
    "empty file": ("task.path=nothing.csv", "task.path: got 'nothing.csv'", "a readable .csv file"),
    "split of a file": ("task.test=dev", "task.test: got 'dev'", "a split of rows.parquet (train), or a file"),
    "no such answer": ("task.answer=b", "task.answer: got 'b'", "a column of the table: q, a, by, n, same"),
    "no such label": ("task.answer=null task.label=b", "task.label: got 'b'", "a column of the table: q, a, by, n"),
    "answer and label": (
        "task.label=n",
        "task.answer: got 'a'",
        "nothing where task.label is set: an answer is for language modelling, a label for classification; remove one",
    ),
    "neither answer nor label": (
        "task.answer=null",
        "task.answer: got None",
        "a column of the table, here (language modelling) or in task.label (classification); set one of them",
    ),
    "one class": ("task.answer=null task.label=same", "task.label: got 1", "at least 2 classes"),
    "no such column in the prompt": ("task.prompt='{qq}'", "task.prompt: got 'qq'", "a column of the table: q, a, by"),
    "prompt without a column": ("task.prompt=what?", "task.prompt: got 'what?'", "text with {column} in it"),
    "prompt with a loose brace": ("task.prompt='{q'", "task.prompt: got '{q'", "text with {column} in it"),
    "prompt that YAML takes for keys": ("task.prompt={q}", "task.prompt: got {'q': None}", "put it in quotes"),
    "no prompt": ("task.prompt=null", "task.prompt: got None", "a template"),
    "no such column to divide by": (
        "federation.partition.column=c",
        "federation.partition.column: got 'c'",
        "q, a, by",
    ),
    "no column to divide by": ("federation.partition.column=null", "federation.partition.column: got None", "a column"),
    "more clients than values": ("federation.clients=3", "federation.clients: got 3", "1 to 2, the number of values"),
    # round(20 * 0.1) = 2 rows are held out
    "more clients than rows": (
        "federation.clients=19 federation.partition.kind=iid",
        "federation.clients: got 19",
        "1 to 18, the number of training rows",
    ),
    "client without rows": (
        "task.max_rows=3 task.test_share=0.4 task.seed=1",
        "federation.clients: got 2",
        "at least one row for every client",
    ),
    "more rows a client than there are": (
        'federation.partition={"kind":"resample","rows_per_client":19} federation.clients=50',
        "federation.partition.rows_per_client: got 19",
        "1 to 18, the number of training rows",
    ),
    "nothing held out": (
        "task.test_share=0.001",
        "task.test_share: got 0.001",
        "holds out at least one of the 20 rows",
    ),
    "early stopping of answers by classes": (
        "evaluation.split=validation task.validation_share=0.2 early_stopping.metric=macro_f1",
        "early_stopping.metric: got 'macro_f1'",
        "a score of language modelling: held_out_loss, token_accuracy, perplexity; set one of these",
    ),
    "early stopping of classes by tokens": (
        "task.answer=null task.label=n evaluation.split=validation task.validation_share=0.2 "
        "early_stopping.metric=perplexity",
        "early_stopping.metric: got 'perplexity'",
        "a score of a classification: held_out_loss, accuracy, macro_f1, matthews; set one of these",
    ),
    "early stopping of numbers by classes": (
        "task.answer=null task.label=x evaluation.split=validation task.validation_share=0.2 "
        "early_stopping.metric=accuracy",
        "early_stopping.metric: got 'accuracy'",
        "a score of a regression: held_out_loss, pearson, spearman, mean_absolute_error; set one of these",
    ),
    "fractions as classes": (
        "task.answer=null task.label=x task.problem=classification",
        "task.label: got 'x'; allowed: a column of text, whole numbers, true or false with task.problem=classification",
        "row 2 of rows.parquet holds the number 0.25; correct it, or set task.problem=regression",
    ),
    "words as numbers": (
        "task.answer=null task.label=by task.problem=regression",
        "task.label: got 'by'; allowed: a column of finite numbers with task.problem=regression",
        "row 1 of rows.parquet holds 'x'; correct it, or set task.problem=classification",
    ),
    "words as lists of labels": (
        "task.answer=null task.label=by task.problem=multi-label",
        "task.label: got 'by'; allowed: a column of lists of labels",
        "holds 'x'; correct it, or set task.problem=classification",
    ),
    "labels in columns that are not 0 and 1": (
        "task.answer=null task.label=[n,by]",
        "task.label: got 'by'; allowed: columns of 0 and 1, or true and false, one for each label",
        "row 1 of rows.parquet holds 'x'",
    ),
    "labels in columns that are not there": (
        "task.answer=null task.label=[n,toxic]",
        "task.label: got 'toxic'",
        "a column of the table: q, a, by, n",
    ),
    "columns of labels as classes": (
        "task.answer=null task.label=[n,n2] task.problem=classification",
        "task.problem: got 'classification'",
        "multi-label where task.label has several columns",
    ),
    "problem of answers": (
        "task.problem=regression",
        "task.problem: got 'regression'; allowed: nothing where the task has no label",
        "remove it",
    ),
    "numbers beside words": (
        "task.path=mixed.jsonl task.answer=null task.label=x",
        "task.label: got 'x'; allowed: one kind of labels",
        "row 1 of mixed.jsonl holds the number 0.5, row 2 of mixed.jsonl 'high'; correct the column",
    ),
    "pair with one column": (
        'task.answer=null task.label=n task.prompt=["{q}"]',
        "task.prompt: got ['{q}']",
        "text, or a list of 2, each text, or null; change task.prompt",
    ),
    "pair with an answer": (
        'task.prompt=["{q}","{by}"]',
        "task.prompt: got ['{q}', '{by}']",
        "one template where task.answer is set: pairs of texts are classified",
    ),
    "pair that names its label": (
        'task.answer=null task.label=n task.prompt=["{q}","{n}"]',
        "task.prompt: got '{n}'",
        "a template without {n}",
    ),
    "classification without a prompt": (
        "task.path=mixed.jsonl task.answer=null task.label=x task.prompt=null",
        "task.prompt: got None",
        'or a pair of them; set task.prompt=["{premise}","{hypothesis}"]',
    ),
    "answers to classify": (
        "task.answer=null task.label=n evaluation.generate_rows=4",
        "evaluation.generate_rows: got 4",
        "0 for a classification task",
    ),
    "answers to classify, before anything is read": (
        "task.path=none.parquet task.answer=null task.label=n evaluation.generate_rows=4",
        "evaluation.generate_rows: got 4",
        "0 for a classification task",
    ),
    "texts in place of chats": (
        "task.prompt=null task.answer=null task.messages=q",
        "task.messages: got 'q'; allowed: lists of {role, content} or {from, value}",
        "; row 1 of rows.parquet: the text is no JSON list of messages",
    ),
    "chats with an answer's column": (
        "task.prompt=null task.messages=q",
        "task.answer: got 'a'",
        "nothing where task.messages is set; remove task.answer",
    ),
    "plain text with a prompt": (
        "task.answer=null task.text=q",
        "task.prompt: got '{q}'",
        "nothing where task.text is set; remove task.prompt",
    ),
    "answers to plain text, before anything is read": (
        "task.path=none.parquet task.prompt=null task.answer=null task.text=q evaluation.generate_rows=2",
        "evaluation.generate_rows: got 2",
        "0 for plain text, which asks nothing",
    ),
    "images for a language model, before anything is read": (
        "task.path=none.parquet task.prompt=null task.answer=null task.label=n task.image=q",
        "model.random.type: got 'llama'",
        "an architecture that transformers has for image-classification; llama is not one",
    ),
}


@pytest.mark.parametrize(("asked", "begins", "contains"), TABLES.values(), ids=TABLES.keys())
def test_table(asked: str, begins: str, contains: str, refusal: Refusal) -> None:
    message = refusal(["run", TINY, *TABLE, *asked.split()])
    assert message.startswith(begins)
    assert contains in message


# Whole command lines.
FILES = {"run": TINY, "sweep": "sweep.yaml", "study": "study.yaml"}
COMMANDS = {
    "config that is missing": ("run none.yaml", "CONFIG: got 'none.yaml'", "a YAML file that exists"),
    "config that is a folder": ("run full", "CONFIG: got 'full'", "a YAML file that exists"),
    "broken YAML": ("run broken.yaml", "CONFIG: got 'broken.yaml'", "line 2, column 5"),
    "no UTF-8": ("run latin.yaml", "CONFIG: got 'latin.yaml'", "a readable file of valid YAML"),
    "YAML list": ("run list.yaml", "CONFIG: got 'list.yaml'", "a YAML mapping of keys to values"),
    "empty YAML": ("run empty.yaml", "CONFIG: got 'empty.yaml'", "a YAML mapping of keys to values"),
    "key twice": ("run repeated.yaml", "CONFIG: got 'repeated.yaml'", "federation stands again in line 3"),
    "rounds and epochs": ("run both.yaml", "federation.rounds: got 3", "one of rounds and epochs, not both"),
    "pool with the default clients": ("run pool.yaml", "federation.clients: got 8", "1 with partition.kind=pool"),
    "number as a key": ("run numbers.yaml", "federation.2: got 2", "these keys here"),
    "number as a name": ("run number.yaml", "name: got 20240101", "put it in quotes"),
    "folder that holds a run": (f"run {TINY} --out a_run", "--out: got 'a_run'", "a folder without a run in it"),
    "folder that holds a sweep, which no run goes on with": (
        f"run {TINY} --out a_sweep --resume",
        "--out: got 'a_sweep'",
        "a folder without a run in it; choose another\n",
    ),
    "folder that is a file": (f"run {TINY} --out rows.doc", "--out: got 'rows.doc'", "a folder"),
    "folder in a file": (f"run {TINY} --out rows.doc/run", "--out: got 'rows.doc/run'", "a folder that can be made"),
    "picture of another kind, first of all": (
        "data none.yaml --out x.gif",
        "--out: got 'x.gif'",
        "a file ending in .png, .svg or .pdf; e.g. --out partition.png",
    ),
    "partition of images for a language model": (
        f"data {TINY} task.name=brain-tumor task.path=none.parquet",
        "model.random.type: got 'llama'",
        "llama is not one",
    ),
    "partition of answers to classify": (
        f"data {TINY} task.name=brain-tumor task.path=none.parquet evaluation.generate_rows=4",
        "evaluation.generate_rows: got 4",
        "0 for a classification task",
    ),
    "export of no run": ("export full --to new", "RUN: got 'full'", "the folder of a finished run"),
    "export of an open run": ("export a_run --to new", "RUN: got 'a_run'", "the folder of a finished run"),
    "export of nothing": ("export none --to new", "RUN: got 'none'", "the folder of a finished run"),
    "export to nowhere": ("export a_run", "Missing option '--to'", "see rayfed-sub --help"),
    "export as something else": (
        "export a_run --to new --format petf",
        "--format: got 'petf'; allowed: hf, peft, state-dict or flower",
        "peft?",
    ),
    "no config": ("run", "Missing argument 'CONFIG.yaml'", "see rayfed-sub --help"),
    "unknown option": (f"run {TINY} --colour", "No such option: --colour", "see rayfed-sub --help"),
    "unknown command": ("ruin", "No such command 'ruin'", "see rayfed-sub --help"),
    "unknown list": ("list foo", "WHAT: got 'foo'; allowed: methods, choices, hooks, tasks or models", "models\n"),
    "misspelt list": (
        "list tsaks",
        "WHAT: got 'tsaks'; allowed: methods, choices, hooks, tasks or models",
        "; did you mean tasks?",
    ),
    **{
        f"{command} of a {kind}": (
            f"{command} {FILES[kind]}",
            f"CONFIG: got '{FILES[kind]}'; allowed: {allowed}; this is ",
            f": use rayfed-sub {kind} {FILES[kind]}\n",
        )
        for command, kinds, allowed in (
            ("run", ("sweep", "study"), "the configuration of a run"),
            ("plan", ("sweep", "study"), "the configuration of a run"),
            ("data", ("sweep", "study"), "the configuration of a run"),
            ("sweep", ("run", "study"), "a configuration with a section `sweep`"),
            ("study", ("run", "sweep"), "a study, with a claim and variants"),
        )
        for kind in kinds
    },
}


@pytest.mark.parametrize(("asked", "begins", "contains"), COMMANDS.values(), ids=COMMANDS.keys())
def test_command(asked: str, begins: str, contains: str, refusal: Refusal) -> None:
    message = refusal(asked.split())
    assert message.startswith(begins)
    assert contains in message


@pytest.mark.parametrize(
    "words",
    [
        "list methods {}",
        "export a_run more {} --to x",
        "{}",
        "list {}",
        "run x.yaml --out{}",
        "data x.yaml --{}",
    ],
)
@pytest.mark.parametrize("uri", ["s3://AKIA:hush@bucket/run", "s3://bucket/run?secret_key=hush"])
def test_unknown_argument_is_shown_without_credentials(words: str, uri: str, refusal: Refusal) -> None:
    message = refusal(words.format(uri).split())
    assert "hush" not in message
    assert "s3://bucket/run" in message or "No such option" in message


@pytest.mark.parametrize("to", ["full", "rows.doc", "rows.doc/new"])
def test_export_to_an_invalid_destination(to: str, refusal: Refusal, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("name: done\n", encoding="utf-8")
    (tmp_path / "summary.json").write_text("{}", encoding="utf-8")
    message = refusal(["export", str(tmp_path), "--to", to])
    assert message.startswith(f"--to: got '{to}'; allowed: a ")


def test_rows_that_fit_are_accepted_with_a_longer_max_length(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """15 + 10 tokens in 25 positions; after a prompt of 15, generation reads all but the last of 11 tokens."""
    from rayfed_sub.planning.job import prepare

    monkeypatch.chdir(files)
    fits = f"{GPT2}25 evaluation.generate_rows=2 evaluation.max_new_tokens=11"
    job = prepare(load_config(TINY, [*TABLE, *fits.split()]))
    assert (job.architecture.positions, job.config.task.max_length) == (25, 48)


# Values that are no address of a cluster, and the end of the line.
ADDRESSES = {
    "a port that is closed": ("127.0.0.1:1", "Connection refused"),
    "a host that is nowhere": ("nowhere.invalid:6379", "nothing answers at nowhere.invalid:6379: "),
    "no port": ("nonsense", "Invalid address format: nonsense"),
    "no host": (":6379", "no host is named before the port"),
    "no host in brackets": ("[]:6379", "no host is named before the port"),
    "a port beyond all": ("127.0.0.1:99999", "99999 is no port"),
    "Ray's client": ("ray://127.0.0.1:10001", "run this on a node of the cluster, e.g. by ray job submit"),
}


@pytest.mark.parametrize(("address", "ends"), ADDRESSES.values(), ids=ADDRESSES.keys())
def test_no_cluster_at_the_address(address: str, ends: str, refusal: Refusal) -> None:
    began = time.monotonic()
    message = refusal(["run", TINY, "--address", address])
    assert message.startswith(f"--address: got '{address}'; allowed: auto, or HOST:PORT of a Ray cluster")
    assert ends in message
    assert time.monotonic() - began < 10


def test_other_server_at_the_address(refusal: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    """A listener that never answers."""
    monkeypatch.setattr("rayfed_sub.runtime.cluster._GCS_SECONDS", 1.0)
    with socket.create_server(("0.0.0.0", 0)) as listener:
        message = refusal(["run", TINY, "--address", f"127.0.0.1:{listener.getsockname()[1]}"])
    assert "is not the head of a Ray cluster" in message


def outcome(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "rayfed_sub.cli.main", *arguments],
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "begins"),
    [
        (["run", TINY, "optimizer.lr=-1"], "optimizer.lr: got -1"),
        (["run", TINY, "--colour"], "No such option"),
        pytest.param(
            ["run", TINY, "model.path=nobody/nothing"],
            "model.path: got 'nobody/nothing'",
            marks=pytest.mark.slow,  # a Ray comes up beside it
        ),
    ],
    ids=["wrong value", "wrong option", "hub id without a network"],
)
def test_refusal_in_a_separate_process(arguments: list[str], begins: str, files: Path) -> None:
    done = outcome(*arguments, folder=files)
    assert done.returncode == 2
    assert done.stderr.startswith(f"rayfed-sub: {begins}")
    assert done.stderr.count("\n") == 1


def test_success_in_a_separate_process(files: Path) -> None:
    done = outcome("list", "tasks", "--json", folder=files)
    assert (done.returncode, done.stderr) == (0, "")
    names = [row["name"] for row in json.loads(done.stdout)]
    assert names == ["python-docs", "medquad", "dolly-15k", "brain-tumor", "table"]


def test_unknown_picture_format_is_refused_at_once() -> None:
    code = "import sys; from rayfed_sub.cli.main import _code; code = _code(); print(*sys.modules); sys.exit(code)"
    arguments = [sys.executable, "-c", code, "data", TINY, "--out", "x.gif"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert (
        set(done.stdout.split()) & {"matplotlib", "numpy", "torch", "transformers", "rayfed_sub.planning.plan"} == set()
    )


# --- classes that only a run's folder names


@pytest.fixture
def strange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run's folder with a sweep's in it, whose method is a class of a module that shows in `sys.modules` once
    imported."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "noticed_module.py").write_text("class Noticed: ...\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    monkeypatch.delitem(sys.modules, "noticed_module", raising=False)
    folder = write_run(tmp_path / "strange", rounds=2)
    configured = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    configured["method"] = {"name": "noticed_module:Noticed"}
    (folder / "config.yaml").write_text(yaml.safe_dump(configured), encoding="utf-8")
    grid = {"method.name": {"grid": ["fedit", "noticed_module:Noticed"]}}
    sweep = {"name": "s", "sweep": {"space": grid}}
    (folder / "sweep.yaml").write_text(yaml.safe_dump(sweep), encoding="utf-8")
    return folder


def imported() -> bool:
    return "noticed_module" in sys.modules


def test_reading_a_run_folder_imports_nothing(
    strange: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`report` shows the name that it does not import; `data` needs no method."""
    rows = TINY_ROWS.format(strange.parent / "rows.csv")
    (strange.parent / "rows.csv").write_text("q,a\n" + "".join(f"{i},{i}\n" for i in range(200)), encoding="utf-8")
    for words in (["report", str(strange)], ["list", "methods"], ["data", f"{strange}/config.yaml", *rows.split()]):
        monkeypatch.setattr(sys, "argv", ["rayfed-sub", *words])
        with pytest.raises(SystemExit) as ended:
            main.main()
        assert (ended.value.code, imported()) == (0, False), capsys.readouterr().err
    assert "noticed_module:Noticed" in (strange / "report.html").read_text(encoding="utf-8")


TINY_ROWS = (
    "task.name=table task.path={} task.prompt='{{q}}' task.answer=a model.path=random model.random.type=llama "
    "federation.partition.kind=iid"
)


@pytest.mark.parametrize(
    ("asked", "add"),
    [
        ("plan {}/config.yaml", "method.name=noticed_module:Noticed"),
        ("run {}/config.yaml", "method.name=noticed_module:Noticed"),
        ("run {0}/config.yaml --out {0} --resume", "method.name=noticed_module:Noticed"),
        ("sweep {0}/sweep.yaml --out {0} --resume", "method.name=noticed_module:Noticed"),
        ("export {} --to new", "--method noticed_module:Noticed"),
        ("export {} --to new --format peft", "--method noticed_module:Noticed"),
    ],
)
def test_class_named_only_by_a_folder_is_not_imported(asked: str, add: str, strange: Path, refusal: Refusal) -> None:
    message = refusal(asked.format(strange).split())
    assert message.startswith(
        "method.name: got 'noticed_module:Noticed'; allowed: a method of `rayfed-sub list methods`"
    )
    assert f"if you trust that module, add {add}" in message
    assert not imported()
    message = refusal([*asked.format(strange).split(), *add.split()])  # as the message advises; this class is no method
    assert "a dataclass with a method's functions" in message
    assert imported()


@pytest.mark.parametrize("asked", ["run {0}/config.yaml --out {0} --resume", "sweep {0}/sweep.yaml --out {0} --resume"])
def test_hook_named_only_by_a_folder_is_not_imported(asked: str, strange: Path, refusal: Refusal) -> None:
    tree = {"method": {"name": "fedit"}, "hook": {"name": "noticed_module:Noticed"}}
    (strange / "config.yaml").write_text(yaml.safe_dump({"name": "s", **tree}), encoding="utf-8")
    space = {"sweep": {"space": {"seed": {"grid": [1, 2]}}}}
    (strange / "sweep.yaml").write_text(yaml.safe_dump({"name": "s", **tree, **space}), encoding="utf-8")
    message = refusal(asked.format(strange).split())
    assert message.startswith("hook.name: got 'noticed_module:Noticed'; allowed: a hook of `rayfed-sub list hooks`")
    assert "if you trust that module, add hook.name=noticed_module:Noticed" in message
    assert not imported()
    message = refusal([*asked.format(strange).split(), "hook.name=noticed_module:Noticed"])
    assert "a dataclass with a hook's functions" in message
    assert imported()


def test_hooks_of_a_sweep_s_space_are_not_imported_either(strange: Path, refusal: Refusal) -> None:
    grid = {"space": {"hook.name": {"grid": ["scaffold", "noticed_module:Noticed"]}}}
    tree = {"name": "s", "method": {"name": "fedit"}, "sweep": grid}
    (strange / "sweep.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    message = refusal(f"sweep {strange}/sweep.yaml --out {strange} --resume".split())
    assert message.startswith("hook.name: got 'noticed_module:Noticed'; allowed: a hook of")
    assert not imported()


def test_class_named_by_the_caller_s_own_file_is_imported(strange: Path, tmp_path: Path, refusal: Refusal) -> None:
    (tmp_path / "own.yaml").write_bytes((strange / "config.yaml").read_bytes())
    assert "a dataclass with a method's functions" in refusal(["run", str(tmp_path / "own.yaml")])
    assert imported()


RUN_OR_SWEEP = [
    ("log.jsonl", "summary.json"),
    ("checkpoints/manifest-000003.json",),
    ("trials.parquet", "best.yaml"),
    ("sweep.yaml", "data.json"),
]
ANYBODY_S = [("checkpoints/model.pt",), ("trials/notes.md",), ("log.jsonl",), ("data.json", "summary.json")]


def leave(folder: Path, names: Sequence[str]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}", encoding="utf-8")


@pytest.mark.parametrize("names", ANYBODY_S, ids=" ".join)
def test_folder_without_run_files_counts_as_the_caller_s_own(
    names: Sequence[str], strange: Path, tmp_path: Path, refusal: Refusal
) -> None:
    (tmp_path / "own.yaml").write_bytes((strange / "config.yaml").read_bytes())
    leave(tmp_path, names)
    assert "a dataclass with a method's functions" in refusal(["run", str(tmp_path / "own.yaml")])
    assert imported()


@pytest.mark.parametrize("names", RUN_OR_SWEEP, ids=" ".join)
def test_run_and_sweep_folders_are_recognised_by_their_files(
    names: Sequence[str], strange: Path, tmp_path: Path, refusal: Refusal
) -> None:
    (tmp_path / "left.yaml").write_bytes((strange / "config.yaml").read_bytes())
    leave(tmp_path, names)
    assert "if you trust that module" in refusal(["run", str(tmp_path / "left.yaml")])
    assert not imported()


def test_run_that_has_just_begun_is_recognised_by_its_log(strange: Path, tmp_path: Path, refusal: Refusal) -> None:
    (tmp_path / "config.yaml").write_bytes((strange / "config.yaml").read_bytes())
    with (strange / "log.jsonl").open(encoding="utf-8") as log:
        (tmp_path / "log.jsonl").write_text(log.readline(), encoding="utf-8")
    assert "if you trust that module" in refusal(["run", str(tmp_path / "config.yaml")])
    assert not imported()


@pytest.mark.parametrize("slashes", ["/", "//", "///"])
def test_file_in_an_object_store_is_recognised_with_extra_slashes(
    slashes: str, strange: Path, refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store, here a folder, gives the file alone, without the files beside it."""
    own = strange.parent / "own.yaml"
    own.write_bytes((strange / "config.yaml").read_bytes())
    monkeypatch.setattr("rayfed_sub.storage.remote.local_copy", lambda place, field: nullcontext(own))
    assert "if you trust that module" in refusal(["run", f"s3:{slashes}bucket/run/config.yaml"])
    assert not imported()


@pytest.mark.parametrize(
    ("own", "space", "refused"),
    [
        ({}, {"seed": [1, 2]}, True),
        ({"method": {"rank": 2}}, {"seed": [1, 2]}, True),
        ({"method": {"name": "fedavg"}}, {"seed": [1, 2]}, False),
        ({"method": {"name": "noticed_module:Noticed"}}, {"seed": [1, 2]}, False),  # the caller's own file names it
        ({}, {"method.name": ["fedit", "fedavg"]}, False),
    ],
)
def test_class_named_only_by_the_base_of_a_sweep_is_not_imported(
    own: dict[str, object], space: dict[str, object], refused: bool, strange: Path, tmp_path: Path, refusal: Refusal
) -> None:
    file = tmp_path / "own.yaml"
    section = {"space": {key: {"grid": values} for key, values in space.items()}, "trials": 1}
    file.write_text(yaml.safe_dump({"base": "strange/config.yaml", **own, "sweep": section}), encoding="utf-8")
    message = refusal(["sweep", str(file), "--out", str(strange)])  # the folder of another run
    place = f"for what {tmp_path / 'strange' / 'config.yaml'} names is not imported unless you name it too"
    assert (place in message) == refused
    assert imported() == (own == {"method": {"name": "noticed_module:Noticed"}})
    if refused:
        message = refusal(["sweep", str(file), "method.name=noticed_module:Noticed"])
        assert "if you trust that module" not in message


@pytest.mark.parametrize("asked", ["plan {}/config.yaml", "run {0}/config.yaml --out {0} --resume"])
def test_metric_named_only_by_a_folder_is_not_loaded(asked: str, tmp_path: Path, refusal: Refusal) -> None:
    """The refusal names the metric; if the caller names it too, the error is its missing file."""
    tree = {
        **yaml.safe_load(Path(TINY).read_text(encoding="utf-8")),
        "evaluation": {"metrics": [f"{tmp_path}/mine.py"]},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    leave(tmp_path, ["log.jsonl", "summary.json"])
    message = refusal(asked.format(tmp_path).split())
    assert message.startswith(f"evaluation.metrics: got '{tmp_path}/mine.py'; allowed: nothing, for what ")
    add = f"evaluation.metrics=[{tmp_path}/mine.py]"
    assert f"if you trust it, add '{add}', or evaluation.metrics=[] to go without" in message
    if asked.startswith("plan"):
        message = refusal([*asked.format(tmp_path).split(), add, "evaluation.generate_rows=2"])
        assert "allowed: ids of `evaluate.load`, or paths of files with an evaluate.Metric" in message


@pytest.mark.parametrize("asked", ["plan {}/config.yaml", "run {0}/config.yaml --out {0} --resume"])
def test_callback_named_only_by_a_folder_is_not_imported(
    asked: str, strange: Path, tmp_path: Path, refusal: Refusal
) -> None:
    """Named by the caller too, it is imported by what runs it."""
    tree = {**yaml.safe_load(Path(TINY).read_text(encoding="utf-8")), "callbacks": ["noticed_module:noticed"]}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    leave(tmp_path, ["log.jsonl", "summary.json"])
    message = refusal(asked.format(tmp_path).split())
    assert message.startswith("callbacks: got 'noticed_module:noticed'; allowed: nothing, for what ")
    assert not imported()
    add = "callbacks=[noticed_module:noticed]"
    assert f"if you trust it, add '{add}', or callbacks=[] to go without" in message
    if asked.startswith("run"):
        message = refusal([*asked.format(tmp_path).split(), add])
        assert message.startswith("callbacks: got 'noticed_module:noticed'; allowed: package.module:name of a function")
        assert imported()


def test_export_with_another_method_is_refused(strange: Path, refusal: Refusal) -> None:
    message = refusal(["export", str(strange), "--to", "new", "--method", "fedit"])
    assert message.startswith("--method: got 'fedit'; allowed: noticed_module:Noticed, the run's own")
    assert not imported()


@pytest.mark.parametrize("left", ["tune", "trials"])
@pytest.mark.parametrize("resume", [[], ["--resume"]], ids=["anew", "resumed"])
def test_files_of_another_sweep_are_not_read(left: str, resume: list[str], tmp_path: Path, refusal: Refusal) -> None:
    """Ray Tune would unpickle its files; without a sweep.yaml there is nothing to resume."""
    (tmp_path / "out" / left / "00000").mkdir(parents=True)
    (tmp_path / "sweep.yaml").write_text(f"base: {TINY}\nsweep: {{space: {{method.rank: {{grid: [1, 2]}}}}}}\n")
    message = refusal(["sweep", str(tmp_path / "sweep.yaml"), "--out", str(tmp_path / "out"), *resume])
    assert message.splitlines()[-1].startswith(
        f"--out: got '{tmp_path / 'out'}'; allowed: a folder without {left}/, which"
    )
