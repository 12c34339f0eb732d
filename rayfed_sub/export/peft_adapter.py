"""Low-rank changes as a folder that peft's PeftModel.from_pretrained loads."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rayfed_sub.core.types import Tensors
from rayfed_sub.models.experts import experts_of
from rayfed_sub.models.quantised import mute_bitsandbytes

Factors = Mapping[str, tuple[Tensor, Tensor]]
"""Per layer left (m, r) and right (r, n), whose product is the layer's change; every layer has a rank r >= 1 of its
own."""

_TASKS = {
    "causal-lm": "CAUSAL_LM",
    "seq2seq-lm": "SEQ_2_SEQ_LM",
    "text-classification": "SEQ_CLS",
}  # peft has no name for other kinds


@dataclass(frozen=True)
class Settings:
    """Settings of peft's that change no logits here, but say how the factors were trained; where experts are written,
    peft's dropout is 0."""

    use_rslora: bool = False
    dropout: float = 0.0


@dataclass(frozen=True, eq=False)
class Stacked:
    """The factors of a parameter, as peft's `target_parameters` has them: A (E * r, i), one expert after the other, and
    B (o, r * E), component by component; one of a matrix.  key: the name of peft's module around the parameter."""

    key: str
    rank: int
    A: Tensor
    B: Tensor


def stacked(module: nn.Module, factors: Factors) -> dict[str, Stacked] | None:
    """The factors of experts' matrices by parameter, up to the largest rank filled up with zeros; experts without any
    have zeros.  module: the model, which may lie on the meta device.  None where peft's adapter of a parameter would
    not be one of each expert: of DBRX, whose experts' matrices lie one below the other.
    """
    found, around = dict[str, Stacked](), Counter[str]()
    for one in experts_of(module).values():
        for matrix in reversed(one.matrices):  # the last parameter of a module has the outermost wrapper
            own = {number: factors[name] for number, name in enumerate(matrix.names) if name in factors}
            if not own:
                continue
            stored, path = module.get_parameter(matrix.parameter), matrix.parameter.rpartition(".")[0]
            if stored.ndim != 3:
                return None
            rank = max(right.shape[0] for _, right in own.values())
            # peft asks a class whether it stores (n, m); where none says so, what peft takes for B is A transposed.
            turned = matrix.transposed and not getattr(module.get_submodule(path), "is_transposed", False)
            out, into = (matrix.n, matrix.m) if turned else (matrix.m, matrix.n)
            A_Eri, B_Eor = torch.zeros(len(stored), rank, into), torch.zeros(len(stored), out, rank)
            for number, (left, right) in own.items():
                B_or, A_ri = (right.T, left.T) if turned else (left, right)
                A_Eri[number, : len(A_ri)], B_Eor[number, :, : B_or.shape[1]] = A_ri, B_or
            wrapped = ".".join([path, *["base_layer"] * around[path]])
            found[matrix.parameter] = Stacked(wrapped, rank, A_Eri.flatten(0, 1), B_Eor.permute(1, 2, 0).flatten(1))
            around[path] += 1
    return found


def write_adapter(
    folder: Path,
    factors: Factors,
    head: Tensors,
    experts: Mapping[str, Stacked],
    *,
    kind: str,
    base: str,
    transposed: bool,
    settings: Settings = Settings(),
) -> None:
    """Writes adapter_config.json and adapter_model.safetensors, float32, for the model that `base` names.

    factors: of linear layers; experts: of parameters.  head: `<layer>/weight` (m, n) and `<layer>/bias` (m,), which
    take the place of the base's own.  kind: the architecture's.  transposed: the layers are transformers'
    Conv1D.  alpha is the rank in every layer, or with use_rslora its root: B is `left`, A is `right`, and peft
    multiplies their product by one.
    """
    mute_bitsandbytes()
    from peft import LoraConfig

    ranks = {name: right.shape[0] for name, (_, right) in factors.items()}
    ranks |= {name: own.rank for name, own in experts.items()}
    usual = max(ranks.values(), key=list(ranks.values()).count)
    others = {f"^{name.replace('.', '[.]')}": rank for name, rank in ranks.items() if rank != usual}
    alphas = {rank: math.sqrt(rank) if settings.use_rslora else rank for rank in ranks.values()}
    config = LoraConfig(
        base_model_name_or_path=base,
        task_type=_TASKS.get(kind),
        inference_mode=True,
        r=usual,
        lora_alpha=alphas[usual],
        lora_dropout=0.0 if experts else settings.dropout,  # peft loads no adapter of a parameter with dropout
        use_rslora=settings.use_rslora,
        rank_pattern=others,
        alpha_pattern={pattern: alphas[rank] for pattern, rank in others.items()},
        target_modules=list(factors),
        target_parameters=list(experts) or None,
        fan_in_fan_out=transposed,
        modules_to_save=_saved(head, [*factors, *experts]) or None,
    )
    config.target_modules = list(factors)  # peft makes a set of them, which is stored in another order every time
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    tensors = {key.replace("/", "."): tensor for key, tensor in head.items()}
    for name, (left, right) in factors.items():
        tensors |= {f"{name}.lora_B.weight": left, f"{name}.lora_A.weight": right}
    for own in experts.values():
        tensors |= {f"{own.key}.lora_B.weight": own.B, f"{own.key}.lora_A.weight": own.A}
    stored = {f"base_model.model.{name}": tensor.float().contiguous() for name, tensor in tensors.items()}
    save_file(stored, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _saved(head: Iterable[str], changed: Iterable[str]) -> list[str]:
    """The modules that peft is to take whole: top-level ones, which a classifier's layers may lie in, for peft itself
    adds `classifier` and `score`; a layer itself where changed ones lie there too (Perceiver).

    >>> _saved(["classifier.dense/weight", "classifier.dense/bias"], ["bert.encoder.0"])
    ['classifier']
    >>> _saved(["perceiver.final/weight"], ["perceiver.encoder.0"])
    ['perceiver.final']
    """
    tops = {name.partition(".")[0] for name in changed}
    layers = {name.rpartition("/")[0] for name in head}
    return sorted({layer if layer.partition(".")[0] in tops else layer.partition(".")[0] for layer in layers})


def taken_for_experts(names: Iterable[str], model_type: str) -> list[str]:
    """Those of these layers that peft takes for parts of experts, in models of some types, when it loads an adapter
    with them among its modules; as parameters, `<name>.weight`, it takes them for themselves.

    >>> taken_for_experts(["model.layers.1.mlp.shared_experts.up_proj"], "deepseek_v3")
    ['model.layers.1.mlp.shared_experts.up_proj']
    >>> taken_for_experts(["model.layers.1.mlp.up_proj"], "llama")
    []
    """
    mute_bitsandbytes()
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    model = SimpleNamespace(config=SimpleNamespace(model_type=model_type))  # all of a model that is looked at
    found = []
    for name in names:
        config = LoraConfig(target_modules=[name])
        try:
            convert_peft_config_for_transformers(config, model, None)
        except ValueError:  # a part without its neighbour
            found.append(name)
            continue
        if set(config.target_modules or ()) != {name}:
            found.append(name)
    return found
