"""The encoder: every token sees what is before and behind it. What BERT is, from the decoder's own blocks."""

from __future__ import annotations

from typing import NoReturn

from torch import Tensor

from ctxlab.errors import IncompatibleError
from ctxlab.model.base import ARCHITECTURES, Segments
from ctxlab.model.blocks import Prefix
from ctxlab.model.cache import KVCache
from ctxlab.model.recurrence import SegmentMemory
from ctxlab.model.transformer import Transformer


@ARCHITECTURES.register("encoder")
class Encoder(Transformer):
    """A Transformer without a causal mask (Devlin et al. 2019, arXiv:1810.04805, section 3).

    Padding has to be said: keys from `lengths[b]` on are seen by nobody, and what stands there is to be ignored. Every row
    has at least one token. Packed documents attend within themselves. It says what stands at a place, not what follows: it has
    neither cache nor memory. BERT's token types are one vector where all tokens are of one type, which its table of
    positions holds.
    Raises IncompatibleError on a positional scheme or a mechanism that needs a causal mask.
    """

    causal = False

    def hidden(
        self,
        tokens: Tensor,
        *,
        lengths: Tensor | None = None,
        segments: Segments | None = None,
        cache: KVCache | None = None,
        memory: SegmentMemory | None = None,
        prefix: Prefix | None = None,
    ) -> Tensor:
        if cache is not None or memory is not None or prefix is not None:
            raise ValueError(
                "Encoder: it reads whole rows both ways, and has neither a cache, nor a memory, nor a prefix"
            )
        frame = self._frame(tokens, self._compute_dtype(), lengths=lengths, segments=segments)
        return self._run(self.embedding, tokens, frame, recompute=self.recompute)

    def new_cache(self) -> NoReturn:
        raise IncompatibleError(
            "run: an encoder writes no text, since each of its places sees what follows (model.architecture=encoder)"
        )

    def new_streaming_cache(self, *, sinks: int, window: int) -> NoReturn:
        self.new_cache()
