"""The checks of `checks.py` on every method of the table, and on external ones that are wrong."""

from __future__ import annotations

import pytest

from rayfed_sub.core.types import Client
from rayfed_sub.methods import FAMILIES, METHODS, build
from rayfed_sub.methods.protocol import Method
from tests.helpers.tiny_models import bert, llama
from tests.methods.checks import (
    check_aligned,
    check_server_names,
    check_upload_bytes,
    check_upload_represents_the_change,
)
from tests.methods.test_protocol import RANK, made

FIXED_RANK = {"hetlora": {"gamma": 1.0}}  # r in `wire` is the client's rank; without pruning it is RANK
GLOBAL = [name for name in METHODS if not made(name).personal]  # a personal factor is trained and never sent


def case(name: str) -> Method:
    return made(name, **FIXED_RANK.get(name, {}))


@pytest.mark.parametrize("name", METHODS)
def test_server_has_the_same_names_after_every_round(name: str) -> None:
    check_server_names(case(name), llama(), fixed=name != "florist")


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("tiny", [llama, bert])
def test_uploads_have_the_bytes_of_the_wire_formula(name: str, tiny: object) -> None:
    check_upload_bytes(case(name), tiny(), RANK)  # type: ignore[operator]


@pytest.mark.parametrize("name", GLOBAL)
def test_upload_represents_the_client_s_training(name: str) -> None:
    check_upload_represents_the_change(case(name), llama())


def wrong(name: str) -> Method:
    return build({"name": f"tests.helpers.wrong_rotations:{name}", "rank": RANK, "rotation": 1.0})


def side(round: int) -> str:
    """FedRot-LoRA aligns B in even rounds, A in odd ones."""
    return "right" if round % 2 else "left"


def test_fedrot_lora_aligns_its_factors() -> None:
    check_aligned(made("fedrot-lora", rotation=1.0), llama(), side)


def test_wrong_rotation_of_a_is_caught() -> None:
    with pytest.raises(AssertionError, match="differs from the client's training"):
        check_upload_represents_the_change(wrong("TurnsAWrongly"), llama())


@pytest.mark.parametrize("name", ["SwapsParity", "TransposesR"])
def test_wrong_alignment_is_caught(name: str) -> None:
    with pytest.raises(AssertionError, match="not aligned"):
        check_aligned(wrong(name), llama(), side)


def test_uploaded_reference_is_caught() -> None:
    with pytest.raises(AssertionError, match="differs from wire="):
        check_upload_bytes(wrong("UploadsTheReference"), llama(), RANK)
    with pytest.raises(AssertionError, match="server's tensors changed"):
        check_server_names(wrong("UploadsTheReference"), llama())


TRAINED = {
    "coefficients in": {"left", "right"},  # on the longer side, or the left one
    "dense weights": {"weight"},
    "LoRA's A and B": {"left", "right"},
    "one of LoRA's factors": {"left"},
    "a small core": {"core", "heads"},
    "models of each client's own": {"left", "right"},
}


@pytest.mark.parametrize(("family", "name"), [(family, name) for family, names in FAMILIES.items() for name in names])
def test_family_says_what_is_trained(family: str, name: str) -> None:
    """In round 0, but for Fed-SB's with the gradient's start, which then trains nothing; families of subspaces and of
    dense weights have the server's weights dense."""
    method, tiny = case(name), llama()
    server = method.init_server(tiny.weights, tiny.shape, seed=0)
    start = method.start_client(method.broadcast(server), None, Client(0, 0), tiny.shape)
    roles = {trained.rpartition("/")[2] for trained in start.trained}
    (allowed,) = (allowed for words, allowed in TRAINED.items() if family.startswith(words))
    if name != "fed-sb-gradient":
        assert roles <= allowed
        assert family.startswith("LoRA's A and B") <= (roles == {"left", "right"})
    assert method.personal == family.startswith("models of each client's own")
    target = f"{tiny.shape.targets[0].name}/weight"
    assert not family.startswith(("coefficients in", "dense weights")) or target in server.tensors
