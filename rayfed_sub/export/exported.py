"""The trained model of a finished run, written for other tools: whole for transformers, or its change for peft."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from rayfed_sub.config.schema import GIVEN, Config
from rayfed_sub.core.errors import UserError, unknown_word
from rayfed_sub.core.types import Change, ModelShape, ServerState
from rayfed_sub.data.processors import Processor
from rayfed_sub.diagnostics.server_change import change_rank
from rayfed_sub.export.peft_adapter import Factors, Settings, Stacked, stacked, taken_for_experts, write_adapter
from rayfed_sub.methods import build, check_named
from rayfed_sub.methods.protocol import Method
from rayfed_sub.models.architecture import AUTO_CLASSES, Architecture, loading_class, skeleton
from rayfed_sub.models.architecture import architecture as architecture_of
from rayfed_sub.models.experts import experts_of
from rayfed_sub.models.hub import RANDOM, locate
from rayfed_sub.models.image_processors import HubImageProcessor
from rayfed_sub.models.model_folder import generation_config, write_codec, write_companions, write_folder
from rayfed_sub.models.quantisation import bitsandbytes_config
from rayfed_sub.models.start import StartFrom, applied, changed_weights, fitted, merged
from rayfed_sub.models.text_to_text import LANGUAGE
from rayfed_sub.models.tokenizers import HubTokenizer
from rayfed_sub.models.weights import dense, load_weights, target_weights, with_targets
from rayfed_sub.planning.job import model_kind, prepare, processor_of
from rayfed_sub.storage import checkpoints
from rayfed_sub.storage.earlier_runs import read_start
from rayfed_sub.storage.kept_models import kept
from rayfed_sub.storage.landings import landed
from rayfed_sub.storage.run_folder import finished, make
from rayfed_sub.storage.same_run import check_start, class_names, problem_of

BEST, LAST = "best", "last"
CHECKPOINTS = (LAST, BEST)
"""Checkpoints that can be exported."""


@dataclass(frozen=True)
class Export:
    """A written export.  loading: a line of Python
    that works in the exported folder wherever that lies."""

    loading: str
    warning: str | None = None


@dataclass(frozen=True, eq=False)
class Setup:
    """What a finished run trained: the model without its weights, by which method, under which configuration, from
    which start."""

    config: Config
    method: Method
    architecture: Architecture
    processor: Processor
    start: StartFrom | None = None


@dataclass(frozen=True, eq=False)
class _Trained:
    """A finished run's result.  tensors: the pretrained model by dotted name, what was quantised dense; begun: the
    same with what the run began from; weights: of that `<target>/weight` (m, n); changes: per target, relative to
    those; head: `<layer>/weight` and `<layer>/bias` as trained."""

    job: Setup
    tensors: Mapping[str, Tensor]
    begun: Mapping[str, Tensor]
    weights: Mapping[str, Tensor]
    changes: Mapping[str, Change]
    head: Mapping[str, Tensor]


def export_hf(
    run_dir: Path, to: Path, client: int | None = None, method: str | None = None, checkpoint: str = LAST
) -> Export:
    """Writes a folder that transformers' from_pretrained loads, with the run's target weights merged in, as float32.

    client: whose model to write, for methods with a model per client.  method: the run's method where it is not
    of this package, as `package.module:Class`; a class that only the folder names is not imported.  checkpoint: last,
    or best where the run has kept one (early_stopping.metric).
    Raises UserError where run_dir holds no finished run or no such checkpoint, `to` is not empty, or `client` does not
    fit the method.
    """
    trained = _read(run_dir, to, client, method, checkpoint, "hf")
    architecture, job = trained.job.architecture, trained.job
    merged = {f"{t.name}/weight": _changed(trained, t.name) for t in architecture.shape.targets}
    everything, generation = (
        merged | dict(trained.head),
        generation_config(job.config.model, architecture, job.processor),
    )
    write_folder(architecture, trained.begun, everything, to, job.processor, torch.float32, generation)
    write_companions(job.config.model, architecture, to)
    auto = loading_class(architecture)
    loading = f'from transformers import {auto}; model = {auto}.from_pretrained(".")  # in the exported folder'
    _write_readme(to, job, loading, {"pretrained": "."})
    return Export(loading)


def export_peft(
    run_dir: Path, to: Path, client: int | None = None, method: str | None = None, checkpoint: str = LAST
) -> Export:
    """Writes a LoRA adapter that peft's PeftModel.from_pretrained loads: the change of every target, and the head.

    Low-rank terms are written as they are, several of a layer side by side, their scale and core in B; those of experts
    as `target_parameters`.  The change of a dense weight is written at its numerical rank.  What the run began from is
    part of the adapter: its factors stand beside the trained ones, those of layers that were no targets too, so that
    base and adapter together are the trained model.  The base, a causal language model, is loaded by its name where
    that is a folder or hub id; any other, which transformers could not load by a name, and one that is quantised there
    or in the run, is written to `to`/base in its own dtype.  Tokenizer, chat template and generation configuration of
    the training are written beside the adapter, also where the base has others.
    Raises UserError as `export_hf`, and on `--format` where dense weights changed by so high a rank that an adapter
    would be no smaller than they are, or where peft has no adapter for the model's experts.
    """
    trained = _read(run_dir, to, client, method, checkpoint, "peft")
    factors, ranks = _factors(trained)
    job, architecture = trained.job, trained.job.architecture
    module = skeleton(architecture)
    names = {name for one in experts_of(module).values() for matrix in one.matrices for name in matrix.names}
    experts, linear = stacked(module, factors), {n: f for n, f in factors.items() if n not in names}
    if experts is None:
        allowed = "hf, for peft has no adapter for each of the experts of such models"
        raise UserError("--format", "peft", allowed, "use --format hf")
    for taken in taken_for_experts(linear, architecture.hf_config.model_type):
        left, right = linear.pop(taken)
        experts[f"{taken}.weight"] = Stacked(taken, len(right), right, left)
    generation = generation_config(job.config.model, architecture, job.processor)
    name = loadable(job.config.model.path, architecture.kind)
    if name is not None and (architecture.quantised or bitsandbytes_config(job.config.model) is not None):
        name = None  # by its name transformers loads it as it is quantised, which computes otherwise
    if name is None:
        write_folder(architecture, trained.tensors, {}, to / "base", job.processor, generation=generation)
    base, turned = name or str((to / "base").resolve()), bool(architecture.transposed - names)
    asked = job.config.method
    settings = Settings(bool(asked.get("use_rslora", False)), float(asked.get("dropout", 0.0)))
    kind = architecture.kind
    write_adapter(to, linear, trained.head, experts, kind=kind, base=base, transposed=turned, settings=settings)
    write_codec(job.processor, to)
    write_companions(job.config.model, architecture, to)
    if generation is not None:
        generation.save_pretrained(to)
    loading = _loading_peft(job, name)
    _write_readme(to, job, loading, {"pretrained": name or "base", "peft": ".", "tokenizer": "."})
    if not ranks:
        return Export(loading)
    span = f"{min(ranks)} to {max(ranks)}" if len(set(ranks)) > 1 else f"{ranks[0]}"
    return Export(loading, f"the change of dense weights is written at its numerical rank, {span} a layer")


def _loading_peft(job: Setup, name: str | None) -> str:
    """A line of Python that loads the adapter in its folder; name: the base's, None where it lies in `base`.

    The base gets the values that the run began with, in the run's dtype, and computes in float32, as an exported whole
    model does.
    """
    auto, dtype = loading_class(job.architecture), job.config.model.dtype
    generation = name is not None and job.architecture.kind in LANGUAGE
    imports = f"{auto}, GenerationConfig" if generation else auto
    ends = ', generation_config=GenerationConfig.from_pretrained(".")' if generation else ""
    if name is not None:
        ends += "".join(f", {key}=True" for key in job.architecture.causal)
    wide = "" if dtype == "float32" else ".float()"
    base = f"{auto}.from_pretrained({name or 'base'!r}, dtype={dtype!r}{ends}){wide}"
    loaded = f'model = PeftModel.from_pretrained({base}, ".")'
    return f"from peft import PeftModel; from transformers import {imports}; {loaded}  # in the exported folder"


def _write_readme(to: Path, job: Setup, loading: str, model: Mapping[str, str]) -> None:
    """README.md of an export: the lines of Python that load it and make its inputs as the run did, and the command that
    evaluates it.  model: arguments of lm-evaluation-harness that load it."""
    config = job.config
    began = "" if job.start is None else f", from `{job.start.place}` on, which it holds"
    about = f"`{config.model.path}` trained by rayfed_sub with `{config.method['name']}`, run `{config.name}`{began}."
    inputs = "\n".join(_inputs(job))
    text = f"# {config.name}\n\n{about}\n\nLoad it, in this folder:\n\n```python\n{loading}\n```\n"
    text += f"\nMake its inputs as in training:\n\n```python\n{inputs}\n```\n"
    if job.architecture.kind in LANGUAGE:
        ends = ", ".join(map(str, job.processor.ends))
        text += f"\nAnswers end with token {job.processor.eos}; generation stops at {ends}.\n"
    if (command := evaluation_command(job, model)) is not None:
        text += "\nEvaluate it with lm-evaluation-harness (`pip install lm-eval[hf]`), in this folder:\n"
        text += f"\n```sh\n{command}\n```\n"
        tokens = job.architecture.hf_config.get_text_config().vocab_size
        if "peft" in model and isinstance(job.processor, HubTokenizer) and job.processor.vocabulary != tokens:
            text += (
                f"\nIt cuts an adapter's base to the tokenizer's {job.processor.vocabulary:,} of {tokens:,} tokens, "
            )
            text += "among which its likelihoods are then shared; `--format hf` keeps all.\n"
    (to / "README.md").write_text(text, encoding="utf-8")


def evaluation_command(job: Setup, model: Mapping[str, str]) -> str | None:
    """The command of lm-evaluation-harness, in the exported folder, for a task of the caller's choice (TASK).

    None where it cannot load the model: it takes causal language models with a tokenizer, and reads no argument with a
    comma or an equals sign in it.  model: the arguments that name it."""
    if job.architecture.kind != "causal-lm" or not isinstance(job.processor, HubTokenizer):
        return None
    if loading_class(job.architecture) != AUTO_CLASSES["causal-lm"]:
        return None
    if any("," in value or "=" in value for value in model.values()):
        return None
    given = ",".join(f"{name}={value}" for name, value in {**model, "dtype": "float32"}.items())
    chat = ["--apply_chat_template"] if job.processor.chat else []
    return shlex.join(["lm_eval", "--model", "hf", "--model_args", given, *chat, "--tasks", "TASK"])


def _inputs(job: Setup) -> list[str]:
    """Python that makes `ids` of `text`, or `inputs` of `image`, as the run's processor does."""
    processor, answers = job.processor, job.architecture.kind in LANGUAGE
    if isinstance(processor, HubImageProcessor):
        make = 'from transformers import AutoImageProcessor; processor = AutoImageProcessor.from_pretrained(".")'
        return [make, 'inputs = processor(image, return_tensors="pt")']
    if not isinstance(processor, HubTokenizer):
        shown = 'f"Q: {text}\\nA: "' if answers else "text"
        end = "" if answers else f", {processor.eos}"
        if len(job.config.task.prompts) > 1:
            made = "[byte + 3 for byte in {}.encode()]"
            first, second = made.format("first"), made.format("second")
            types = "types = [0] * (len(ids) - len(second.encode()) - 1) + [1] * (len(second.encode()) + 1)"
            return [f"ids = [1, *{first}, {processor.eos}, *{second}, {processor.eos}]", types]
        return [f'ids = [1, *(byte + 3 for byte in {shown}.encode("utf-8", "replace")){end}]']
    make = 'from transformers import AutoTokenizer; tokenizer = AutoTokenizer.from_pretrained(".")'
    if answers and processor.chat:
        chat = '[{"role": "user", "content": text}], add_generation_prompt=True'
        return [make, f'ids = tokenizer.apply_chat_template({chat})["input_ids"]']
    if len(job.config.task.prompts) > 1:
        how = f'truncation="longest_first", max_length={job.config.task.max_length}'
        return [make, f"inputs = tokenizer(first, second, {how})"]
    line = answers and processor.writer is None
    return [make, 'ids = tokenizer(text + "\\n")["input_ids"]' if line else 'ids = tokenizer(text)["input_ids"]']


def export_state(
    run_dir: Path, to: Path, client: int | None = None, method: str | None = None, checkpoint: str = LAST
) -> Export:
    """Writes model.safetensors, the trained state dict of a model that a Python call handed over, for the module's
    `load_state_dict`: trained layers float32, all other tensors as they were.

    Arguments and errors as `export_hf`; raises UserError on `--format` for a model that has a name.
    """
    config = _finished(run_dir, to, method, checkpoint)
    if config.model.path != GIVEN:
        allowed = f"hf or peft, for the run's model is {config.model.path}"
        raise UserError("--format", "state-dict", allowed, "use --format hf")
    make(to, "--to")
    model = kept(run_dir)
    server, changes = _changes(run_dir, build(config.method), model.shape, client, checkpoint)
    weights = target_weights(model.shape, model.transposed, model.tensors)
    trained = {f"{t.name}/weight": changes[t.name].apply(weights[f"{t.name}/weight"]) for t in model.shape.targets}
    trained |= {name: server.tensors[name] for name in model.shape.head_names}
    state = with_targets(model.shape, model.transposed, model.tensors, trained, torch.float32)
    state |= {alias: state[name].clone() for alias, name in model.tied.items()}
    save_file(state, to / "model.safetensors")
    load = 'module.load_state_dict(load_file("model.safetensors"))'
    return Export(f"from safetensors.torch import load_file; {load}  # in the exported folder")


def usual_format(run_dir: Path) -> str:
    """The format of an export that names none: hf, or state-dict for a model that a Python call handed over."""
    return "state-dict" if finished(run_dir).model.path == GIVEN else "hf"


def _finished(run_dir: Path, to: Path, method: str | None, checkpoint: str) -> Config:
    """The configuration of the finished run, whose method may be imported; `to` is free."""
    config = finished(run_dir)
    if checkpoint not in CHECKPOINTS:
        raise unknown_word("--checkpoint", checkpoint, CHECKPOINTS)
    if checkpoint == BEST and checkpoints.best(run_dir) is None:
        allowed = f"{LAST}, for this run has kept no best checkpoint (early_stopping.metric)"
        raise UserError("--checkpoint", checkpoint, allowed, "leave it out")
    name = named_by(config, "method", method)
    check_named("method", name, [method or ""], str(run_dir), f"--method {name}")
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UserError("--to", str(to), "a new or empty folder", "choose another folder")
    return config


def named_by(config: Config, group: str, given: str | None) -> object:
    """The name of the configuration's method, or hook.  Raises UserError where the caller gives another one."""
    name: object = getattr(config, group).get("name")
    if given is not None and given != name:
        allowed = f"nothing, for the run has no {group}" if name is None else f"{name}, the run's own"
        raise UserError(f"--{group}", given, allowed, "leave it out" if name is None else "leave it out or name that")
    return name


def _read(run_dir: Path, to: Path, client: int | None, method: str | None, checkpoint: str, form: str) -> _Trained:
    """The trained model for an export of the format `form`."""
    config = _finished(run_dir, to, method, checkpoint)
    if config.model.path == GIVEN:
        allowed = "state-dict for a model that a Python call handed over"
        raise UserError("--format", form, allowed, "use --format state-dict")
    make(to, "--to")
    job = _setup(run_dir, config.model_copy(update={"hook": {}}))  # a trained model needs its method alone
    shape = job.architecture.shape
    server, changes = _changes(run_dir, job.method, shape, client, checkpoint)
    tensors = load_weights(config.model, job.architecture, config.seed)
    begun = dense(job.architecture, merged(tensors, job.start, job.architecture))
    tensors = dense(job.architecture, tensors)
    weights = target_weights(shape, job.architecture.transposed, begun)
    return _Trained(job, tensors, begun, weights, changes, {name: server.tensors[name] for name in shape.head_names})


def _setup(run_dir: Path, config: Config) -> Setup:
    """Of rows that a Python call handed over nobody knows more than the names of their classes."""
    start = read_start(config)
    if config.task.name != GIVEN:
        job = prepare(config, start=start)
        check_start(run_dir, job.begun)
        return Setup(job.config, job.method, job.architecture, job.processor, job.start)
    kind = model_kind(config)
    processor = processor_of(config, kind)
    known = (kind, class_names(run_dir), processor.vocabulary, processor.pad)
    bones = architecture_of(config.model, *known, problem=problem_of(run_dir))
    start = None if start is None else fitted(start, bones, known[1])
    check_start(run_dir, None if start is None else start.info)
    return Setup(config, build(config.method), bones, processor, start)


def _changes(
    run_dir: Path, method: Method, shape: ModelShape, client: int | None, checkpoint: str
) -> tuple[ServerState, Mapping[str, Change]]:
    """The trained server, and the changes of the model of all or of the client's."""
    found = checkpoints.read(run_dir, best=checkpoint == BEST)
    if found is None:
        raise UserError("RUN", str(run_dir), "a run folder with a checkpoint", "check the path")
    server = ServerState(found.round, landed(found.server, None)[0])  # without what clients under way will bring
    if not method.personal:
        if client is not None:
            raise UserError("--client", client, f"nothing, for {method.name} has one model for all", "leave it out")
        return server, method.model(server, shape)
    clients = sorted(client for client, _ in found.state_files)
    if client is None or client not in clients:
        took_part = ", ".join(map(str, clients))
        allowed = f"one of the clients that took part, for each has its own model with {method.name}: {took_part}"
        raise UserError("--client", client, allowed, f"e.g. --client {clients[0]}" if clients else "")
    state = checkpoints.stored_state(run_dir, found, client)
    return server, method.personal_model(server, state, shape)


def _changed(trained: _Trained, target: str) -> Tensor:
    return trained.changes[target].apply(trained.weights[f"{target}/weight"])


def _factors(trained: _Trained) -> tuple[Factors, list[int]]:
    """Every changed layer's change of the pretrained weight as left (m, r) and right (r, n), and the ranks of those
    that had to be factorised."""
    job, factors = trained.job, dict[str, tuple[Tensor, Tensor]]()
    dense, most, numbers, size = [], (0, ""), 0, 0
    for name, (W_mn, changes) in _changed_layers(trained).items():
        if any(change.blocks for change in changes) and all(_is_low_rank(change) for change in changes):
            sides = [change.factors() for change in changes if change.blocks]
            lefts, rights = zip(*sides, strict=True)
            factors[name] = (lefts[0], rights[0]) if len(sides) == 1 else (torch.cat(lefts, dim=1), torch.cat(rights))
            continue
        (m, n), after_mn = W_mn.shape, applied(changes, W_mn)
        rank = change_rank(W_mn, after_mn)
        dense.append((name, W_mn, after_mn, max(1, rank)))  # peft knows no rank 0
        most = max(most, (rank, f"{name}, {m} x {n}"))
        numbers, size = numbers + rank * (m + n), size + m * n
    if dense and numbers >= size:
        allowed = f"hf, for {job.method.name} changed {most[1]}, by rank {most[0]}, too high for an adapter"
        raise UserError("--format", "peft", allowed, "use --format hf")
    for name, W_mn, after_mn, rank in dense:
        factors[name] = factorised(after_mn.double() - W_mn.double(), rank)
    return factors, [rank for *_, rank in dense]


def _changed_layers(trained: _Trained) -> dict[str, tuple[Tensor, list[Change]]]:
    """By layer its pretrained weight (m, n), and what the start and the training changed, one after the other."""
    bones, start = trained.job.architecture, trained.job.start
    pretrained = target_weights(bones.shape, bones.transposed, trained.tensors)
    weights = {layer.name: pretrained[f"{layer.name}/weight"] for layer in bones.shape.targets}
    changes = {name: [change] for name, change in trained.changes.items()}
    if start is not None:
        weights = {**changed_weights(start, trained.tensors, bones), **weights}
        changes = {name: [*start.changes.get(name, ()), *changes.get(name, ())] for name in weights}
    return {name: (W_mn, changes[name]) for name, W_mn in weights.items()}


def _is_low_rank(change: Change) -> bool:
    return change.dense is None and change.base_scale == 1.0


def factorised(change_mn: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of a float64 matrix (m, n) of the given rank, as left (m, rank), right (rank, n), float32.

    >>> left, right = factorised(torch.tensor([[3.0, 4.0], [6.0, 8.0]], dtype=torch.float64), 1)
    >>> left.shape, right.shape, (left @ right).round(decimals=5).tolist()
    (torch.Size([2, 1]), torch.Size([1, 2]), [[3.0, 4.0], [6.0, 8.0]])
    """
    m, n = change_mn.shape
    if m < n:
        left, right = factorised(change_mn.T, rank)
        return right.T, left.T
    # The smaller Gram matrix has the right singular vectors as eigenvectors.  Squaring costs half of float64's digits,
    # which leaves as many as float32 has, and saves most of the time of a singular value decomposition.
    _, V_nn = torch.linalg.eigh(change_mn.T @ change_mn)
    V_nr = V_nn[:, n - rank :]  # eigenvalues ascend
    return (change_mn @ V_nr).float(), V_nr.T.float()


def loadable(path: str, kind: str) -> str | None:
    """The folder or hub id whose from_pretrained gives the model of `model.path` as a run begins with it, if any.

    >>> loadable("gpt2", "causal-lm"), loadable("random", "causal-lm"), loadable("bert-base", "text-classification")
    ('openai-community/gpt2', None, None)
    """
    # A classifier's head, and often its pooler, are in no file but ours: they were drawn.
    if path == RANDOM or kind not in LANGUAGE:
        return None
    source = locate(path)
    if source.gguf is not None:
        return None
    folder = Path(source.name)
    return str(folder.resolve()) if folder.is_dir() else source.name
