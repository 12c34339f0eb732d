"""peft's settings in the LoRA methods: rsLoRA, and ranks and alphas by layer, against peft itself and by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rayfed_sub.core.errors import UserError
from rayfed_sub.core.patterns import pattern_key
from rayfed_sub.core.types import Client, Layer, ModelShape
from rayfed_sub.methods import METHODS, build, class_of
from rayfed_sub.methods.lora import layer_rank, layer_scale
from rayfed_sub.methods.protocol import Method
from tests.helpers.by_hand import changed, walked
from tests.helpers.tiny_models import Tiny, distance, llama, run_reference
from tests.methods.checks import upload_numbers
from tests.methods.test_protocol import OPTIMIZER, Round, clients_data, local_change, walk

LORA = [name for name in METHODS if "use_rslora" in class_of(name).__dataclass_fields__]
PATTERNS = {"rank_pattern": {"layers.1.mlp.*": 3, "up_proj": 1}, "alpha_pattern": {"down_proj": 6.0, r".*\.0\..*": 5.0}}
SHAPE = ModelShape((Layer("a.up", 6, 5), Layer("a.down", 5, 6)))


def test_lora_methods_have_the_settings_and_the_others_refuse_them() -> None:
    assert set(METHODS) - set(LORA) == {"fedftg", "fedavg", "fedkrso", "fedsub", "shared-galore"}
    for name in set(METHODS) - set(LORA):
        for key, value in {"dropout": 0.1, "use_rslora": True, **PATTERNS}.items():
            with pytest.raises(UserError, match=f"method.{key}.*fedit, .*ffa-lora") as refusal:
                build({"name": name, key: value})
            assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "patterns",
    [["proj"], ["up_proj"], ["layers.1.*", "up_proj"], ["mlp.up_proj"], ["^model.layers.0.mlp.up_proj"], [r"\d+.*"]],
)
def test_patterns_match_as_in_peft(patterns: list[str]) -> None:
    from peft.utils.other import get_pattern_key

    names = [
        "model.layers.0.mlp.up_proj",
        "model.layers.10.mlp.up_proj",
        "up_proj",
        "model.layers.1.o_proj",
        "xup_proj",
    ]
    for name in names:
        theirs = get_pattern_key(patterns, name)
        assert pattern_key(patterns, name) == (theirs if theirs in patterns else None)


def test_pattern_of_a_parent_is_for_experts_alone() -> None:
    """As in peft, layers of an nn.Sequential have numbers at the end of their names, and are not their parent."""
    method = build({"name": "fedit", "rank": 2, "rank_pattern": {"mlp": 3}})
    found = {expert: layer_rank(method, Layer("a.mlp.0", 8, 8, expert=expert)) for expert in (False, True)}
    assert found == {False: 2, True: 3}
    with pytest.raises(UserError, match=r"method\.rank_pattern: got 'mlp'; allowed: patterns that match the end"):
        method.check(ModelShape((Layer("a.mlp.0", 8, 8),)))


@pytest.mark.parametrize("use_rslora", [False, True])
def test_ranks_and_scales_are_peft_s(use_rslora: bool) -> None:
    import copy

    from peft import LoraConfig, inject_adapter_in_model

    tiny = llama()
    method = build({"name": "fedit", "rank": 2, "alpha": 7.0, "use_rslora": use_rslora, **PATTERNS})
    names = [layer.name for layer in tiny.shape.targets]
    config = LoraConfig(r=2, lora_alpha=7.0, use_rslora=use_rslora, target_modules=names, **PATTERNS)  # type: ignore[arg-type]
    model: Any = inject_adapter_in_model(config, nn.ModuleDict({"m": copy.deepcopy(tiny.model)})["m"])
    method.check(tiny.shape)
    server = method.init_server(tiny.weights, tiny.shape, 0)
    start = method.start_client(method.broadcast(server), None, Client(0, 0), tiny.shape)
    for name in names:
        theirs = model.get_submodule(name)
        assert start.tensors[f"{name}/left"].shape[1] == theirs.r["default"]
        assert start.scale_of(name) == theirs.scaling["default"]
    assert len({start.scale_of(name) for name in names}) > 2


def made(name: str) -> Method:
    """Ranks that differ between layers and, where the method has that, between clients."""
    ranks = {"client_ranks": [2, 4]} if "client_ranks" in class_of(name).__dataclass_fields__ else {}
    return build({"name": name, "rank": 4, "alpha": 3.0, "dropout": 0.2, "use_rslora": True, **ranks, **PATTERNS})


@pytest.mark.parametrize("name", LORA)
def test_every_method_with_all_settings(name: str) -> None:
    """Two rounds: ranks, scales and names, the bytes of the formula, the mean change where it is exact, and the second
    round as peft trains it."""
    tiny, method = llama(), made(name)
    method.check(tiny.shape)
    server = method.init_server(tiny.weights, tiny.shape, seed=0)
    first = walk(method, tiny, server, clients_data(tiny, 2), weights=[1, 2])
    given = {"weights": [1, 2], "states": first.states, "optimizer": OPTIMIZER.model_copy(update={"eps": 1e-4})}
    second = walk(method, tiny, first.server, clients_data(tiny, 2, seed=5), **given)
    theirs = walk(method, tiny, first.server, clients_data(tiny, 2, seed=5), **given, trainer=run_reference)
    sizes = [{n: t.shape for n, t in at.tensors.items() if "history" not in n} for at in (first.server, second.server)]
    assert sizes[0] == sizes[1] or name == "florist"  # whose server chooses the rank
    before, after, other = (weights_of(method, tiny, done) for done in (first, second, theirs))
    wires = [0, 0]
    for layer in tiny.shape.targets:
        for client, start in enumerate(second.starts):
            rank = rank_in(layer.name, method, client)
            assert start.dropout == 0.2
            heads = getattr(method, "heads", 1)
            assert start.tensors[f"{layer.name}/left"].shape[1] == heads * rank
            assert start.scale_of(layer.name) == pytest.approx(scale_in(layer.name, method, client))
            wires[client] += upload_numbers(method.wire, 1, r=rank, m=layer.m, n=layer.n, h=heads)
        if method.exact:
            changes = [local_change(tiny, first.server, second, client, layer.name) for client in (0, 1)]
            mean = changes[0] / 3 + changes[1] * 2 / 3
            assert distance(after[layer.name] - before[layer.name], mean) < 1e-4
        assert distance(after[layer.name] - before[layer.name], other[layer.name] - before[layer.name]) < 1e-4
    if name not in (
        "hetlora",
        "flora",
        "flexlora",
        "florist",
        "fedmomentum",
    ):  # those may prune themselves, or send the product
        assert [update.wire_bytes for update in second.updates] == [4 * numbers for numbers in wires]


def weights_of(method: Method, tiny: Tiny, done: Round) -> dict[str, Tensor]:
    """The targets' weights in the global model, or in client 0's own."""
    own = method.personal_model(done.server, done.states[0], tiny.shape) if method.personal else None
    changes = own or method.model(done.server, tiny.shape)
    return {t.name: changes[t.name].apply(tiny.weights[f"{t.name}/weight"]) for t in tiny.shape.targets}


def rank_in(layer: str, method: Method, client: int) -> int:
    """model.layers.1.mlp.* have 3, model.layers.0.mlp.up_proj has 1, the others 4; a client of rank 2 half of it."""
    whole = 3 if ".1.mlp." in layer else 1 if layer.endswith("up_proj") else 4
    own = (2, 4)[client] if hasattr(method, "client_ranks") else 4
    return max(1, whole * own // 4)


def scale_in(layer: str, method: Method, client: int) -> float:
    """alpha / sqrt(r) of the client's own rank; where it has components of the server's factors, of the server's rank,
    and with a sketch r / r_k of that; a half where a frozen adapter has the other."""
    own, whole = rank_in(layer, method, client), rank_in(layer, method, 1)
    scales = {"fslora": whole**0.5 / own, "fed-plora": whole**-0.5, "fedalt": 0.5 * own**-0.5}
    return alpha_in(layer) * scales.get(method.name, own**-0.5)


def alpha_in(layer: str) -> float:
    return 6.0 if layer.endswith("down_proj") else 5.0 if ".0." in layer else 3.0


def test_client_of_a_lower_rank_has_as_much_less_in_every_layer() -> None:
    """Rank 8 has 16 and 2 where the patterns say so: a client of rank 4 has 8 and 1 there, of rank 1 has 2 and 1."""
    method = build({"name": "flora", "rank": 8, "client_ranks": [8, 4, 1], "rank_pattern": {"up": 16, "down": 2}})
    layers = [Layer(name, 32, 32) for name in ("a.up", "a.down", "a.o")]
    found = [[layer_rank(method, layer, rank) for layer in layers] for rank in (8, 4, 1)]
    assert found == [[16, 2, 8], [8, 1, 4], [2, 1, 1]]
    assert layer_scale(method, layers[0], 4) == 16.0 / 8


def test_hetlora_s_clients_have_their_own_scale_under_rslora() -> None:
    """Rank 4 and alpha 2: the server's s is 2 / sqrt(4) = 1, that of a client of rank 1 is 2.  It receives B / 2, so
    that s B A is the server's; what it makes of its B is doubled on the way back."""
    shape = ModelShape((Layer("up", 3, 4),))
    fields = {"rank": 4, "client_ranks": [1, 4], "alpha": 2.0, "use_rslora": True, "gamma": 1.0}
    method = build({"name": "hetlora", **fields})
    server = method.init_server({"up/weight": torch.zeros(3, 4)}, shape, 0)
    server = server.advance({"up/left": torch.ones(3, 4), "up/right": torch.eye(4)})
    done = walked(method, shape, server, {0: {"up/left": [[3.0]] * 3}}, {0: 1.0})
    assert done.starts[0].scale_of("up") == 2.0
    assert torch.equal(done.starts[0].tensors["up/left"], torch.full((3, 1), 0.5))
    change = changed(method, shape, done.server, "up", torch.zeros(3, 4))
    assert torch.equal(change[:, 0], torch.full((3,), 2.0 * 3.0))  # s_k B_k A_k


def test_pattern_lowers_the_rank_of_a_narrow_layer() -> None:
    """64 x 32 and, as a shared expert's gate, 1 x 32: rank 8 fits once the gate has one of its own."""
    shape = ModelShape((Layer("up", 64, 32), Layer("gate", 1, 32)))
    method = build({"name": "flora", "rank": 8, "client_ranks": [8, 2], "rank_pattern": {"gate": 1}})
    method.check(shape)
    server = method.init_server({"up/weight": torch.zeros(64, 32), "gate/weight": torch.zeros(1, 32)}, shape, 0)
    start = method.start_client(method.broadcast(server), None, Client(1, 0), shape)
    assert (start.tensors["up/left"].shape, start.tensors["gate/left"].shape) == ((64, 2), (1, 1))
    with pytest.raises(UserError, match=r"^method\.rank: got 8; allowed: 1 to 1 \(gate is 1 x 32\)"):
        build({"name": "fedit", "rank": 8, "rank_pattern": {"up": 4}}).check(shape)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"rank_pattern": {"up": 7}}, "method.rank_pattern.up: got 7; allowed: ranks of 1 to 5 for a.up, .* 6 x 5"),
        ({"rank_pattern": {"u(p": 2}}, "method.rank_pattern: got .*u.p.*; allowed: regular expressions"),
        ({"alpha_pattern": {"p": 2.0}}, "method.alpha_pattern: got 'p'; allowed: patterns that match the end"),
        ({"rank_pattern": {"up": 0}}, "method.rank_pattern: got {'up': 0}; allowed: texts as keys, .* an integer >= 1"),
        ({"alpha_pattern": {"up": 0}}, "method.alpha_pattern: .*; allowed: texts as keys, each with a number > 0"),
        ({"rank_pattern": {1: 3}}, "method.rank_pattern: .*; put the key in quotes: method.rank_pattern='{.1.: ...}'"),
        ({"rank_pattern": 3}, "method.rank_pattern: got 3; allowed: texts as keys, each with an integer >= 1, or null"),
        ({"dropout": 1.0}, "method.dropout: got 1.0"),
        ({"use_rslora": "maybe"}, "method.use_rslora"),
    ],
)
def test_wrong_settings_get_one_line(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as refusal:
        build({"name": "fedit", "rank": 2, **fields}).check(SHAPE)
    assert "\n" not in str(refusal.value)
