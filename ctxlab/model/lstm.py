"""The recurrent baseline: torch's LSTM between the embedding and the head. What a long context costs it is one state.

Shapes: B batch, T tokens, V vocabulary, d d_model, h d_hidden, L layers.
"""

from __future__ import annotations

from typing import Literal, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ctxlab.errors import IncompatibleError
from ctxlab.model.base import ARCHITECTURES, Model, Segments, pieces_of
from ctxlab.model.config import LSTMConfig
from ctxlab.model.recurrence import SegmentMemory
from ctxlab.model.remake import RecomputeSetting

State = tuple[Tensor, Tensor]


class LSTMState:
    """What an LSTM keeps of the tokens that it has read: hidden and cell state of every layer, (L,B,h) each.

    For inference: nothing in it carries a gradient.
    """

    def __init__(self) -> None:
        self.length = 0  # tokens read
        self.state: State | None = None

    def advance(self, state: State, n: int) -> None:
        """Takes the state behind n more tokens."""
        self.state = (state[0].detach(), state[1].detach())
        self.length += n

    def keep(self, rows: Tensor) -> None:
        """Goes on with these rows."""
        if self.state is not None:
            self.state = (self.state[0][:, rows], self.state[1][:, rows])

    @property
    def bytes(self) -> int:
        return 0 if self.state is None else sum(part.numel() * part.element_size() for part in self.state)

    @property
    def allocated_bytes(self) -> int:
        return self.bytes


@ARCHITECTURES.register("lstm")
class LSTM(Model):
    """A language model of stacked LSTM layers (Hochreiter and Schmidhuber 1997, with the forget gate of Gers et al. 2000).

        i, f, o = sigmoid(W x_t + U h_{t-1} + b), each with its own W, U and b;   g = tanh(the same)
        c_t = f c_{t-1} + i g;   h_t = o tanh(c_t)

    x_t is the token's embedding or the layer below's h_t; `out` (d,h) leads from the last layer to the head where d and h
    differ. torch.nn.LSTM computes it and names the weights. Dropout as Zaremba et al. 2014, arXiv:1409.2329, section 3: between
    layers, never from one token to the next. The forget gates' biases begin at 1 (Jozefowicz et al. 2015, section 2.2), the
    matrices of the layers uniform within 1 / sqrt(h), torch's own choice, the others at a standard deviation of one over the
    root of their width: no norm stands before a layer, and at the 0.02 of a Transformer a layer hardly sees its tokens.

    A packed batch runs document by document, each from a state of zeros. A memory is the state that each row was left in.

    On a CPU the layers run in fp32 under bf16 autocast too, and the projection and the head in bf16: torch makes no bf16 LSTM
    there unless the processor multiplies bf16, and without oneDNN one of its own takes 13 times as long as fp32.
    """

    Config = LSTMConfig
    why_without = "reads one token after the other"

    def __init__(self, config: LSTMConfig, *, vocab_size: int, context: int) -> None:
        super().__init__(config, vocab_size=vocab_size, context=context)
        self.embedding = nn.Embedding(vocab_size, config.d_model)
        between = config.dropout if config.n_layers > 1 else 0.0
        self.layers = nn.LSTM(config.d_model, config.d_hidden, config.n_layers, batch_first=True, dropout=between)
        same = config.d_hidden == config.d_model
        self.out = None if same else nn.Linear(config.d_hidden, config.d_model, bias=False)
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.head = None if config.tie_embeddings else nn.Linear(config.d_model, vocab_size, bias=False)
        self.initialize()

    def initialize(self) -> None:
        """Draws all parameters."""
        self.layers.reset_parameters()
        h = self.config.d_hidden
        for name, parameter in self.layers.named_parameters():
            if name.startswith("bias"):  # torch adds two biases: the forget gate's add up to 1
                nn.init.zeros_(parameter)
            if name.startswith("bias_ih"):
                nn.init.ones_(parameter[h : 2 * h])
        for matrix in (self.embedding, self.out, self.head):
            if matrix is not None:
                nn.init.normal_(matrix.weight, std=matrix.weight.shape[1] ** -0.5)

    @classmethod
    def check_training(cls, config: LSTMConfig, *, packed: bool, compiled: bool, recompute: RecomputeSetting) -> None:
        if packed and config.carry_state:
            raise IncompatibleError("data.packed: model.carry_state carries a state along whole rows; use false")
        if compiled:
            raise IncompatibleError("trainer.compile: torch does not compile its LSTM (model=lstm); use false")
        if recompute not in ("none", "auto"):
            raise IncompatibleError("trainer.recompute: an LSTM's layers are not run again (model=lstm); use none")

    @classmethod
    def carrying(cls, config: LSTMConfig, attention: Literal["none"]) -> str:
        return "model.carry_state: an LSTM carries its state" if config.carry_state else ""

    @property
    def carries(self) -> bool:
        return bool(self.config.carry_state)

    def new_cache(self) -> LSTMState:
        return LSTMState()

    def new_streaming_cache(self, *, sinks: int, window: int) -> NoReturn:
        raise IncompatibleError(
            "decoding.cache: an LSTM's state has one size however long the text (model=lstm); use full"
        )

    def new_memory(self, rows: int) -> SegmentMemory:
        """Of each layer the hidden and the cell state, as the one token that is remembered."""
        return SegmentMemory(2 * self.config.n_layers, rows, 1, self.config.d_hidden, self.embedding.weight.device)

    def hidden(
        self,
        tokens: Tensor,
        *,
        lengths: Tensor | None = None,
        segments: Segments | None = None,
        cache: LSTMState | None = None,
        memory: SegmentMemory | None = None,
    ) -> Tensor:
        if sum(given is not None for given in (segments, cache, memory)) > 1:
            raise ValueError("LSTM: a packed batch, a cache and a memory do not go together")
        dtype = self._compute_dtype()
        x = self.dropout(self.embedding(tokens))  # (B,T,d)
        with torch.autocast("cpu", enabled=False):
            if segments is not None:
                y = self._documents(x, segments)
            elif cache is not None:
                y, state = self.layers(x, cache.state)
                cache.advance(state, tokens.shape[1])
            elif memory is not None:
                y, state = self.layers(x, _recalled(memory, x))
                rows = torch.arange(len(tokens), device=x.device)
                memory.append(rows, [part.unsqueeze(1) for part in torch.cat(state)])  # 2 L times (B,1,h)
            else:
                y, _ = self.layers(x)  # (B,T,h)
        y = self.dropout(y)
        return y.to(dtype) if self.out is None else self.out(y)

    def compile_blocks(self) -> NoReturn:
        raise IncompatibleError("trainer.compile: torch does not compile its LSTM (model=lstm); use false")

    def _documents(self, x: Tensor, segments: Segments) -> Tensor:
        """Every document of a packed batch (B,T,d) as a sequence of its own: (B,T,h), 0 where there is none.

        torch wants their tokens in the order in which it reads them: the first of each, longest document first, then the
        second of those that have one. Nothing is padded.
        """
        B, T, _ = x.shape
        pieces = pieces_of(segments, B, T)
        sizes = torch.tensor([size for size, _ in pieces])
        scored = torch.tensor([is_document for _, is_document in pieces]).repeat_interleave(sizes)
        starts = sizes.cumsum(0) - sizes
        step = torch.arange(B * T) - starts.repeat_interleave(sizes)  # of each token, within its document
        rank = sizes.argsort(descending=True, stable=True).argsort().repeat_interleave(sizes)
        place = scored.nonzero()[:, 0]
        place = place[(step * len(pieces) + rank)[place].argsort()]
        packed = PackedSequence(x.flatten(0, 1)[place.to(x.device)], step[place].bincount())
        y = self.layers(packed)[0].data
        return y.new_zeros(B * T, y.shape[1]).index_copy(0, place.to(x.device), y).unflatten(0, (B, T))


def _recalled(memory: SegmentMemory, x: Tensor) -> State:
    """The states (L,B,h) that the rows of x were left in, zeros for those that begin something new."""
    held = memory.held.to(x.device)[:, None] > 0
    whole = (torch.stack([layer[:, 0] for layer in memory.layers]) * held).to(x.dtype)  # (2L,B,h)
    hidden, cell = whole.chunk(2)
    return hidden, cell
