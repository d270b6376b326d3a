"""A prepared model on CUDA: what is compiled, and small batches as CUDA graphs.

For a small batch, launching the kernels takes longer than the kernels themselves. A CUDA graph is a recording of them
that is launched as a whole. It has fixed sizes, so batches are rounded up to a few sizes. The first batch of a size
runs as usual, the second is recorded, and from then on the recording is replayed.
"""

import warnings
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from threading import Lock

import torch
from torch import Tensor

from minibert.attention import forced_kernel, use_kernel
from minibert.packing import PackedBatch

GRAPH_TOKENS = 4096  # with more tokens than this the kernels take longer than their launching
GRAPHS = 64  # at most; batches of other sizes than theirs run without


def can_compile() -> bool:
    if find_spec("triton") is None:
        warnings.warn("Triton is not installed, so nothing is compiled: this is slower than it could be", stacklevel=4)
        return False
    return True


def has_flash_attention(weight: Tensor, head_size: int) -> bool:
    fits = weight.dtype in (torch.float16, torch.bfloat16) and head_size % 8 == 0 and head_size <= 256
    return fits and torch.cuda.get_device_capability(weight.device) >= (8, 0)


Predict = Callable[[PackedBatch, Tensor], Tensor]


class Graphs:
    """`predict` as CUDA graphs: one for each rounded size of a batch, captured when that size is seen a second time.

    The graphs share their memory. So only one thread at a time may use them, and all use one stream.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self.seen: Counter[tuple[int, int, int]] = Counter()
        self.captured: dict[tuple[int, int, int], CapturedPredict] = {}
        self.lock = Lock()

    def __call__(self, predict: Predict, batch: PackedBatch, positions: Tensor, longest: int) -> Tensor | None:
        """The logits (M, V); or None if the batch is too large for a graph, or the first of its size. longest: how long
        a sequence of this model can be.
        """
        if max(batch.num_tokens, len(positions)) > GRAPH_TOKENS or forced_kernel() is not None:
            return None
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():  # our caller, a graph of its own
            return None
        size = (_round_up(batch.num_tokens), _power_of_two(batch.num_sequences), _round_up(len(positions)))
        with self.lock:
            self.seen[size] += 1
            if size not in self.captured:
                if self.seen[size] == 1 or len(self.captured) == GRAPHS:
                    return None
                self.captured[size] = CapturedPredict(self, predict, size, longest)
            return self.captured[size](batch, positions)


class CapturedPredict:
    """One CUDA graph, and the tensors that it reads. A smaller batch fills only the first places of these. What is left
    in the others does no harm: attention looks at no token outside a sequence, and their logits are not returned.
    """

    def __init__(self, graphs: Graphs, predict: Predict, size: tuple[int, int, int], longest: int) -> None:
        tokens, sequences, asked = size

        def zeros(size: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=graphs.device)

        with torch.inference_mode(False):  # so that they can be written to in any mode
            self.positions = zeros(asked)
            self.batch = PackedBatch(
                input_ids=zeros(tokens),
                token_type_ids=zeros(tokens),
                position_ids=zeros(tokens),
                cu_seqlens=zeros(sequences + 1, torch.int32),
                lengths=(longest,) + (0,) * (sequences - 1),  # flash attention reads their number and the longest
                padded_shape=(0, 0),  # this and what follows is not read
                padded_index=zeros(0),
                largest=(0, 0, 0),
            )

        def run() -> Tensor:
            with torch.inference_mode(), use_kernel("varlen"):
                return predict(self.batch, self.positions)

        self.replay, self.logits = capture(run, graphs)

    def __call__(self, batch: PackedBatch, positions: Tensor) -> Tensor:
        tokens, sequences, asked = batch.num_tokens, batch.num_sequences, len(positions)
        with torch.inference_mode():
            self.batch.input_ids[:tokens] = batch.input_ids
            self.batch.token_type_ids[:tokens] = batch.token_type_ids
            self.batch.position_ids[:tokens] = batch.position_ids
            self.batch.cu_seqlens[: sequences + 1] = batch.cu_seqlens
            self.batch.cu_seqlens[sequences + 1 :] = tokens  # sequences of no token
            # A position outside the batch must fail in the indexing. It must not find one of the tokens after its end.
            inside = (positions >= 0) & (positions < tokens)
            self.positions[:asked] = torch.where(inside, positions, self.batch.num_tokens)
            self.replay()
        return self.logits[:asked].clone()


def capture(run: Callable[[], Tensor], graphs: Graphs) -> tuple[Callable[[], None], Tensor]:
    """`run` as a CUDA graph: a function that replays it, and the tensor that then holds its result."""
    with torch.cuda.device(graphs.device), torch.inference_mode(False):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # first calls compile, and allocate work space
            run()
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may use CUDA meanwhile: only the calls of this thread are captured.
        with torch.cuda.graph(graph, pool=graphs.pool, stream=stream, capture_error_mode="thread_local"):
            result = run()
    return graph.replay, result


def _round_up(number: int) -> int:
    """To a multiple of 64 or, from 1024 on, of a sixteenth of the power of two above: less than an eighth is added."""
    step = max(64, _power_of_two(number) // 16)
    return -(-number // step) * step


def _power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()
