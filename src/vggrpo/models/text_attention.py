"""Cross-attention that pays for each padding token of the text once, not hundreds of times.

Wan's text embeddings are zero after the end of the text, up to 512 tokens, and the transformer attends to those zeros
too. Identical
keys and values can be merged exactly: `n` copies of one key weigh in the softmax like one copy whose logit is raised by
`log n`. So a
text of 20 tokens costs 21 keys instead of 512, and nothing changes but rounding. On small models the padded keys are
half of the work.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class MergedPaddingAttention:
    """Attention processor for the cross-attention layers of a `WanTransformer3DModel` (text-to-video: no image keys).

    One object serves all layers. `repeats` says how many identical padding tokens the last key stands for; `length` is
    the number of
    keys it was set for, so that a full-length text that comes by another way is attended to as usual.
    """

    def __init__(self) -> None:
        self.length = 0
        self.repeats = 1

    def merge(self, text: Float[Tensor, "B L D"]) -> Float[Tensor, "B M D"]:
        """Cut the batch's common zero tail down to one token and remember how many it stands for."""
        used = text.ne(0).any(dim=-1).any(dim=0)  # (L,)
        positions = used.nonzero()
        end = int(positions[-1]) + 1 if len(positions) else 0
        if text.shape[1] - end <= 1:
            self.length, self.repeats = text.shape[1], 1
            return text
        self.length, self.repeats = end + 1, text.shape[1] - end
        return text[:, : end + 1]

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Float[Tensor, "B N D"],
        encoder_hidden_states: Float[Tensor, "B L D"],
        attention_mask: Tensor | None = None,
        rotary_emb: Tensor | None = None,
    ) -> Float[Tensor, "B N D"]:
        query = attn.norm_q(attn.to_q(hidden_states))
        key = attn.norm_k(attn.to_k(encoder_hidden_states))
        value = attn.to_v(encoder_hidden_states)
        query, key, value = (
            x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in (query, key, value)
        )  # (B, h, N|L, d)
        bias = attention_mask
        if self.repeats > 1 and encoder_hidden_states.shape[1] == self.length:
            bias = torch.zeros(1, 1, 1, self.length, dtype=query.dtype, device=query.device)
            bias[..., -1] = math.log(self.repeats)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return attn.to_out[1](attn.to_out[0](attended.transpose(1, 2).flatten(2, 3)))
