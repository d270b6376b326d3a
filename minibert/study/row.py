"""One text of a trace: its tensors without the batch, without padding, in float32."""

from torch import Tensor

from minibert.loss import IGNORE
from minibert.trace.table import SHAPES, expected_shape, row_of
from minibert.trace.tracefile import Trace


class Row:
    """Text number `number` of a trace. Raises ValueError if there is no such text, or no token in it."""

    def __init__(self, trace: Trace, number: int = 0) -> None:
        inputs, _ = trace.inputs()
        rows = len(inputs.input_ids)
        if not 0 <= number < rows:
            raise ValueError(f"{trace.name} has the texts 0 to {rows - 1}, and no text {number}")
        self.trace, self.number, self.config = trace, number, trace.config
        self.shape = tuple(inputs.input_ids.shape)
        self.kept = inputs.attention_mask[number].nonzero().flatten()  # (S,): the columns that are tokens
        if not len(self.kept):
            raise ValueError(f"text {number} of {trace.name} is padding alone")
        self.ids: list[int] = inputs.input_ids[number, self.kept].tolist()
        self.positions: list[int] = self.kept.tolist()
        self.segments: list[int] = inputs.token_type_ids[number, self.kept].tolist()
        # The model is asked where a label is another token than the one that stands there.
        labels = self.ids if inputs.labels is None else inputs.labels[number, self.kept].tolist()
        self.asked = [place for place, label in enumerate(labels) if label not in (IGNORE, self.ids[place])]

    def has(self, *names: str) -> bool:
        found = self.trace.shapes()
        return all(name in found for name in names)

    def read(self, name: str) -> Tensor:
        """A tensor in float32, B gone and S the tokens alone: "layers.0.value" is (H, S, K).

        Raises ValueError if its shape is another than the trace's config says, or a number in it is not finite.
        """
        shape = self.trace.shapes()[name]
        wanted = expected_shape(name, self.config, self.shape)
        if shape != wanted:
            raise ValueError(f"{self.trace.name}: {name} is {shape}, and must be {wanted}")
        x = self.trace.rows(name, self.number, self.number + 1)[0]
        for axis, letter in enumerate(SHAPES[row_of(name)][1:]):
            if letter == "S" and len(self.kept) < self.shape[1]:
                x = x.index_select(axis, self.kept)
        if not bool(x.isfinite().all()):
            raise ValueError(f"{self.trace.name}: {name} holds numbers that are not finite: a weight is broken")
        return x.float()
