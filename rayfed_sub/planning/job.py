"""The job of a run before Ray starts: checks a configuration against rows, model and machine."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rayfed_sub.clock.fleet import TRACE, Fleet, fleet_of
from rayfed_sub.config.checks import check_rules, check_training, clock_reason, not_given
from rayfed_sub.config.schema import GIVEN, Config, Evaluation, Resources
from rayfed_sub.core.errors import UserError
from rayfed_sub.core.text import KINDS, SCORES_OF
from rayfed_sub.data.dataset import Dataset, load_dataset
from rayfed_sub.data.objects import AsTheyAre, Objects
from rayfed_sub.data.processors import Processor
from rayfed_sub.data.rows import Rows
from rayfed_sub.data.tasks import filled
from rayfed_sub.evaluation.named_metrics import metrics_of
from rayfed_sub.methods import METHODS, build, build_hook, class_of, fields_of
from rayfed_sub.methods.hooked import hook_of, hooked, unhooked
from rayfed_sub.methods.hooks import LocalHook
from rayfed_sub.methods.own_failures import named, reported
from rayfed_sub.methods.protocol import Method
from rayfed_sub.methods.stale_updates import check_asynchronous
from rayfed_sub.models.architecture import Architecture, architecture, kind_of_model
from rayfed_sub.models.image_processors import HubImageProcessor, load_image_processor
from rayfed_sub.models.own_architecture import OwnWeights, own_architecture, own_processor
from rayfed_sub.models.presets import SILENT
from rayfed_sub.models.start import StartFrom, StartInfo, fitted
from rayfed_sub.models.text_to_text import KIND
from rayfed_sub.models.tokenizers import ByteTokenizer, HubTokenizer, load_tokenizer
from rayfed_sub.planning.call import NOTHING, Given, code_digests
from rayfed_sub.planning.first_step import check_first_step
from rayfed_sub.planning.machines import Node, most_workers
from rayfed_sub.planning.packs import any_pack, semi_synchronous_steps
from rayfed_sub.planning.sampling import draws, every_local_steps, judged_rows
from rayfed_sub.planning.traffic import first_start
from rayfed_sub.privacy.accountant import NOISES, noise_of


@dataclass(frozen=True, eq=False)
class Job:
    """A checked run.  config is resolved: every default filled in, rounds counted.  noise: under privacy, as set or as
    found for privacy.epsilon, which stays in config as it was asked for.  weights: of a model that the caller handed
    over; code: digests of the caller's own code, by its name in the call, and of a trace of devices; start: what
    model.start_from names, None once its weights are loaded (`loaded`); begun: what the records say of it; fleet: the
    clients' devices, if any."""

    config: Config
    method: Method
    architecture: Architecture
    processor: Processor
    dataset: Dataset
    noise: float | None = None
    weights: OwnWeights | None = None
    code: Mapping[str, str] = dataclasses.field(default_factory=dict)
    start: StartFrom | None = None
    begun: StartInfo | None = None
    fleet: Fleet | None = None

    @property
    def loaded(self) -> Job:
        """The job without the start's tensors."""
        return dataclasses.replace(self, start=None)

    @property
    def any_pack(self) -> bool:
        """Whether a client's result has the same bits in any pack, see `packs.any_pack`."""
        return any_pack(self.config, self.architecture)


@dataclass(frozen=True, eq=False)
class JobInputs:
    """Inputs of a job: the model without its weights, and the task's rows; weights, start, begun: as in `Job`."""

    architecture: Architecture
    processor: Processor
    dataset: Dataset
    weights: OwnWeights | None = None
    start: StartFrom | None = None
    begun: StartInfo | None = None


def prepare(config: Config, given: Given = NOTHING, start: StartFrom | None = None) -> Job:
    """The job of a configuration, in which `named` has put what the call hands over; start: what model.start_from
    names, as `storage/earlier_runs.py` reads it.  Raises UserError, before any training, for settings that do not
    fit."""
    check_settings(config, given)  # before the rows are read
    job = job_on(load_inputs(config, given, start), config, given)
    if job.weights is not None and job.architecture.module is not None:
        check_first_step(job.config, job.architecture, job.weights.tensors, job.dataset, job.processor.pad)
    return replace(job, code={**code_digests(given), **job.code})


def check_settings(config: Config, given: Given = NOTHING) -> Method:
    """The configuration's method with its hook, or what is given in place of either.  Raises UserError for settings
    that contradict each other for any rows and model."""
    check_rules(config)
    filled(config.task)
    method = given.method or build(config.method)
    _check_server(config, method)
    _check_privacy(config, method)
    check_training(config)
    _check_nova(config, method)
    return with_hook(config, method, given.hook or build_hook(config.hook))


def with_hook(config: Config, method: Method, hook: LocalHook | None) -> Method:
    """The method with the hook, if there is one.  Raises UserError where method or settings do not fit hooks, or not
    this one."""
    if hook is None:
        return reported(method)
    name, federation = hook.name, config.federation
    if getattr(method, "shared_basis", None) is None:
        fitting = ", ".join(known for known in METHODS if hasattr(class_of(known), "shared_basis"))
        allowed = f"nothing with method.name={config.method['name']}, whose clients do not all train in one basis"
        raise UserError("hook.name", name, allowed, f"remove it or choose one of {fitting}")
    if config.privacy.of_clients:
        allowed = "nothing with privacy.clip and unit=client: a hook's tensors would be released without noise"
        raise UserError("hook.name", name, allowed, "remove one of them")
    if federation.normalise_steps:
        allowed = f"false with hook.name={name}: FedNova's rule is for plain gradients"
        raise UserError("federation.normalise_steps", True, allowed, "remove one of them")
    with named("hook", hook, "check"):
        hook.check(config)
    return hooked(reported(method), hook, federation.clients)


def load_inputs(config: Config, given: Given = NOTHING, start: StartFrom | None = None) -> JobInputs:
    """Reads task and model.  Raises UserError where they cannot be read or do not fit each other, nor the start."""
    assert (start is None) == (config.model.start_from is None)
    own = given.model
    read = partial(load_dataset, config.task, config.federation)
    how: dict[str, Any] = {"seed": config.seed, "judged": config.evaluation.split, "given": given.rows}
    if own is not None and own.loss is not None:
        as_they_are = AsTheyAre(own.batch or torch.utils.data.default_collate)
        shape, weights = own_architecture(own, config.model, "own")
        return JobInputs(shape, as_they_are, read(as_they_are, **how), weights)
    kind = model_kind(config, None if own is None else getattr(own.module, "config", None))
    if own is None:
        processor = processor_of(config, kind)
    else:
        processor = own_processor(own, kind)
        _check_sides_of(config, kind, processor)
    dataset = read(processor, **how)
    known = (kind, dataset.class_names, processor.vocabulary, processor.pad)
    problem = dataset.kind
    if own is None:
        shape = architecture(config.model, *known, problem=problem)
        if (rows := config.evaluation.generate_rows) and shape.hf_config.model_type in SILENT:
            allowed = (
                f"0 with {shape.hf_config.model_type}, which transformers lets generate in another way than it learns"
            )
            raise UserError("evaluation.generate_rows", rows, allowed, "remove it")
        start = None if start is None else fitted(start, shape, dataset.class_names)
        return JobInputs(shape, processor, dataset, start=start, begun=None if start is None else start.info)
    shape, weights = own_architecture(own, config.model, *known, problem=problem)
    if shape.module is not None and (rows := config.evaluation.generate_rows):
        allowed = "0 with a module of the caller's own, which cannot generate"
        raise UserError("evaluation.generate_rows", rows, allowed, "remove it, or give a transformers model")
    return JobInputs(shape, processor, dataset, weights)


def job_on(base: JobInputs, config: Config, given: Given = NOTHING) -> Job:
    """The job of a configuration, with the given method and hook if any, on its inputs.  Raises UserError for settings
    that do not fit them."""
    method = check_settings(config, given)
    method.check(base.architecture.shape)
    _check_dropout(method, base.architecture)
    _check_examples(config, method, base)
    _check_positions(config, base)
    _check_passes(config, base.architecture)
    evaluation = _check_metrics(config, base)
    check_asynchronous(config, method, base.architecture.shape)
    fleet = _fleet(config, base.dataset)
    steps = semi_synchronous_steps(config, base.dataset, fleet)
    stepped = config.model_copy(update={"federation": config.federation.model_copy(update=steps)})
    federation = stepped.federation.model_copy(update={"rounds": _rounds(stepped, base.dataset), "epochs": None})
    classes = fields_of(config, unhooked(method), hook_of(method))
    devices = config.devices
    if devices.trace is not None:  # a path that holds in every process
        devices = devices.model_copy(update={"trace": str(Path(devices.trace).resolve())})
    parts = {**classes, "federation": federation, "evaluation": evaluation, "devices": devices}
    resolved = config.model_copy(update={**parts, "resources": _packs(config, base.architecture)})
    noise = noise_of(resolved, partial(draws, resolved, base.dataset, federation.rounds or 0))
    inputs = (base.architecture, base.processor, base.dataset)
    code = {} if devices.trace is None else {TRACE: hashlib.sha256(Path(devices.trace).read_bytes()).hexdigest()}
    start, begun = base.start, base.begun
    return Job(resolved, method, *inputs, noise, base.weights, code=code, start=start, begun=begun, fleet=fleet)


def _fleet(config: Config, dataset: Dataset) -> Fleet | None:
    """The clients' devices.  Raises UserError for a trace that does not fit, and for hours or drop-out under
    privacy."""
    fleet = fleet_of(config, dataset.client_names)
    if fleet is not None and fleet.leaves and config.privacy.clip is not None:
        allowed = f"nothing with hours or dropout of devices: {clock_reason(config.privacy)}"
        raise UserError("privacy.clip", config.privacy.clip, allowed, "remove these, or privacy")
    return fleet


def _check_dropout(method: Method, architecture: Architecture) -> None:
    """UserError where a layer's tokens do not lie row after row: dropout's words are those of rows and their tokens."""
    rate = getattr(unhooked(method), "dropout", 0.0)
    if rate and architecture.alone:
        whose = architecture.hf_config.model_type if architecture.hf_config is not None else "this module"
        allowed = f"0 with {whose}, whose layers see something else than row after row"
        raise UserError("method.dropout", rate, allowed, "remove it")


def _check_passes(config: Config, architecture: Architecture) -> None:
    """UserError for a batch that only the caller's code can part, and for blocks to be computed twice where there are
    none."""
    resources = config.resources
    if resources.micro_batch is not None and architecture.loss is not None:
        allowed = "null with a loss of the caller's own, whose batches nobody else can part"
        advice = "remove it, or lower federation.batch_size"
        raise UserError("resources.micro_batch", resources.micro_batch, allowed, advice)
    listed = any(part.isdigit() for layer in architecture.shape.targets for part in layer.name.split("."))
    if resources.activation_checkpointing == "blocks" and not listed:
        allowed = "none or auto where no target lies in a list of blocks (a ModuleList or Sequential)"
        raise UserError("resources.activation_checkpointing", "blocks", allowed, "remove it")


def _packs(config: Config, architecture: Architecture) -> Resources:
    """The resources; packs have one client where nothing says how the model treats several."""
    resources = config.resources
    if not architecture.one_at_a_time:
        return resources
    if resources.pack_size not in ("auto", 1):
        whose = "a module of the caller's own" if architecture.module is not None else architecture.hf_config.model_type
        allowed = f"auto or 1 with {whose}, whose clients train one at a time"
        raise UserError("resources.pack_size", resources.pack_size, allowed, "remove it")
    return resources.model_copy(update={"pack_size": 1})


def kind_of(config: Config) -> str:
    """Kind of model for the task.  Raises UserError for settings that go with another kind."""
    task, generate = filled(config.task), config.evaluation.generate_rows
    if task.image is None and task.image_size is not None:
        raise UserError("task.image_size", task.image_size, "nothing where the task has no images", "remove it")
    if task.problem is not None and not task.labels:
        raise UserError("task.problem", task.problem, "nothing where the task has no label", "remove it")
    if task.text is not None and generate:
        allowed = "0 for plain text, which asks nothing"
        raise UserError("evaluation.generate_rows", generate, allowed, "remove it")
    if task.image is None and task.label is None:
        return "causal-lm"
    if generate:
        raise UserError("evaluation.generate_rows", generate, "0 for a classification task", "remove it")
    return "text-classification" if task.image is None else "image-classification"


def model_kind(config: Config, given: Any = None) -> str:
    """Kind of the run's model: `kind_of` its task, or seq2seq-lm where the model is an encoder-decoder.  given: the
    configuration of a module that a Python call hands over.  Raises UserError as `kind_of`, or for a model whose
    configuration cannot be read."""
    kind = kind_of(config)
    if config.model.path == GIVEN and given is None:
        return kind
    return kind_of_model(config.model, kind, given)


def processor_of(config: Config, kind: str) -> HubTokenizer | ByteTokenizer | HubImageProcessor:
    """Tokenizer or image processor for a model of this kind.  Raises UserError for a model that cannot read them."""
    if config.model.path == GIVEN:
        raise not_given("model.path")
    if kind == "image-classification":
        return load_image_processor(config.model, config.task.image_size)
    processor = load_tokenizer(config.model, apart=kind == KIND)
    _check_sides_of(config, kind, processor)
    return processor


def _check_sides_of(config: Config, kind: str, processor: HubTokenizer | ByteTokenizer) -> None:
    """UserError where an encoder-decoder is to learn what is no source and answer."""
    if kind != KIND:
        return
    task, what = filled(config.task), "with an encoder-decoder, which reads one text and writes another"
    if task.text is not None:
        allowed = f"nothing {what}"
        raise UserError("task.text", task.text, allowed, "set task.prompt and task.answer, or take a decoder")
    if not task.mask_prompt:
        raise UserError("task.mask_prompt", False, f"true {what}", "remove it")
    if task.messages is not None and not (isinstance(processor, HubTokenizer) and processor.chat):
        allowed = "nothing with an encoder-decoder that has no chat template"
        raise UserError("task.messages", task.messages, allowed, "set task.prompt and task.answer, or take a decoder")


def _check_server(config: Config, method: Method) -> None:
    """UserError where a server rule does not fit the method."""
    server, federation = config.server, config.federation
    asked = {
        "server.optimizer": (server.optimizer, server.optimizer != "plain", "plain"),
        "server.lr": (server.lr, server.lr != 1.0, "1.0"),
        "federation.normalise_steps": (True, federation.normalise_steps, "false"),
    }
    for field, (value, used, plain) in asked.items():
        if used and not method.supports_server_optimizer:
            allowed = f"{plain} with method.name={config.method['name']}, whose factors change their basis every round"
            raise UserError(field, value, allowed, "remove it or choose another method")


def _check_nova(config: Config, method: Method) -> None:
    """UserError where momentum would go on from round to round under FedNova."""
    kept = getattr(method, "optimizer_state", "reset")
    if config.federation.normalise_steps and config.optimizer.momentum and kept != "reset":
        allowed = (
            "reset with federation.normalise_steps and optimizer.momentum: the paper's buffer begins a round at zero"
        )
        raise UserError("method.optimizer_state", kept, allowed, "set method.optimizer_state=reset")


def _check_privacy(config: Config, method: Method) -> None:
    """UserError where noise or method violate the accountant's assumptions: see `privacy/mechanism.py`."""
    clip, noise, name = config.privacy.clip, config.privacy.noise, config.method["name"]
    if clip is None:
        return
    if noise is not None and not NOISES[0] <= noise <= NOISES[1]:
        allowed = f"{NOISES[0]:g} to {NOISES[1]:g}, what the accountant can judge"
        raise UserError("privacy.noise", noise, allowed, "e.g. privacy.noise=1.0")
    if config.privacy.of_examples:  # the method gets gradients with noise: whatever it makes of them is covered
        return
    if not method.supports_server_optimizer:
        allowed = f"nothing with method.name={name}, whose server does not move with the mean of clipped changes"
        raise UserError("privacy.clip", clip, allowed, "remove it or choose another method; unit=example fits more")
    if getattr(method, "optimizer_state", None) == "average":
        allowed = "keep or reset with privacy.clip and unit=client: moments would be released without noise"
        raise UserError("method.optimizer_state", "average", allowed, "set method.optimizer_state=keep")


def _check_examples(config: Config, method: Method, base: JobInputs) -> None:
    """UserError where anything but noised gradients would reach what a client sends: see `privacy/examples.py`."""
    if not config.privacy.of_examples:
        return
    shape, name = base.architecture.shape, config.method["name"]
    cause = None
    if base.architecture.module is not None or isinstance(base.dataset.train, Objects):
        cause = "a model or rows of the caller's own, whose loss is a batch's and not a row's"
    elif shape.experts:
        cause = "experts among the targets, which take a step where the data ask for it"
    else:
        subspace = first_start(method, shape, config, 0).subspace
        if subspace is not None and subspace.refresh_every:
            cause = f"method.name={name}, whose bases come from a client's gradients before noise"
    if cause is not None:
        allowed = f"client with {cause}"
        raise UserError("privacy.unit", "example", allowed, "set privacy.unit=client or train something else")


def _check_sides(config: Config, base: JobInputs) -> None:
    """As `_check_positions` for an encoder-decoder, whose sides have positions of their own."""
    limits = {"source": base.architecture.sources, "answer": base.architecture.positions}
    rows = [one for one in (base.dataset.train, base.dataset.held_out) if isinstance(one, Rows)]
    for side, limit in limits.items():
        sizes = [one.prompts if side == "source" else one.lengths - one.prompts for one in rows]
        longest = max((int(size.max(initial=0)) for size in sizes), default=0)
        if limit is not None and longest > limit:
            allowed = f"a length with which no {side} has more than {limit} tokens, {config.model.path}'s positions"
            advice = f"the longest has {longest}; set task.max_length={limit}"
            raise UserError("task.max_length", config.task.max_length, allowed, advice)
    limit, evaluation = base.architecture.positions, config.evaluation
    if limit is not None and evaluation.generate_rows and evaluation.max_new_tokens > limit:
        allowed = f"at most {limit}: {config.model.path} has positions for answers of so many tokens"
        raise UserError("evaluation.max_new_tokens", evaluation.max_new_tokens, allowed, f"set {limit} or less")


def _check_positions(config: Config, base: JobInputs) -> None:
    """UserError where a row, or a judged prompt with its answer, is longer than the model's table of positions."""
    if base.architecture.kind == KIND:
        return _check_sides(config, base)
    limit, held_out = base.architecture.positions, base.dataset.held_out
    if limit is None or not isinstance(held_out, Rows) or not isinstance(base.dataset.train, Rows):
        return
    has = f"{config.model.path} has positions for {limit} tokens"
    longest = max(int(rows.lengths.max(initial=0)) for rows in (base.dataset.train, held_out))
    if longest > limit:
        allowed = f"at most {limit}: {has}, and the longest row has {longest}"
        raise UserError("task.max_length", config.task.max_length, allowed, f"set task.max_length={limit}")
    asked, new = judged_rows(config, len(held_out), config.evaluation.generate_rows), config.evaluation.max_new_tokens
    prompt = int(held_out.prompts[asked].max(initial=0))
    # The last token is generated and not read.
    if asked and prompt + new - 1 > limit:
        most, shown = limit + 1 - prompt, f"{has}, and the longest prompt that is answered has {prompt}"
        advice = f"set evaluation.max_new_tokens={most}" if most > 0 else "set evaluation.generate_rows=0"
        raise UserError("evaluation.max_new_tokens", new, f"at most {most}: {shown}", advice)


def _check_metrics(config: Config, base: JobInputs) -> Evaluation:
    """The section with paths of metrics that hold in every process.  Raises UserError for one that cannot be loaded."""
    kind = base.dataset.kind
    metrics_of(config, base.dataset.class_names, kind)
    watched = config.early_stopping.metric
    if watched not in (None, "held_out_loss") and base.architecture.loss is not None:
        allowed = "held_out_loss, the score of a model with a loss of the caller's own"
        raise UserError("early_stopping.metric", watched, allowed, "set early_stopping.metric=held_out_loss")
    if watched is not None and base.architecture.loss is None and watched not in SCORES_OF[kind]:
        allowed = f"a score of {KINDS[kind]}: {', '.join(SCORES_OF[kind])}"
        raise UserError("early_stopping.metric", watched, allowed, "set one of these")
    names = tuple(str(Path(name).resolve()) if Path(name).exists() else name for name in config.evaluation.metrics)
    return config.evaluation.model_copy(update={"metrics": names})


def _rounds(config: Config, dataset: Dataset) -> int:
    """Rounds as configured, or as many as push `epochs` times all clients' rows through the cohorts."""
    federation = config.federation
    if federation.epochs is None:
        assert federation.rounds is not None, "the configuration says one of rounds and epochs"
        return federation.rounds
    rows_C = np.diff(dataset.client_offsets)
    a_round_of_all = int((every_local_steps(config) * np.minimum(rows_C, federation.batch_size)).sum())
    present = federation.cohort * federation.availability  # clients, on average
    needed = federation.epochs * int(rows_C.sum()) * federation.clients / (a_round_of_all * present)
    return math.ceil(needed - 1e-9)  # rounding must not add a round


def check_resources(config: Config, there: Sequence[Node]) -> None:
    """UserError where the asked workers can never be placed on these nodes; Ray would let them wait in silence."""
    resources = config.resources
    workers, cpus, gpus = resources.workers, resources.cpus_per_worker, resources.gpus_per_worker
    _check_placed("cpus", cpus, workers, [(node.cpus, node.places(cpus, 0)) for node in there])
    if not gpus:
        return
    field = "resources.gpus_per_worker"
    if not any(node.gpus for node in there):
        raise UserError(field, gpus, "0, for no GPU is found", f"set {field}=0")
    if gpus > 1:
        raise UserError(field, gpus, "at most 1: a worker uses one GPU", "set 1 or less")
    _check_placed("gpus", gpus, workers, [(node.gpus, node.gpu_places(gpus)) for node in there])
    most = most_workers(there, cpus, gpus)
    if workers > most:
        allowed = f"1 to {most} with cpus_per_worker={cpus:g} and gpus_per_worker={gpus:g} on the same node"
        raise UserError("resources.workers", workers, allowed, "lower workers, cpus_per_worker or gpus_per_worker")


def _check_placed(kind: str, per_worker: float, workers: int, nodes: Sequence[tuple[float, int]]) -> None:
    """nodes: units and workers that fit, of each."""
    units, largest = kind.upper().replace("S", "s"), max(count for count, _ in nodes)
    most = sum(fit for _, fit in nodes)
    if not most:
        field, whose = f"resources.{kind}_per_worker", "here" if len(nodes) == 1 else "of the largest node"
        advice = f"set {field}={largest:g} or less"
        raise UserError(field, per_worker, f"at most {largest:g}, the {units} {whose}", advice)
    if workers > most:
        sizes = [f"{units_:g}" for units_, _ in nodes]
        listed = " + ".join(sizes) if len(sizes) < 5 else f"{len(sizes)} nodes with {sizes[0]} to {sizes[-1]}"
        where = f"on {listed} {units}"
        allowed = f"1 to {most} with {kind}_per_worker={per_worker:g} {where}"
        raise UserError("resources.workers", workers, allowed, f"lower workers or {kind}_per_worker")
