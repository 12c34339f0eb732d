"""Low-rank changes as a folder that peft's PeftModel.from_pretrained loads."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace

from safetensors.torch import save_file
from torch import Tensor

from rayfed_sub.core.types import Tensors

Factors = Mapping[str, tuple[Tensor, Tensor]]
"""Per layer left (m, r) and right (r, n), whose product is the layer's change; every layer has a rank r >= 1 of its
own."""

_TASKS = {
    "causal-lm": "CAUSAL_LM",
    "seq2seq-lm": "SEQ_2_SEQ_LM",
    "text-classification": "SEQ_CLS",
}  # peft has no name for other kinds


def write_adapter(folder: Path, factors: Factors, head: Tensors, *, kind: str, base: str, transposed: bool) -> None:
    """Writes adapter_config.json and adapter_model.safetensors, float32, for the model that `base` names.

    head: `<layer>/weight` (m, n) and `<layer>/bias` (m,), which take the place of the base's own.  kind: the
    architecture's.  transposed: the layers are transformers' Conv1D.  alpha is the rank in every layer: B is `left`, A
    is `right`, and peft multiplies their product by one.
    """
    # peft imports bitsandbytes where it is there, which complains about parts for 4-bit weights.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from peft import LoraConfig

    ranks = {name: right.shape[0] for name, (_, right) in factors.items()}
    usual = max(ranks.values(), key=list(ranks.values()).count)
    others = {f"^{name.replace('.', '[.]')}": rank for name, rank in ranks.items() if rank != usual}
    config = LoraConfig(
        base_model_name_or_path=base,
        task_type=_TASKS.get(kind),
        inference_mode=True,
        r=usual,
        lora_alpha=usual,
        rank_pattern=others,
        alpha_pattern=others,
        target_modules=list(factors),
        fan_in_fan_out=transposed,
        # Top-level modules, which a classifier's layers may lie in: peft itself adds `classifier` and `score`.
        modules_to_save=sorted({name.split(".")[0] for name in (key.rpartition("/")[0] for key in head)}) or None,
    )
    config.target_modules = list(factors)  # peft makes a set of them, which is stored in another order every time
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    tensors = {key.replace("/", "."): tensor for key, tensor in head.items()}
    for name, (left, right) in factors.items():
        tensors |= {f"{name}.lora_B.weight": left, f"{name}.lora_A.weight": right}
    stored = {f"base_model.model.{name}": tensor.float().contiguous() for name, tensor in tensors.items()}
    save_file(stored, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def taken_for_experts(names: Iterable[str], model_type: str) -> str | None:
    """The first of these layers that peft takes for a part of the experts, in models of some types, when it loads an
    adapter; None where it takes each for itself.

    >>> taken_for_experts(["model.layers.1.mlp.shared_experts.up_proj"], "deepseek_v3")
    'model.layers.1.mlp.shared_experts.up_proj'
    >>> taken_for_experts(["model.layers.1.mlp.up_proj"], "llama")
    """
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    model = SimpleNamespace(config=SimpleNamespace(model_type=model_type))  # all of a model that is looked at
    for name in names:
        config = LoraConfig(target_modules=[name])
        try:
            convert_peft_config_for_transformers(config, model, None)
        except ValueError:  # a part without its neighbour
            return name
        if set(config.target_modules or ()) != {name}:
            return name
    return None
