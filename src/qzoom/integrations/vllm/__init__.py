"""qzoom inside vLLM: one engine looks (gate and region map) and answers; nothing of vLLM is patched.

`models` adds one cache layer to the stock model classes, in which the hidden states after the K shared layers are kept
block by block. `connector` reads them when a prompt ends and runs gate and region branch (`heads`) on them; the result
is in the response's `kv_transfer_params`. `arguments` has the options that an engine must be started with.
"""

from __future__ import annotations

ARCHITECTURES = {
    "Qwen3VLForConditionalGeneration": "Qwen3ForCausalLM",
    "Qwen2_5_VLForConditionalGeneration": "Qwen2ForCausalLM",
    "LlavaForConditionalGeneration": "LlamaForCausalLM",
}
"""vLLM's model classes that have a subclass here, named QZoom..., and those of their decoders."""
TESTED = ("0.28", "0.32")
"""Minor versions of vLLM that were tested."""


def register() -> None:
    """Make the model classes known to vLLM; the entry point of `vllm.general_plugins`, called in every process."""
    from vllm import ModelRegistry

    known = ModelRegistry.get_supported_archs()
    for name in ARCHITECTURES:
        if f"QZoom{name}" not in known:
            ModelRegistry.register_model(f"QZoom{name}", f"qzoom.integrations.vllm.models:QZoom{name}")


def version_warning(version: str) -> str:
    """A sentence about a version of vLLM that was not tested; empty for tested ones."""
    if ".".join(version.split(".")[:2]) in TESTED:
        return ""
    return (
        f"qzoom's plug-in was tested with vLLM {' and '.join(TESTED)}, and this is {version}; compare some answers "
        "with the native engine's, or install a tested version."
    )
