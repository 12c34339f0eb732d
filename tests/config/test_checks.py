"""Rules between keys: each refusal names the field, its value, the allowed values and the remedy."""

from __future__ import annotations

import pytest

from rayfed_sub.config.checks import check_rules, check_training
from rayfed_sub.config.loading import load_config
from rayfed_sub.config.schema import (
    Asynchronous,
    Config,
    Device,
    Devices,
    EarlyStopping,
    Evaluation,
    Federation,
    Optimizer,
    Partition,
    Privacy,
    Resources,
    Server,
    StepRange,
    Task,
)
from rayfed_sub.core.errors import UserError
from rayfed_sub.planning import job

PRIVATE = Privacy(clip=1.0, noise=1.0)
DEVICES = Devices(classes={"a": Device(seconds_per_step=1.0)})
BUFFERED = Federation(mode="async", asynchronous=Asynchronous(buffer=2))
NOVA = Federation(normalise_steps=True)
JUDGED = Config(task=Task(validation_share=0.1), evaluation=Evaluation(split="validation"))

RULES = {
    "devices.classes.a.seconds_per_step: got None; allowed: one of seconds_per_step and tokens_per_second, not both; "
    "set one of them, e.g. devices.classes.a.seconds_per_step=1.0": Config(devices=Devices(classes={"a": Device()})),
    "devices.classes.a.hours: got [[3.0, 3.0]]; allowed: pairs of hours that differ; none at all for a device that is "
    "always available; remove the pair": Config(
        devices=Devices(classes={"a": Device(seconds_per_step=1.0, hours=((3.0, 3.0),))})
    ),
    "devices.shares.b: got 1.0; allowed: shares of devices.classes: a; add the class": Config(
        devices=Devices(classes=DEVICES.classes, shares={"b": 1.0})
    ),
    "devices.shares: got {'a': 1.0}; allowed: a share for each of devices.classes; b would have no clients; "
    "e.g. devices.shares.b=1, or remove the class": Config(
        devices=Devices(classes={**DEVICES.classes, "b": Device(seconds_per_step=2.0)}, shares={"a": 1.0})
    ),
    "devices.shares: got {'a': 1.0}; allowed: nothing with devices.trace, which names each client's device; remove one "
    "of them": Config(devices=Devices(classes=DEVICES.classes, shares={"a": 1.0}, trace="t.csv")),
    "devices.spread: got 0.5; allowed: nothing without devices.classes, which it is about; add the classes": Config(
        devices=Devices(spread=0.5)
    ),
    "federation.partition.alpha: got 0.1; allowed: 0.5, for it is of federation.partition.kind=dirichlet alone; set "
    "federation.partition.kind=dirichlet, or federation.partition.alpha=0.5": Config(
        federation=Federation(partition=Partition(column="label", alpha=0.1))
    ),
    "optimizer.momentum: got 0.9; allowed: 0.0, for it is of optimizer.name=sgd alone; set optimizer.name=sgd, or "
    "optimizer.momentum=0.0": Config(optimizer=Optimizer(momentum=0.9)),
    "optimizer.final_lr_ratio: got 0.1; allowed: 0.0, for it is of optimizer.schedule=linear and cosine alone; set "
    "optimizer.schedule=linear, or optimizer.final_lr_ratio=0.0": Config(optimizer=Optimizer(final_lr_ratio=0.1)),
    "server.tau: got 0.1; allowed: 0.001, for it is of server.optimizer=adam alone; set server.optimizer=adam, or "
    "server.tau=0.001": Config(server=Server(optimizer="momentum", tau=0.1)),
    "federation.over_selection: got 1.5; allowed: what adds a client to the 8 of a round, of 8 in all; "
    "lower federation.sampled or raise federation.over_selection": Config(
        devices=DEVICES, federation=Federation(over_selection=1.5)
    ),
    "federation.mode: got 'async'; allowed: nothing else than the default without devices.classes, which give the "
    "time; add devices.classes": Config(federation=BUFFERED),
    "federation.round_deadline: got 5.0; allowed: null, for it is of federation.mode=sync and semi-sync alone; set "
    "federation.mode=sync, or federation.round_deadline=null": Config(
        devices=DEVICES, federation=BUFFERED.model_copy(update={"round_deadline": 5.0})
    ),
    "federation.local_seconds: got None; allowed: a number of seconds with federation.mode=semi-sync; e.g. "
    "federation.local_seconds=60": Config(devices=DEVICES, federation=Federation(mode="semi-sync")),
    "federation.asynchronous.buffer: got 2; allowed: null, for it is of federation.mode=async alone; set "
    "federation.mode=async, or federation.asynchronous.buffer=null": Config(
        federation=Federation(asynchronous=Asynchronous(buffer=2))
    ),
    "federation.asynchronous.buffer: got 9; allowed: 1 to federation.clients=8 with rule=fedbuff; "
    "e.g. federation.asynchronous.buffer=4": Config(
        devices=DEVICES, federation=Federation(mode="async", asynchronous=Asynchronous(buffer=9))
    ),
    "federation.asynchronous.buffer: got 2; allowed: null, for it is of federation.asynchronous.rule=fedbuff alone; "
    "set federation.asynchronous.rule=fedbuff, or federation.asynchronous.buffer=null": Config(
        devices=DEVICES, federation=Federation(mode="async", asynchronous=Asynchronous(rule="fedasync", buffer=2))
    ),
    "federation.asynchronous.mixing: got 0.5; allowed: 0.6, for it is of federation.asynchronous.rule=fedasync "
    "alone; set federation.asynchronous.rule=fedasync, or federation.asynchronous.mixing=0.6": Config(
        devices=DEVICES, federation=Federation(mode="async", asynchronous=Asynchronous(buffer=2, mixing=0.5))
    ),
    "federation.availability: got 0.5; allowed: 1.0 with federation.mode=async; a device's hours say when it is "
    "available; remove it": Config(devices=DEVICES, federation=BUFFERED.model_copy(update={"availability": 0.5})),
    "federation.normalise_steps: got True; allowed: false with federation.mode=async: FedNova's rule is for the cohort "
    "of a round; remove it": Config(devices=DEVICES, federation=BUFFERED.model_copy(update={"normalise_steps": True})),
    "federation.epochs: got 1.0; allowed: null with federation.mode=async, whose rounds are steps of the server; set "
    "federation.rounds instead": Config(
        devices=DEVICES, federation=BUFFERED.model_copy(update={"epochs": 1.0, "rounds": None})
    ),
    "privacy.clip: got 1.0; allowed: nothing with federation.mode=async: the accountant assumes that every client is "
    "drawn by itself, with the same chance in every round; remove one of them": Config(
        devices=DEVICES, federation=BUFFERED, privacy=PRIVATE
    ),
    "privacy.clip: got 1.0; allowed: nothing with federation.mode=async: the accountant counts each client's steps in "
    "cohorts that are drawn whatever the time; remove one of them": Config(
        devices=DEVICES, federation=BUFFERED, privacy=PRIVATE.model_copy(update={"unit": "example"})
    ),
    "hook.name: got 'scaffold'; allowed: nothing with federation.mode=async: a hook's tensors are those of a round; "
    "remove one of them": Config(devices=DEVICES, federation=BUFFERED, hook={"name": "scaffold"}),
    "method.name: got 'centralized'; allowed: a method; all rows at one client are a matter of the partition; set "
    "method.name=fedftg federation.clients=1 federation.sampled=null federation.partition.kind=pool "
    "federation.partition.largest=8": Config(method={"name": "centralized"}),
    "task.validation_share: got 0.5; allowed: less than 0.5, what task.test_share leaves; "
    "e.g. task.validation_share=0.05": Config(task=Task(test_share=0.5, validation_share=0.5)),
    "evaluation.split: got 'validation'; allowed: held-out without validation rows: task.validation names none, "
    "task.validation_share is 0; set a share, e.g. task.validation_share=0.05": Config(
        evaluation=Evaluation(split="validation")
    ),
    "early_stopping.patience: got 3; allowed: nothing without early_stopping.metric, the score to look at; "
    "e.g. early_stopping.metric=held_out_loss": Config(early_stopping=EarlyStopping(patience=3)),
    "early_stopping.metric: got 'accuracy'; allowed: null with evaluation.split=held-out, whose rows would choose the "
    "round; set evaluation.split=validation and, where there are no such rows, task.validation_share=0.1": Config(
        early_stopping=EarlyStopping(metric="accuracy")
    ),
    "early_stopping.min_gain: got 0.1; allowed: 0 without early_stopping.patience, for the best round is that of the "
    "best score; e.g. early_stopping.patience=3": Config(
        task=JUDGED.task,
        evaluation=JUDGED.evaluation,
        early_stopping=EarlyStopping(metric="accuracy", min_gain=0.1),
    ),
    "federation.partition.largest: got 3; allowed: nothing with partition.kind=column, which has a value for each "
    "client; remove it": Config(federation=Federation(partition=Partition(largest=3))),
    "federation.partition.rows_per_client: got None; allowed: a number of rows with partition.kind=resample; "
    "e.g. 32 with kind=resample, else none": Config(federation=Federation(partition=Partition(kind="resample"))),
    "federation.partition.rows_per_client: got 4; allowed: nothing without partition.kind=resample; "
    "e.g. 32 with kind=resample, else none": Config(
        federation=Federation(partition=Partition(kind="iid", rows_per_client=4))
    ),
    "federation.clients: got 8; allowed: 1 with partition.kind=pool; set federation.clients=1": Config(
        federation=Federation(partition=Partition(kind="pool"))
    ),
    "federation.local_steps.high: got 3; allowed: 5 or more; raise it or lower low": Config(
        federation=Federation(local_steps=StepRange(low=5, high=3))
    ),
    "federation.rounds: got 2; allowed: one of rounds and epochs, not both; remove one of them": Config(
        federation=Federation(rounds=2, epochs=1.0)
    ),
    "federation.sampled: got 9; allowed: 1 to federation.clients=8; lower it or raise federation.clients": Config(
        federation=Federation(sampled=9)
    ),
    "privacy.clip: got None; allowed: a number > 0 where privacy.noise or privacy.epsilon is set; "
    "e.g. privacy.clip=1.0": Config(privacy=Privacy(epsilon=3.0)),
    "privacy.noise: got 1.0; allowed: one of privacy.noise and privacy.epsilon, not both; set one of them, "
    "e.g. privacy.noise=1.0": Config(privacy=Privacy(clip=1.0, noise=1.0, epsilon=3.0)),
    "privacy.noise: got None; allowed: one of privacy.noise and privacy.epsilon, not both; set one of them, "
    "e.g. privacy.noise=1.0": Config(privacy=Privacy(clip=1.0)),
}

TRAINING = {
    "federation.proximal: got 0.1; allowed: 0 with resources.executor=reference; remove it": Config(
        federation=Federation(proximal=0.1), resources=Resources(executor="reference")
    ),
    "resources.executor: got 'reference'; allowed: pack where gpus_per_worker > 0; the reference executor runs on "
    "CPUs": Config(resources=Resources(executor="reference", gpus_per_worker=0.5)),
    "federation.normalise_steps: got True; allowed: false with optimizer.name=adamw: FedNova's rule is for SGD; "
    "remove it or set optimizer.name=sgd with a learning rate for it": Config(federation=NOVA),
    "optimizer.weight_decay: got 0.1; allowed: 0 with federation.normalise_steps, whose rule knows no decay; "
    "set optimizer.weight_decay=0": Config(federation=NOVA, optimizer=Optimizer(name="sgd", weight_decay=0.1)),
    "federation.proximal: got 2.0; allowed: less than 2, 1 / optimizer.lr, with federation.normalise_steps; "
    "lower it": Config(
        federation=Federation(normalise_steps=True, proximal=2.0), optimizer=Optimizer(name="sgd", lr=0.5)
    ),
    "federation.client_weighting: got 'samples'; allowed: uniform with privacy.clip: every client counts the same; "
    "set federation.client_weighting=uniform": Config(privacy=PRIVATE),
    "federation.availability: got 0.5; allowed: 1.0 with privacy.clip: every client is drawn by itself, whatever the "
    "others do; set federation.availability=1.0": Config(
        privacy=PRIVATE, federation=Federation(client_weighting="uniform", availability=0.5)
    ),
    "federation.round_deadline: got 5.0; allowed: null with privacy.clip: the steps of a client that is dropped draw "
    "the same noise again in its next round; set federation.round_deadline=null": Config(
        devices=DEVICES,
        federation=Federation(round_deadline=5.0),
        privacy=PRIVATE.model_copy(update={"unit": "example"}),
    ),
    "federation.partition.kind: got 'resample'; allowed: a kind that gives each row to one client with "
    "privacy.unit=example, whose epsilon is one client's; e.g. iid, without rows_per_client": Config(
        federation=Federation(partition=Partition(kind="resample", rows_per_client=4)),
        privacy=PRIVATE.model_copy(update={"unit": "example"}),
    ),
    "federation.normalise_steps: got True; allowed: false with privacy.clip: the denominator is fixed; "
    "set federation.normalise_steps=false": Config(
        privacy=PRIVATE,
        federation=Federation(client_weighting="uniform", normalise_steps=True),
        optimizer=Optimizer(name="sgd"),
    ),
}


@pytest.mark.parametrize("message", RULES)
def test_rules_of_every_configuration(message: str) -> None:
    with pytest.raises(UserError) as caught:
        check_rules(RULES[message])
    assert str(caught.value) == message


@pytest.mark.parametrize("message", TRAINING)
def test_rules_of_training(message: str) -> None:
    check_rules(TRAINING[message])
    with pytest.raises(UserError) as caught:
        check_training(TRAINING[message])
    assert str(caught.value) == message


def test_valid_combinations() -> None:
    for config in (
        Config(),
        Config(task=Task(test_share=0.5, validation_share=0.4), evaluation=Evaluation(split="validation")),
        Config(federation=Federation(clients=1, partition=Partition(kind="pool", largest=3))),
        Config(federation=Federation(partition=Partition(kind="resample", rows_per_client=4))),
        Config(federation=Federation(sampled=8, local_steps=StepRange(low=3, high=3), epochs=0.5)),
        Config(privacy=PRIVATE, federation=Federation(client_weighting="uniform")),
        Config(privacy=Privacy(clip=1.0, epsilon=3.0), federation=Federation(client_weighting="uniform")),
        Config(
            federation=Federation(normalise_steps=True, proximal=1.9),
            optimizer=Optimizer(name="sgd", lr=0.5, momentum=0.9),
        ),
        Config(resources=Resources(executor="reference")),
    ):
        check_rules(config)
        check_training(config)


@pytest.mark.parametrize(
    "partition",
    [
        {"kind": "column"},
        {"kind": "dirichlet", "alpha": 0.1, "largest": 5},
        {"kind": "resample", "rows_per_client": 4},
    ],
)
def test_keys_that_replace_centralized_load(partition: dict[str, object]) -> None:
    tree = {"method": {"name": "fedit"}, "federation": {"clients": 6, "sampled": 3, "partition": partition}}
    with pytest.raises(UserError) as refused:
        load_config(tree, ["method.name=centralized"])
    pooled = load_config(tree, refused.value.advice.removeprefix("set ").split())
    assert (pooled.method["name"], pooled.federation.clients, pooled.federation.cohort) == ("fedftg", 1, 1)
    largest = {"column": 6, "dirichlet": 5, "resample": None}[str(partition["kind"])]
    assert (pooled.federation.partition.kind, pooled.federation.partition.largest) == ("pool", largest)


def test_loading_checks_rules_between_keys() -> None:
    with pytest.raises(UserError, match=r"^federation\.sampled: got 9; "):
        load_config({}, ["federation.sampled=9"])


@pytest.mark.parametrize("message", [*RULES, *TRAINING])
def test_invalid_configuration_object_is_refused_before_rows_are_read(
    message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "load_inputs", lambda config: pytest.fail("rows were read"))
    with pytest.raises(UserError) as caught:
        job.prepare({**RULES, **TRAINING}[message])
    assert str(caught.value) == message
