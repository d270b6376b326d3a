"""PackedBatch: what is kept, where it stands, and that no sequence notices the others or the padding."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minibert import BertConfig, BertForMaskedLM, PackedBatch, checks, mask_tokens, masked_lm_loss
from minibert.checks import require_positions
from minibert.fill_mask import batches_by_length

LONGEST = 13
IDS = torch.tensor([[11, 12, 13, 14], [21, 0, 22, 0], [0, 0, 0, 0], [0, 31, 32, 33]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0], [0, 1, 1, 1]])
ROW = torch.tensor([[1, 2, 3]])


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = dict(hidden_size=20, num_hidden_layers=3, num_attention_heads=5, intermediate_size=37)
    wide = 0.3  # large enough that attention matters
    config = BertConfig(vocab_size=99, max_position_embeddings=LONGEST, initializer_range=wide, **sizes)
    return BertForMaskedLM(config).eval().double()


def close(actual, expected):
    """float64: what is left is the order of the sums in two kernels, some 1e-15 a step."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-11)


# ---------------------------------------------------------------------------------------------------- what it holds


def test_indices_of_a_small_batch():
    batch = PackedBatch.from_padded(IDS, MASK, token_type_ids=IDS // 10 - 1)
    assert batch.input_ids.tolist() == [11, 12, 13, 14, 21, 22, 31, 32, 33]
    assert batch.token_type_ids.tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 2]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 0, 2, 1, 2, 3], "the column, whatever the mask says"
    assert batch.cu_seqlens.tolist() == [0, 4, 6, 6, 9]
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.padded_index.tolist() == [0, 1, 2, 3, 4, 6, 13, 14, 15]
    assert batch.is_token.int().tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 0]]
    assert (batch.lengths, batch.padded_shape, batch.max_seqlen) == ((4, 2, 0, 3), (4, 4), 4)
    assert (batch.largest, batch.num_tokens, batch.num_sequences) == ((33, 2, 3), 9, 4)
    for wrong in (torch.zeros(4, 5), torch.zeros(3, 4, 2), torch.zeros(4)):
        with pytest.raises(ValueError, match=r"expected \(batch, length\) = \(4, 4\)"):
            batch.pack(wrong)
    shared = torch.tensor([[3, 1, 2, 0]])
    for positions in (shared, shared.expand(4, 4)):
        batch = PackedBatch.from_padded(IDS, MASK, position_ids=positions)
        assert batch.position_ids.tolist() == [3, 1, 2, 0, 3, 2, 1, 2, 0]


@st.composite
def masks(draw):
    """(B, S) of 0 and 1: dense, padded right or left, with holes, with empty rows, without rows."""
    rows, length = draw(st.integers(0, 5)), draw(st.integers(0, 9))
    kind = draw(st.sampled_from(["dense", "right", "left", "holes"]))
    mask = torch.zeros(rows, length, dtype=draw(st.sampled_from([torch.int64, torch.bool, torch.uint8, torch.float16])))
    for row in mask:
        n = draw(st.integers(0, length))
        if kind == "holes":
            row[:] = torch.tensor(draw(st.lists(st.integers(0, 1), min_size=length, max_size=length)))
        else:
            row[{"dense": slice(None), "right": slice(0, n), "left": slice(length - n, length)}[kind]] = 1
    if mask.numel() and not mask.any():  # no token at all is an error
        mask[0, 0] = 1
    return mask


@settings(deadline=None, max_examples=100)
@given(masks(), st.sampled_from([(), (3,), (2, 3)]))
def test_pack_and_unpack_undo_each_other(mask, features):
    ids, keep = torch.randint(1, 99, mask.shape), mask.bool()
    batch = PackedBatch.from_padded(ids, mask)
    assert batch.lengths == tuple(keep.sum(1).tolist())
    assert torch.equal(batch.input_ids, ids[keep])
    assert torch.equal(batch.unpack(batch.input_ids), ids * keep)
    padded = torch.randn(*mask.shape, *features)
    packed = batch.pack(padded)
    assert torch.equal(packed, padded[keep])
    assert torch.equal(batch.unpack(packed)[keep], packed)
    assert (batch.unpack(packed)[~keep] == 0).all()

    # the rectangle that attention uses: the same tokens, pushed to the left
    rectangle = torch.zeros(len(mask) * batch.max_seqlen, dtype=torch.int64)
    rectangle[batch.compact_index] = batch.input_ids
    rectangle = rectangle.view(len(mask), batch.max_seqlen)
    assert torch.equal(rectangle != 0, batch.is_token)
    for row, kept in enumerate(keep):
        assert rectangle[row][: batch.lengths[row]].tolist() == ids[row][kept].tolist()
    assert batch.uniform == (len(set(batch.lengths)) <= 1)


lists_of_ids = st.lists(st.lists(st.integers(0, 98), max_size=LONGEST), max_size=5)


def assert_same_batch(first, second):
    for name in ("input_ids", "token_type_ids", "position_ids", "cu_seqlens", "padded_index"):
        one, other = getattr(first, name), getattr(second, name)
        assert one.dtype == other.dtype, name
        assert one.tolist() == other.tolist(), name
    assert (first.lengths, first.padded_shape, first.largest) == (second.lengths, second.padded_shape, second.largest)


@settings(deadline=None, max_examples=50)
@given(lists_of_ids)
def test_lists_are_the_right_padded_batch(lists):
    longest = max(map(len, lists), default=0)
    types = [[number % 2 for number in row] for row in lists]

    def rectangle(rows, fill):
        return torch.tensor([row + [fill] * (longest - len(row)) for row in rows]).long().view(len(rows), longest)

    mask = rectangle([[1] * len(row) for row in lists], 0)
    padded = PackedBatch.from_padded(rectangle(lists, 0).int(), mask, rectangle(types, 1).to(torch.uint8))
    assert_same_batch(PackedBatch.from_lists(lists, types), padded)


def test_to_a_device_keeps_everything():
    batch = PackedBatch.from_padded(IDS, MASK)
    assert_same_batch(batch.to("cpu"), batch)
    for moved in (batch.to("meta"), PackedBatch.from_lists([[1, 2], [3]], device="meta")):
        tensors = [value for value in vars(moved).values() if isinstance(value, torch.Tensor)]
        assert [x.device.type for x in tensors] == ["meta"] * 5
        assert moved.unpack(torch.empty(moved.num_tokens, 3, device="meta")).shape == (*moved.padded_shape, 3)


@pytest.mark.parametrize(
    ("most", "groups"),
    [
        (1, [[1], [3], [6], [4], [5], [0], [2]]),
        (7, [[1, 3, 6, 4], [5], [0], [2]]),
        (100, [[1, 3, 6, 4, 5, 0, 2]]),
    ],
)
def test_texts_of_like_length_are_computed_together(most, groups):
    """The texts' numbers, of at most so many tokens together."""
    assert list(map(list, batches_by_length([5, 1, 9, 1, 3, 3, 2], most))) == groups


# ----------------------------------------------------------------------------------------- no sequence sees another one


@settings(deadline=None, max_examples=25)
@given(lists_of_ids)
@torch.no_grad()
def test_a_sequence_alone_gives_what_it_gives_in_company(model, lists):
    hidden = model.encode(PackedBatch.from_lists(lists))
    close(hidden, torch.cat([hidden[:0], *(model.encode(PackedBatch.from_lists([row])) for row in lists)]))


@torch.no_grad()
def test_what_stands_under_the_mask_is_never_read(model):
    expected = model(IDS, MASK).logits
    for other in (10**6, -5):
        assert torch.equal(model(IDS.masked_fill(MASK == 0, other), MASK).logits, expected)
    assert torch.equal(model(IDS, MASK, token_type_ids=(1 - MASK) * 9).logits, expected)


def test_a_fully_masked_row_gives_zeros_and_no_nan(model):
    model.zero_grad()
    out = model(IDS, MASK, labels=IDS.masked_fill(MASK == 0, -100))
    assert (out.logits[2] == 0).all()
    assert torch.isfinite(out.logits).all()
    out.loss.backward()
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name


def test_empty_batches(model):
    for mask in (torch.zeros_like(MASK), torch.zeros_like(MASK).float()):  # a float one may be meant to be added
        with pytest.raises(ValueError, match=r"attention_mask.*token_type_ids="):
            model(IDS, mask)
    for shape in ((0, 4), (2, 0), (0, 0)):
        assert model(torch.zeros(shape, dtype=torch.int64)).logits.shape == (*shape, 99)
    loss = model(IDS[:0], labels=IDS[:0]).loss
    assert loss.item() == 0
    loss.backward()


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"input_ids": ROW[0]}, r"input_ids must be \(batch, length\), not \(3,\): add the batch dimension"),
        ({"input_ids": ROW.float()}, "input_ids must hold integers, not torch.float32"),
        ({"input_ids": -ROW}, "input_ids may not be negative, but holds -3"),
        ({"input_ids": ROW + 96}, "token id 99 is unknown: the vocabulary has 99 entries"),
        ({"input_ids": torch.ones(1, 14).long()}, "reaches 14 tokens, and the model has positions for 13"),
        ({"attention_mask": torch.ones(1, 4).long()}, r"attention_mask is \(1, 4\), but input_ids is \(1, 3\)"),
        ({"attention_mask": torch.full((1, 3), 0.5)}, r"only 0 \(padding\) and 1 \(token\).*from 0\.5 to 0\.5"),
        ({"attention_mask": torch.tensor([[1, 2, 0]])}, "only 0 .* and 1 .*, but it ranges from 0 to 2"),
        ({"attention_mask": torch.tensor([[0, -10000, 0]]).half()}, "only 0"),
        ({"attention_mask": torch.tensor([[1, torch.nan, 1]])}, "only 0"),
        ({"token_type_ids": torch.tensor([[0, 1, 2]])}, "token type 2 is unknown: the model has 2"),
        ({"token_type_ids": -ROW}, "token_type_ids may not be negative"),
        ({"token_type_ids": ROW[:, :2]}, r"token_type_ids is \(1, 2\)"),
        ({"position_ids": ROW + 10}, "reaches 14 tokens"),
        ({"position_ids": -ROW}, "position_ids may not be negative"),
        ({"position_ids": ROW[0]}, r"position_ids is \(3,\)"),
        ({"labels": ROW[:, :2]}, r"labels is \(1, 2\), but input_ids is \(1, 3\)"),
        ({"labels": ROW + 96}, "label 99 is not an id below 99.*-100"),
        ({"labels": ROW, "attention_mask": torch.tensor([[1, 0, 0]])}, "2 labels stand where attention_mask is 0"),
    ],
)
def test_the_model_says_what_is_wrong(model, arguments, words):
    with pytest.raises(ValueError, match=words):
        model(**{"input_ids": ROW, **arguments})


LISTS = PackedBatch.from_lists


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda: LISTS([[1, 2]], [[0]]), ValueError, r"token_type_ids has lengths \[1\], input_ids has \[2\]"),
        (lambda: LISTS([[1, -4]]), ValueError, "input_ids may not be negative, but holds -4"),
        (lambda: LISTS([[1.5]]), ValueError, r"whole numbers, not torch\.float32"),
        (lambda: PackedBatch.from_flat(ROW[0], [2, 3]), ValueError, "add up to 5, and input_ids has 3"),
        (lambda: require_positions(torch.tensor([-1]), 5), ValueError, "count packed tokens, from 0 to 4"),
        (lambda: require_positions(torch.tensor([0, 5]), 5), ValueError, "count packed tokens, from 0 to 4"),
        (lambda: require_positions(torch.tensor(1), 5), ValueError, r"\(M,\) whole numbers"),
        (lambda: require_positions(torch.tensor([True]), 5), ValueError, r"\(M,\) whole numbers"),
        (lambda: require_positions(torch.tensor([1.0]), 5), ValueError, r"\(M,\) whole numbers"),
        (lambda: LISTS([101, 102]), TypeError, r"input_ids must be a list for each text, .*, not \[101, 102\]$"),
        (lambda: LISTS(["ab"]), TypeError, r"input_ids must be a list for each text, .*, not \['ab'\]$"),
        (lambda: LISTS([[1]], [101] * 99), TypeError, r"token_type_ids must .*, not \[101, (101, )*10?1?,?…$"),
    ],
)
def test_lists_and_positions_that_do_not_fit(call, kind, words):
    with pytest.raises(kind, match=words):
        call()


@pytest.mark.parametrize("value", [[[5, 6]], np.array([[5, 6]]), "text"], ids=["list", "array", "str"])
def test_what_is_no_tensor_gets_a_sentence(value):
    ids = torch.tensor([[5, 6]])
    for call in (
        lambda: PackedBatch.from_padded(value),
        lambda: PackedBatch.from_padded(ids, value),
        lambda: mask_tokens(value, ids, vocab_size=9, mask_token_id=3),
        lambda: mask_tokens(ids, value, vocab_size=9, mask_token_id=3),
        lambda: masked_lm_loss(value, ids),
        lambda: masked_lm_loss(torch.zeros(1, 2, 9), value),
        lambda: require_positions(value, 2),
    ):
        with pytest.raises(TypeError, match=rf"must be a tensor, not {type(value).__name__}: torch\."):
            call()


@pytest.mark.parametrize("name", checks.HOLDS)
def test_an_argument_that_holds_anyway_takes_no_other_value(name, checkpoint, tmp_path):
    """As load_in_8bit=True, which would be ignored."""
    values = checks.HOLDS[name]
    other = next(value for value in (True, False, "another") if value not in values)
    call, given = BertForMaskedLM.from_pretrained, checkpoint
    if name in ("safe_serialization", "push_to_hub"):
        call, given = BertForMaskedLM.from_pretrained(checkpoint).save_pretrained, tmp_path
    for value in values:
        call(given, **{name: value})
    with pytest.raises(TypeError, match=f"{name}=.*{values[0]!r}.* only, not {other!r}: "):
        call(given, **{name: other})
