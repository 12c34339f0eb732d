"""Hooks: the conformance checks of `hook_checks.py` on built-in and other hooks, right and wrong; FedProx's term as a
hook against the engine's; what is refused."""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

from rayfed_sub import load_config
from rayfed_sub.config.schema import Config, Optimizer
from rayfed_sub.core.errors import RunError, UserError
from rayfed_sub.core.types import Client, Layer, LocalStep, ModelShape, Tensors
from rayfed_sub.methods import HOOKS, METHODS, build, build_hook
from rayfed_sub.methods.hooked import hooked
from rayfed_sub.methods.hooks import CohortMean, LocalHook, moves_server
from rayfed_sub.planning.job import check_settings
from rayfed_sub.planning.traffic import first_start, traffic
from rayfed_sub.training.executor import train_pack
from rayfed_sub.training.pack_step import LocalRule
from tests.helpers import outside_hooks
from tests.helpers.outside_hooks import Contrast, FedProx, Muon, SpectralDescent
from tests.helpers.tiny_models import (
    PAD,
    bert,
    change,
    draw_batches,
    llama,
    run_pack,
    run_reference,
    works,
    worst,
)
from tests.methods import hook_checks
from tests.methods.hook_checks import CHECKS, SHARING, check_any_pack, hooked_as, rounds_of, starts_of
from tests.training.test_any_pack import PACKS


def hook_of(name: str) -> LocalHook:
    outside = {"fedprox": FedProx(), "muon": Muon(), "contrast": Contrast(), "spectral": SpectralDescent()}
    hook = outside.get(name) or build_hook({"name": name})
    assert hook is not None
    return hook


EVERY = [*HOOKS, "fedprox", "muon", "contrast"]


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("hook", EVERY)
def test_hook_passes_every_check(hook: str, check: object) -> None:
    for number, method in enumerate(SHARING if hook in HOOKS else ("fedit", "shared-galore")):
        check(hook_of(hook), method, bert() if number % 2 else llama())  # type: ignore[operator]


@pytest.mark.parametrize(
    ("hook", "method"),
    [
        ("scaffold", "fedavg"),
        ("scaffold", "shared-galore"),
        ("muon", "fedit"),
        ("spectral", "fed-sb"),
    ],
)
def test_client_with_a_hook_has_the_same_bits_in_any_pack(hook: str, method: str) -> None:
    """In packs of 1, 2, 3 and 8; the Gram of a 5 x 5 gradient has other bits where it begins elsewhere in memory."""
    check_any_pack(hook_of(hook), method, bert() if method == "fedit" else llama(), PACKS)


@pytest.mark.parametrize(
    ("wrong", "check", "words"),
    [
        ("WritesTheStart", "check_shared_tensors_stay", "written in place"),
        ("LooksAtValues", "check_without_data", "values decide"),
        ("ForgetsATensor", "check_gradients", "not those of the tensors"),
        ("NamesItsOwnWay", "check_names", "not named"),
        ("SendsMore", "check_bytes", "upload differs"),
    ],
)
def test_wrong_hook_is_caught(wrong: str, check: str, words: str) -> None:
    hook = getattr(outside_hooks, wrong)()
    if wrong == "ForgetsATensor":
        with pytest.raises(
            RunError, match=r"^round 0, client 0, hook fedprox\.correct: it gives .* the shape of no tensor, not 16 x 5"
        ):
            starts_of(hook, "fedit", llama(), 1)
        return
    with pytest.raises((AssertionError, RunError), match=words):
        getattr(hook_checks, check)(hook, "fedit", llama())


FAILURES: dict[str, tuple[Any, str]] = {
    "begin": (None, "round 0, client 0, hook fails.begin: it gives nothing, not tensors by name"),
    "correct": (None, "round 0, client 0, hook fails.correct: it gives nothing, not two mappings of tensors"),
    "upload": ({"a": 1.0}, "round 0, client 0, hook fails.upload: it gives a value of type float as a, not a tensor"),
    "client_state": (
        3,
        "round 0, client 0, hook fails.client_state: it gives a value of type int, not tensors by name",
    ),
    "init_server": (None, "round 0, hook fails.init_server: it gives nothing, not tensors by name"),
    "broadcast": (None, "round 0, hook fails.broadcast: it gives nothing, not tensors by name"),
    "aggregate": (
        ({}, {"b": torch.zeros(2)}),
        "round 0, hook fails.aggregate: it gives b the shape 2, not of no tensor",
    ),
}


@pytest.mark.parametrize("function", FAILURES)
def test_failure_of_a_hook_names_function_round_and_client(function: str) -> None:
    def raises(*arguments: object) -> Any:
        raise KeyError("left out")

    answer, said = FAILURES[function]
    where = said.partition(": ")[0]
    for found, message in ((raises, f"{where}: it raises KeyError: 'left out'"), (lambda *arguments: answer, said)):
        kind = type("Fails", (outside_hooks.FedProx,), {function: found, "name": "fails", "__module__": __name__})
        with pytest.raises(RunError) as caught:
            rounds_of(kind(), "fedit", llama())
        assert str(caught.value) == message


@pytest.mark.parametrize("function", ["correct", "upload", "client_state"])
def test_hook_that_makes_numbers_of_its_own_infinite_is_named(function: str) -> None:
    """Not the learning rate."""

    @dataclass(frozen=True)
    class Overflows(outside_hooks.FedProx):
        def correct(self, memory: Tensors, step: LocalStep) -> tuple[Tensors, Tensors]:
            if function != "correct":
                return super().correct(memory, step)
            return {name: x * torch.inf for name, x in step.gradients.items()}, memory

        def upload(self, memory: Tensors, ended: Tensors, steps: int) -> Tensors:
            return {"a": torch.tensor([torch.nan])} if function == "upload" else {}

        def client_state(self, memory: Tensors, ended: Tensors, steps: int) -> Tensors:
            return {"a": torch.tensor([1.0, torch.inf])} if function == "client_state" else {}

    said = rf"^round 0, client 0, hook fedprox\.{function}: it gives non-finite values in \S+$"
    with pytest.raises(RunError, match=said):
        rounds_of(Overflows(), "fedit", llama())


def test_clients_that_send_other_shapes_are_named() -> None:
    @dataclass(frozen=True)
    class Uneven(outside_hooks.FedProx):
        def upload(self, memory: Tensors, ended: Tensors, steps: int) -> Tensors:
            sizes.append(len(sizes) + 1)
            return {"a": torch.zeros(sizes[-1])}

    sizes: list[int] = []
    with pytest.raises(RunError, match=r"^client 1, hook fedprox\.upload: it gives a the shape 2, not 1$"):
        rounds_of(Uneven(), "fedit", llama())


HEAVY = (Optimizer(name="sgd", momentum=0.9, weight_decay=0.1, clip_norm=0.5), 0.05)
ADAM = (Optimizer(weight_decay=0.1), 1e-2)


@pytest.mark.parametrize(
    ("hook", "method", "given"),
    [
        *(("scaffold", name, ADAM if name in ("fedit", "shared-galore") else HEAVY) for name in SHARING),
        ("muon", "shared-galore", HEAVY),
    ],
)
def test_reference_executor_honours_hooks(hook: str, method: str, given: tuple[Optimizer, float]) -> None:
    """The pack executor against the libraries, in a later round."""
    tiny, (optimizer, lr) = llama(), given
    start = starts_of(hook_of(hook), method, tiny, 2)[1]
    batches = [draw_batches(tiny, 5, 3, rows=6, labels=8)]
    (ours,), (theirs,) = (train(tiny, [start], batches, optimizer, lr=lr) for train in (run_pack, run_reference))
    assert worst(change(tiny, start, ours), change(tiny, start, theirs)) < 1e-4
    assert worst(ours.memory, theirs.memory) < 1e-3


@pytest.mark.parametrize("method", ["fedavg", "fedit", "fed-sb"])
def test_fedprox_as_a_hook_has_the_bits_of_the_engine_s(method: str) -> None:
    tiny, ends = bert(), list[Tensors]()
    for hook, proximal in ((FedProx(mu=0.5), 0.0), (FedProx(mu=0.0), 0.5)):
        with_hook = hooked_as(method, hook)
        server = with_hook.init_server(tiny.weights, tiny.shape, seed=0)
        start = with_hook.start_client(with_hook.broadcast(server), None, Client(0, 0), tiny.shape)
        work = works([start], [draw_batches(tiny, 0, 4)])
        rule = LocalRule(Optimizer(name="sgd"), 0.1, 0, PAD, proximal)
        (result,) = train_pack(*tiny.packed, tiny.shape, work, rule).results
        ends.append(result.tensors)
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_optimizer_of_its_own_steps_by_what_it_gives() -> None:
    """Muon after SGD with lr 0.1: the first step is -0.1 times the orthogonal factor, whose singular values are within
    a third of 1, where the gradient itself is much smaller."""
    tiny = llama()
    method = hooked_as("fedavg", Muon())
    server = method.init_server(tiny.weights, tiny.shape, seed=0)
    start = method.start_client(method.broadcast(server), None, Client(0, 0), tiny.shape)
    (result,) = run_pack(tiny, [start], [draw_batches(tiny, 0, 1, rows=6, labels=8)], Optimizer(name="sgd"), lr=0.1)
    for layer in tiny.shape.targets:
        name = f"{layer.name}/weight"
        sizes = torch.linalg.svdvals(result.tensors[name] - start.tensors[name]) / 0.1
        assert 0.6 < float(sizes.median()) < 1.3
        assert float(sizes.max()) < 1.3


def test_term_of_the_local_loss_is_added_by_autograd() -> None:
    """One tensor y = (1, 0) with x = (0, 1), z = (1, 1), temperature 1: cosines 0 and 1 / sqrt(2), softmax weight of z
    w = 1 / (1 + exp(-1 / sqrt(2))).  The loss is -cos(y, x) + log sum exp, its gradient w (d cos(y, z) - d cos(y, x)),
    of which the part along y vanishes: w (0, 1 / sqrt(2) - 1)."""
    y, x, z = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), torch.tensor([1.0, 1.0])
    step = LocalStep({"b": y}, {"b": torch.zeros(2)}, 0, 0.1)
    given, _ = Contrast(temperature=1.0).correct({"b/start": x, "b/last": z}, step)
    w = 1 / (1 + math.exp(-(0.5**0.5)))
    torch.testing.assert_close(given["b"], torch.tensor([0.0, w * (0.5**0.5 - 1)]))


# --- bytes and memory of a plan


@pytest.mark.parametrize("method", SHARING)
def test_plan_counts_a_hook_s_tensors(method: str) -> None:
    """Three clients, the last of which joins in round 1.  t: numbers of the trained tensors.  SCAFFOLD sends t up, and
    down once anything was learned; a client keeps t and trains with 3 t more: its own, the shift and the sum."""
    tiny = bert()
    hook = hook_of("scaffold")
    bare, full = (
        traffic(m, tiny.shape, Config(), [[0, 1], [1, 2]], lambda client: 3)
        for m in (hooked_as(method, FedProx()), hooked_as(method, hook))
    )
    start = starts_of(hook, method, tiny, 1)[0]
    t = 4 * sum(start.tensors[name].numel() for name in start.trained)
    for n in (0, 1):
        for k in full.rounds[n]:
            one, other = full.rounds[n][k], bare.rounds[n][k]
            assert one.up == other.up + t
            assert one.down == other.down + (t if n else 0)
            assert one.state == other.state + t
            assert one.resident == other.resident + 2 * t  # FedProx's memory is t
    assert full.broadcast == bare.broadcast + t
    assert [a - b for a, b in zip(full.server, bare.server, strict=True)] == [t, t, t]


@dataclass(frozen=True)
class Halves(FedProx):
    """Takes half of every step at the server."""

    def aggregate(self, server: Tensors, mean: CohortMean) -> tuple[Tensors, Tensors]:
        return server, {name: (mean.before[name] + after) / 2 for name, after in mean.after.items()}


@dataclass(frozen=True)
class SaysItDoesNot(Halves):
    keeps_mean: ClassVar[bool] = True


def test_weights_that_a_hook_moves_are_downloaded_whole() -> None:
    """64 x 48 at rank 2: a period's sum of blocks is 2 * 64 numbers, the weight 64 * 48."""
    shape, plain = ModelShape((Layer("up", 64, 48),)), build({"name": "shared-galore", "rank": 2})
    for hook, numbers in ((FedProx(), 2 * 64), (Halves(), 64 * 48)):
        found = traffic(hooked(plain, hook, 2), shape, Config(), [[0], [1]], lambda client: 1)
        assert found.rounds[1][1].down == 4 * numbers
    assert not moves_server(hook_of("scaffold"))
    with pytest.raises(RunError, match=r"it replaces up/weight, but says keeps_mean"):
        traffic(hooked(plain, SaysItDoesNot(), 2), shape, Config(), [[0]], lambda client: 1)


@pytest.mark.parametrize("method", SHARING)
def test_planned_memory_has_a_hook_s_tensors_of_every_layer(method: str) -> None:
    tiny = bert()
    start = first_start(hooked_as(method, hook_of("scaffold")), tiny.shape, Config(), 0)
    assert set(start.memory) == {f"{name}/{kind}" for name in start.trained for kind in ("c", "shift", "sum")}
    assert all(tensor.device.type == "meta" for tensor in start.memory.values())


# --- what is refused


def refused(*overrides: str) -> str:
    with pytest.raises(UserError) as error:
        check_settings(load_config({"method": {"name": "fedit"}}, ["hook.name=scaffold", *overrides]))
    return str(error.value)


@pytest.mark.parametrize("method", [name for name in METHODS if name not in SHARING])
def test_methods_whose_clients_do_not_share_a_basis_are_refused(method: str) -> None:
    assert refused(f"method.name={method}") == (
        f"hook.name: got 'scaffold'; allowed: nothing with method.name={method}, whose clients do not all train in one "
        "basis; remove it or choose one of shared-galore, fedavg, fedit, ffa-lora, fed-sb"
    )


REFUSED = {
    "hook.name: got 'scaffold'; allowed: nothing with privacy.clip and unit=client: a hook's tensors would be": (
        "'privacy={clip: 1, noise: 1}' federation.client_weighting=uniform"
    ),
    "federation.normalise_steps: got True; allowed: false with hook.name=scaffold: FedNova's rule is for plain": (
        "federation.normalise_steps=true optimizer.name=sgd"
    ),
    "federation.proximal: got 0.1; allowed: 0 with hook.name=scaffold, whose": "federation.proximal=0.1",
    "hook.name: got 'scafold'; allowed: scaffold, or package.module:Class; did you mean": "hook.name=scafold",
    "hook.alpha: got 0.1; allowed: these keys here: name; remove it": "hook.alpha=0.1",
    "hook.name: got None; allowed: scaffold, or package.module:Class; pick one of them": "'hook={alpha: 0.1}'",
    "hook: got 'scaffold'; allowed: keys with values; set hook.name=scaffold": "hook=scaffold",
    "hook.name: got 'nowhere:Hook'; allowed: an importable class, or one of scaffold": "hook.name=nowhere:Hook",
    "hook.name: got 'rayfed_sub.methods.fedit:FedIT'; allowed: a dataclass with a hook's functions; it has no begin": (
        "hook.name=rayfed_sub.methods.fedit:FedIT"
    ),
    "hook.name: got 'shlex:shlex'; allowed: a dataclass with a hook's functions; see": "hook.name=shlex:shlex",
    "hook.name: got [1]; allowed: scaffold, or package.module:Class; pick one of them": "hook.name=[1]",
}


@pytest.mark.parametrize("words", REFUSED)
def test_settings_that_do_not_fit_are_refused_in_one_line(words: str) -> None:
    said = refused(*shlex.split(REFUSED[words]))
    assert said.startswith(words)
    assert "\n" not in said
