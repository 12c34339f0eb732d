"""Inputs that trials share: model, rows and weights, in the object store, once per node."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import ray

from rayfed_sub.config.schema import Config
from rayfed_sub.models.hub import RANDOM
from rayfed_sub.planning.job import Job, JobInputs, job_on, kind_of, load_inputs
from rayfed_sub.runtime.cluster import put_rows
from rayfed_sub.runtime.object_store import Shared
from rayfed_sub.runtime.session import load_backbone, spec_of
from rayfed_sub.storage.earlier_runs import read_start


@dataclass(frozen=True)
class InputRefs:
    """References to a job's inputs in the object store, owned by the sweep's process.  model: (architecture,
    processor, what is known of the start)."""

    model: Any
    dataset: Any


@dataclass(frozen=True)
class SharedInputs:
    """Inputs of jobs by `input_key`, weights by `weights_key`."""

    inputs: Mapping[str, InputRefs]
    weights: Mapping[str, Any]

    def job(self, config: Config) -> tuple[Job, Shared]:
        """The trial's job and the handles for its workers; inputs that are not shared are loaded for it alone."""
        refs = self.inputs.get(input_key(config))
        if refs is None:
            job = job_on(load_inputs(config, start=read_start(config)), config)
            dataset = put_rows(job.dataset)
        else:
            architecture, processor, begun = ray.get(refs.model)
            job = job_on(JobInputs(architecture, processor, ray.get(refs.dataset), begun=begun), config)
            dataset = refs.dataset
        weights = self.weights.get(weights_key(config))
        return job, Shared(ray.put(spec_of(job)), ray.put(load_backbone(job)) if weights is None else weights, dataset)


def all_inputs(configs: Iterable[Config]) -> dict[str, tuple[Config, JobInputs]]:
    """Inputs of jobs by `input_key`, each with a configuration.  Raises UserError for inputs that do not fit."""
    found: dict[str, tuple[Config, JobInputs]] = {}
    for config in configs:
        key = input_key(config)
        if key not in found:
            found[key] = (config, load_inputs(config, start=read_start(config)))
    return found


def shared(found: Mapping[str, tuple[Config, JobInputs]]) -> SharedInputs:
    """Puts the inputs and their weights into the object store of the current Ray session."""
    inputs, weights = {}, {}
    for key, (config, base) in found.items():
        inputs[key] = InputRefs(ray.put((base.architecture, base.processor, base.begun)), put_rows(base.dataset))
        if (weight_key := weights_key(config)) not in weights:
            weights[weight_key] = ray.put(load_backbone(job_on(base, config)))
    return SharedInputs(inputs, weights)


def input_key(config: Config) -> str:
    """Key that is equal for configurations with the same model and the same rows at the same clients."""
    federation = config.federation.model_dump(mode="json", include={"clients", "partition"})
    parts = (config.model.model_dump(mode="json"), config.task.model_dump(mode="json"), federation)
    return json.dumps([*parts, config.seed, config.evaluation.split])


def weights_key(config: Config) -> str:
    """Key that is equal for configurations with the same initial weights; with the seed where weights are drawn."""
    drawn = config.model.path == RANDOM or kind_of(config) != "causal-lm"
    task = config.task.model_dump(mode="json") if drawn else None
    return json.dumps([config.model.model_dump(mode="json"), task, config.seed if drawn else None])
