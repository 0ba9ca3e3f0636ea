"""Models of Hugging Face transformers with random weights that say something: far from uniform, biases and norms too."""

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def random_model(config: PretrainedConfig, *, seed: int, gain: float) -> PreTrainedModel:
    """``gain``: what matrices are multiplied by after transformers' own start; greedy tokens then have a margin."""
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
            else:
                parameter.mul_(gain)
    return model
