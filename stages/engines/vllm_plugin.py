"""Plug-in of vLLM (entry point group `vllm.general_plugins`) that lets it run tied exports."""

TIED_CLASSES = {
    "HCSMoEMixtralForCausalLM": "vllm.model_executor.models.mixtral:MixtralForCausalLM",
    "HCSMoEQwen2MoeForCausalLM": "vllm.model_executor.models.qwen2_moe:Qwen2MoeForCausalLM",
    "HCSMoEQwen3MoeForCausalLM": "vllm.model_executor.models.qwen3_moe:Qwen3MoeForCausalLM",
    "HCSMoEOlmoeForCausalLM": "vllm.model_executor.models.olmoe:OlmoeForCausalLM",
    "HCSMoEDeepseekV2ForCausalLM": "vllm.model_executor.models.deepseek_v2:DeepseekV2ForCausalLM",
    "HCSMoEDeepseekV3ForCausalLM": "vllm.model_executor.models.deepseek_v2:DeepseekV3ForCausalLM",
    "HCSMoEGptOssForCausalLM": "vllm.model_executor.models.gpt_oss:GptOssForCausalLM",
    "HCSMoEGlm4MoeForCausalLM": "vllm.model_executor.models.glm4_moe:Glm4MoeForCausalLM",
}
"""vLLM's class of the source, by the class that a tied export names in `architectures`."""


def register() -> None:
    """Tell vLLM which class runs which tied export. Called by vLLM in each of its processes, more than once perhaps.

    Nothing is imported until a tied export is loaded.
    """
    from vllm import ModelRegistry

    for name in TIED_CLASSES:
        ModelRegistry.register_model(name, f"stages.engines.vllm_models:{name}")
