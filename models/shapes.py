"""The three bundled models: their shapes, their file names and the tensors each one has.

Read by the trainer (which builds the PyTorch model), the exporter (which writes the GGUF) and the
checks. Tensor names and shapes here are GGUF's, rows first, so nothing is renamed on the way out.
"""

from dataclasses import dataclass
from pathlib import Path

MODELS_DIR = Path(__file__).parent
CONTEXT_LENGTH = 65_536
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Qwen3Shape:
    """A qwen3 decoder with tied embeddings; every row length divides by 32 (Q8_0)."""

    name: str
    title: str
    tokenizer: str
    vocabulary: int
    layers: int
    width: int
    heads: int
    kv_heads: int
    feed_forward: int
    head_dim: int = 64
    rope_base: float = 1e6
    norm_epsilon: float = 1e-6

    @property
    def gguf_path(self) -> Path:
        """Where the committed Q8_0 file lies."""
        return MODELS_DIR / f"skim-{self.name}.gguf"

    @property
    def tokenizer_path(self) -> Path:
        """Where the tokenizer of this model lies (Hugging Face `tokenizers` JSON)."""
        return MODELS_DIR / "tokenizers" / f"{self.tokenizer}.json"

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return every tensor's name and shape, (outputs, inputs) for a matrix."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {
            "token_embd.weight": (self.vocabulary, self.width),
            "output_norm.weight": (self.width,),
        }
        for layer in range(self.layers):
            block = {
                "attn_norm": (self.width,),
                "attn_q": (query, self.width),
                "attn_k": (key, self.width),
                "attn_v": (key, self.width),
                "attn_q_norm": (self.head_dim,),
                "attn_k_norm": (self.head_dim,),
                "attn_output": (self.width, query),
                "ffn_norm": (self.width,),
                "ffn_gate": (self.feed_forward, self.width),
                "ffn_up": (self.feed_forward, self.width),
                "ffn_down": (self.width, self.feed_forward),
            }
            shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in block.items()}
        return shapes


TARGET = Qwen3Shape("target", "Skim demonstration target", "pair", 4096, 6, 256, 4, 4, 704)
DRAFTER = Qwen3Shape("drafter", "Skim demonstration drafter", "pair", 4096, 4, 160, 2, 1, 448)
CROSS = Qwen3Shape(
    "drafter-cross", "Skim demonstration drafter, other tokenizer", "cross", 2048, 4, 160, 2, 1, 448
)
SHAPES = {shape.name: shape for shape in (TARGET, DRAFTER, CROSS)}
