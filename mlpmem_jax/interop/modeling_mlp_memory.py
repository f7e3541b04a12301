"""A causal language model with an MLP memory, for PyTorch and transformers.

    p(next token) = lambda * p_memory + (1 - lambda) * p_base

The base is one of transformers' own models. The memory is a stack of feed-forward blocks without attention; it reads
the input of the feed-forward layer of one of the base's blocks, at the same position. See "MLP Memory",
arXiv 2508.01832.

    model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
    model.config.interpolation_weight = 0.3  # lambda; 0 is the base alone, at its usual cost
    memory = AutoModel.from_pretrained(FOLDER, trust_remote_code=True)  # the memory without the base
"""

import math

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import CausalLMOutput
from transformers.pytorch_utils import Conv1D


class MLPMemoryConfig(PretrainedConfig):
    """Configs of the base and of the memory, and how they are combined.

    Args:
      base_config: config of the base LM, of any type that AutoConfig knows.
      memory_config: a GPT-2, Llama or Mistral config, of which only the feed-forward layers are used.
      input_width: width of the memory's input; if it differs from the memory's width, a linear layer maps it.
      input_block: the block of the base, counted from 1, whose feed-forward layer's input the memory reads.
      interpolation_weight: lambda, from 0 to 1.
    """

    model_type = "mlp_memory"
    sub_configs = {"base_config": AutoConfig, "memory_config": AutoConfig}  # noqa: RUF012

    def __init__(
        self,
        base_config=None,
        memory_config=None,
        input_width=None,
        input_block=1,
        interpolation_weight=0.25,
        **kwargs,
    ):
        self.base_config = _config(base_config)
        self.memory_config = _config(memory_config)
        self.input_width = input_width or self.base_config.hidden_size
        self.input_block = input_block
        self.interpolation_weight = interpolation_weight
        kwargs.setdefault("tie_word_embeddings", self.base_config.tie_word_embeddings)
        super().__init__(**kwargs)

    def get_text_config(self, *args, **kwargs):
        """The base's config, from which transformers takes the shape of the cache."""
        return self.base_config


def _config(values):
    """A sub-config from the values in config.json; a small GPT-2's if there are none."""
    if isinstance(values, PretrainedConfig):
        return values
    values = dict(values or {"n_layer": 2, "n_embd": 64, "n_head": 2})
    return AutoConfig.for_model(values.pop("model_type", "gpt2"), **values)


class MLPMemoryPreTrainedModel(PreTrainedModel):
    config_class = MLPMemoryConfig
    base_model_prefix = "memory"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _keys_to_ignore_on_load_unexpected = [r"^base\."]  # noqa: RUF012  not used by AutoModel

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, Conv1D):
            nn.init.normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)


class RMSNorm(nn.Module):
    def __init__(self, width, epsilon):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x):
        scaled = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.epsilon)
        return self.weight * scaled.to(x.dtype)


class GPT2FeedForward(nn.Module):
    def __init__(self, config):
        super().__init__()
        inner = config.n_inner or 4 * config.n_embd
        self.c_fc = Conv1D(inner, config.n_embd)
        self.c_proj = Conv1D(config.n_embd, inner)
        self.activate = ACT2FN[config.activation_function]

    def forward(self, x):
        return self.c_proj(self.activate(self.c_fc(x)))


class LlamaFeedForward(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.activate = ACT2FN[config.hidden_act]

    def forward(self, x):
        return self.down_proj(self.activate(self.gate_proj(x)) * self.up_proj(x))


class GPT2Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = GPT2FeedForward(config)

    def forward(self, x):
        return x + self.mlp(self.ln_1(x))


class LlamaBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = LlamaFeedForward(config)

    def forward(self, x):
        return x + self.mlp(self.input_layernorm(x))


class MLPMemoryModel(MLPMemoryPreTrainedModel):
    """The memory alone: next-token logits from hidden states of the base, independently per position."""

    def __init__(self, config):
        super().__init__(config)
        sizes = config.memory_config
        if config.input_width != sizes.hidden_size:
            self.embedding_transform = nn.Linear(config.input_width, sizes.hidden_size)
        if sizes.model_type == "gpt2":
            self.h = nn.ModuleList([GPT2Block(sizes) for _ in range(sizes.n_layer)])
            self.ln_f = nn.LayerNorm(sizes.n_embd, eps=sizes.layer_norm_epsilon)
        else:
            self.layers = nn.ModuleList([LlamaBlock(sizes) for _ in range(sizes.num_hidden_layers)])
            self.norm = RMSNorm(sizes.hidden_size, sizes.rms_norm_eps)
        self.lm_head = nn.Linear(sizes.hidden_size, sizes.vocab_size, bias=False)
        self.post_init()

    def forward(self, inputs_embeds, **kwargs):
        """Logits [..., vocabulary] from inputs [..., input width]."""
        is_gpt2 = self.config.memory_config.model_type == "gpt2"
        x = inputs_embeds
        if hasattr(self, "embedding_transform"):
            x = self.embedding_transform(x)
        for block in self.h if is_gpt2 else self.layers:
            x = block(x)
        return CausalLMOutput(logits=self.lm_head((self.ln_f if is_gpt2 else self.norm)(x)))


class MLPMemoryForCausalLM(MLPMemoryPreTrainedModel, GenerationMixin):
    """The base LM with its memory. Its logits are the log-probabilities of the mixture, in float32."""

    def __init__(self, config):
        super().__init__(config)
        self.base = AutoModelForCausalLM.from_config(config.base_config)
        self.memory = MLPMemoryModel(config)
        self.post_init()

    def get_input_embeddings(self):
        return self.base.get_input_embeddings()

    def get_output_embeddings(self):
        return self.base.get_output_embeddings()

    def get_decoder(self):
        return self.base.get_decoder()

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, labels=None, logits_to_keep=0, **kwargs):
        """The base's output, with the logits of the mixture (and with labels its loss, -log p of the next token).

        With `logits_to_keep` (a count from the end, or positions), output projection and memory run only there.
        """
        blocks = getattr(self.base.base_model, "h", None) or self.base.base_model.layers
        read = []
        layer = blocks[self.config.input_block - 1].mlp
        hook = layer.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
        try:
            outputs = self.base(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                logits_to_keep=logits_to_keep,
                **{**kwargs, "return_dict": True},
            )
        finally:
            hook.remove()
        logits, loss = self._mixture(outputs.logits, read[0], logits_to_keep), None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=logits.shape[-1], **kwargs)
        outputs = type(outputs)(**{**outputs, "loss": loss, "logits": logits})
        return outputs if kwargs.get("return_dict", True) else outputs.to_tuple()

    def _mixture(self, base_logits, hidden_states, logits_to_keep):
        weight = self.config.interpolation_weight
        base = base_logits.float().log_softmax(-1)
        if weight == 0:
            return base
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        memory = self.memory(hidden_states[:, kept]).logits.to(base.device).float().log_softmax(-1)
        # Tokens that are not in the memory's vocabulary have probability 0.
        memory = nn.functional.pad(memory, (0, base.shape[-1] - memory.shape[-1]), value=-math.inf)
        if weight == 1:
            return memory
        return torch.logaddexp(memory + math.log(weight), base + math.log1p(-weight))
