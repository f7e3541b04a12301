"""The published GPT-2 sizes and their memories, for sweeps at the paper's scale. Not a sweep itself."""

from configs import sweeps

SIZES = {  # name: width of base and memory, blocks of the memory
    "small": (768, 18),
    "medium": (1024, 36),
    "large": (1280, 54),
    "xl": (1600, 72),
}
NAMES = {
    "small": "openai-community/gpt2",
    "medium": "openai-community/gpt2-medium",
    "large": "openai-community/gpt2-large",
    "xl": "openai-community/gpt2-xl",
}


def overrides(size: str) -> dict:
    """Overrides of configs/wikitext103_gpt2_small.py for a size.

    The learning rate of AdamW is inversely proportional to the width, from the paper's 5e-4 at width 768; GPT-3's rates
    at these widths decrease at about the same rate.
    """
    width, blocks = SIZES[size]
    return {
        "base.path": NAMES[size],
        "datastore.key_model": "" if size == "xl" else NAMES["xl"],  # the xl base makes its own keys
        "memory.width": width,
        "memory.blocks": blocks,
        "training.learning_rate": 5e-4 * 768 / width,
        "training.remat": size != "small",
    }


def memory_flops(size: str) -> int:
    """FLOPs per position of the memory's training, forward and backward; the vocabulary is padded to 50,304."""
    width, blocks = SIZES[size]
    return sweeps.memory_flops("gpt2", 50304, width, blocks)
