"""PackedBatch: what is kept, where it stands, and that no sequence notices the others or the padding."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minibert import (
    BertConfig,
    BertForMaskedLM,
    FillMask,
    PackedBatch,
    checks,
    mask_tokens,
    masked_lm_loss,
    pseudo_log_likelihood,
)
from minibert.checks import require_positions
from minibert.fill_mask import batches_by_length
from minibert.inference.onednn import filled_up
from minibert.tokenizer import from_vocabulary

LONGEST = 13
CONFIG = BertConfig(
    vocab_size=99,
    hidden_size=20,
    num_hidden_layers=3,
    num_attention_heads=5,
    intermediate_size=37,
    max_position_embeddings=LONGEST,
    type_vocab_size=2,
    initializer_range=0.3,  # large enough that attention matters
)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return BertForMaskedLM(CONFIG).eval().double()


def close(actual, expected):
    """float64: what is left is the order of the sums in two kernels, some 1e-15 a step."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-11)


def random_ids(rows, length, seed=0):
    return torch.randint(1, 99, (rows, length), generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------------- hand-written

IDS = torch.tensor([[11, 12, 13, 14], [21, 0, 22, 0], [0, 0, 0, 0], [0, 31, 32, 33]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0], [0, 1, 1, 1]])


def test_indices_of_a_small_batch():
    batch = PackedBatch.from_padded(IDS, MASK, token_type_ids=IDS // 10 - 1)
    assert batch.input_ids.tolist() == [11, 12, 13, 14, 21, 22, 31, 32, 33]
    assert batch.token_type_ids.tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 2]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 0, 2, 1, 2, 3], "the column, whatever the mask says"
    assert batch.cu_seqlens.tolist() == [0, 4, 6, 6, 9]
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.lengths == (4, 2, 0, 3)
    assert batch.padded_shape == (4, 4)
    assert batch.padded_index.tolist() == [0, 1, 2, 3, 4, 6, 13, 14, 15]
    assert batch.compact_index.tolist() == [0, 1, 2, 3, 4, 5, 12, 13, 14]
    assert batch.is_token.int().tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 0]]
    assert batch.max_seqlen == 4
    assert not batch.uniform
    assert batch.largest == (33, 2, 3)
    assert (batch.num_tokens, batch.num_sequences) == (9, 4)


def test_indices_where_the_rows_of_one_length_have_holes():
    batch = PackedBatch.from_padded(torch.tensor([[5, 0, 6], [0, 7, 8]]), torch.tensor([[1, 0, 1], [0, 1, 1]]))
    assert batch.uniform
    assert batch.max_seqlen == 2
    assert batch.compact_index.tolist() == [0, 1, 2, 3]
    assert batch.padded_index.tolist() == [0, 2, 4, 5]
    assert batch.is_token.all()


def test_without_a_mask_every_token_is_kept():
    batch = PackedBatch.from_padded(IDS)
    assert batch.lengths == (4, 4, 4, 4)
    assert batch.uniform
    assert batch.input_ids.tolist() == IDS.flatten().tolist()
    assert batch.token_type_ids.tolist() == [0] * 16
    assert batch.position_ids.tolist() == [0, 1, 2, 3] * 4


def test_own_positions_for_all_rows_or_for_each():
    shared = torch.tensor([[3, 1, 2, 0]])
    each = shared.expand(4, 4)
    for positions in (shared, each):
        batch = PackedBatch.from_padded(IDS, MASK, position_ids=positions)
        assert batch.position_ids.tolist() == [3, 1, 2, 0, 3, 2, 1, 2, 0]


def test_lists_of_a_small_batch():
    batch = PackedBatch.from_lists([[5, 6], [], [7, 8, 9]], [[0, 1], [], [1, 1, 0]])
    assert batch.input_ids.tolist() == [5, 6, 7, 8, 9]
    assert batch.token_type_ids.tolist() == [0, 1, 1, 1, 0]
    assert batch.position_ids.tolist() == [0, 1, 0, 1, 2]
    assert batch.cu_seqlens.tolist() == [0, 2, 2, 5]
    assert batch.padded_shape == (3, 3)
    assert batch.padded_index.tolist() == [0, 1, 6, 7, 8]


# -------------------------------------------------------------------------------------------------------- round trips


@st.composite
def masks(draw):
    """(B, S) of 0 and 1: dense, padded right or left, with holes, with empty rows, without rows."""
    rows, length = draw(st.integers(0, 5)), draw(st.integers(0, 9))
    kind = draw(st.sampled_from(["dense", "right", "left", "holes"]))
    lengths = draw(st.lists(st.integers(0, length), min_size=rows, max_size=rows))
    mask = torch.zeros(rows, length, dtype=draw(st.sampled_from([torch.int64, torch.bool, torch.int32, torch.uint8])))
    for row, n in enumerate(lengths):
        if kind == "dense":
            mask[row] = 1
        elif kind == "holes":
            mask[row] = torch.tensor(draw(st.lists(st.integers(0, 1), min_size=length, max_size=length))).to(mask.dtype)
        else:
            mask[row, slice(0, n) if kind == "right" else slice(length - n, length)] = 1
    if mask.numel() and not mask.any():  # no token at all is an error
        mask[0, 0] = 1
    return mask


@settings(deadline=None, max_examples=100)
@given(masks(), st.sampled_from([(), (3,), (2, 3)]))
def test_pack_and_unpack_undo_each_other(mask, features):
    ids = random_ids(*mask.shape)
    batch = PackedBatch.from_padded(ids, mask)
    keep = mask.bool()
    assert batch.num_tokens == int(keep.sum()) == sum(batch.lengths)
    assert batch.lengths == tuple(keep.sum(1).tolist())
    assert torch.equal(batch.input_ids, ids[keep])
    assert torch.equal(batch.unpack(batch.input_ids), ids * keep)

    padded = torch.randn(*mask.shape, *features)
    packed = batch.pack(padded)
    assert torch.equal(packed, padded[keep])
    assert torch.equal(batch.pack(batch.unpack(packed)), packed)
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
        assert len(tensors) == 5
        assert {x.device.type for x in tensors} == {"meta"}
        assert moved.unpack(torch.empty(moved.num_tokens, 3, device="meta")).shape == (*moved.padded_shape, 3)


# ----------------------------------------------------------------------------------------- no sequence sees another one


@settings(deadline=None, max_examples=25)
@given(lists_of_ids)
def test_a_sequence_alone_gives_what_it_gives_in_company(model, lists):
    with torch.no_grad():
        hidden = model.encode(PackedBatch.from_lists(lists))
        alone = [model.encode(PackedBatch.from_lists([row])) for row in lists]
    close(hidden, torch.cat([hidden[:0], *alone]))


def test_padding_changes_nothing(model):
    ids = random_ids(3, 6)
    with torch.no_grad():
        expected = model(ids).logits
        wide = torch.full((3, 10), 98)
        for start in (0, 4):  # padded on the right, then on the left
            wide[:, start : start + 6] = ids
            mask = torch.zeros(3, 10, dtype=torch.int64)
            mask[:, start : start + 6] = 1
            positions = (torch.arange(10) - start).clamp(min=0)[None]
            logits = model(wide, mask, position_ids=positions).logits
            close(logits[:, start : start + 6], expected)
            assert (logits[mask == 0] == 0).all()


def test_what_stands_under_the_mask_is_never_read(model):
    mask = MASK
    with torch.no_grad():
        expected = model(IDS, mask).logits
        assert torch.equal(model(IDS.masked_fill(mask == 0, 10**6), mask).logits, expected)
        assert torch.equal(model(IDS.masked_fill(mask == 0, -5), mask).logits, expected)
        assert torch.equal(model(IDS, mask, token_type_ids=(1 - mask) * 9).logits, expected)


def test_predict_is_forward_where_asked(model):
    batch = PackedBatch.from_padded(IDS, MASK)
    positions = torch.tensor([8, 0, 4, 4])
    with torch.no_grad():
        logits = model.predict(batch, positions)
        close(logits, batch.pack(model(IDS, MASK).logits)[positions])
        assert model.predict(batch, positions[:0]).shape == (0, 99)


def test_a_fully_masked_row_gives_zeros_and_no_nan(model):
    labels = IDS.masked_fill(MASK == 0, -100)
    model.zero_grad()
    out = model(IDS, MASK, labels=labels)
    loss, logits = out.loss, out.logits
    assert (logits[2] == 0).all()
    assert torch.isfinite(logits).all()
    assert loss > 0
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


def test_a_batch_with_no_token_at_all_is_an_error_and_one_without_rows_has_a_loss_of_zero(model):
    for mask in (torch.zeros_like(MASK), torch.zeros_like(MASK).float()):  # a float one may be meant to be added
        with pytest.raises(ValueError, match=r"attention_mask.*token_type_ids="):
            model(IDS, mask, labels=torch.full_like(IDS, -100))
    out = model(IDS[:0], labels=IDS[:0])
    assert out.loss.item() == 0
    out.loss.backward()


@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (0, 0)])
def test_empty_batches_give_empty_logits(model, shape):
    assert model(torch.zeros(shape, dtype=torch.int64)).logits.shape == (*shape, 99)


# --------------------------------------------------------------------------------------------------------------- errors

ROW = torch.tensor([[1, 2, 3]])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"input_ids": ROW[0]}, r"input_ids must be \(batch, length\), not \(3,\): add the batch dimension"),
        ({"input_ids": ROW.float()}, "input_ids must hold integers, not torch.float32"),
        ({"input_ids": -ROW}, "input_ids may not be negative, but holds -3"),
        ({"input_ids": ROW + 96}, "token id 99 is unknown: the vocabulary has 99 entries, 0 to 98"),
        (
            {"input_ids": torch.ones(1, LONGEST + 1).long()},
            f"reaches {LONGEST + 1} tokens, and the model has positions for {LONGEST}",
        ),
        ({"attention_mask": torch.ones(1, 4).long()}, r"attention_mask is \(1, 4\), but input_ids is \(1, 3\)"),
        ({"attention_mask": torch.full((1, 3), 0.5)}, r"only 0 \(padding\) and 1 \(token\).*from 0\.5 to 0\.5"),
        ({"attention_mask": torch.tensor([[1, 2, 0]])}, "only 0 .* and 1 .*, but it ranges from 0 to 2"),
        ({"token_type_ids": torch.tensor([[0, 1, 2]])}, "token type 2 is unknown: the model has 2"),
        ({"token_type_ids": -ROW}, "token_type_ids may not be negative"),
        ({"token_type_ids": ROW[:, :2]}, r"token_type_ids is \(1, 2\)"),
        ({"position_ids": ROW + LONGEST - 3}, f"reaches {LONGEST + 1} tokens"),
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


def test_lists_that_do_not_fit():
    with pytest.raises(ValueError, match=r"token_type_ids has lengths \[1\], input_ids has \[2\]"):
        PackedBatch.from_lists([[1, 2]], [[0]])
    with pytest.raises(ValueError, match="input_ids may not be negative, but holds -4"):
        PackedBatch.from_lists([[1, -4]])
    with pytest.raises(ValueError, match=r"whole numbers, not torch\.float32"):
        PackedBatch.from_lists([[1.5]])
    with pytest.raises(ValueError, match="add up to 5, and input_ids has 3"):
        PackedBatch.from_flat(torch.tensor([1, 2, 3]), [2, 3])


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(model):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(95))]
    for ask in (FillMask, lambda *given: list(pseudo_log_likelihood(*given, ["w1"]))):
        ask(model, from_vocabulary(words[:99]))
        with pytest.raises(ValueError, match="the tokenizer has 100 tokens and the model 99"):
            ask(model, from_vocabulary(words))


@pytest.mark.parametrize("name", checks.HOLDS)
def test_an_argument_that_holds_anyway_takes_no_other_value(name, checkpoint, tmp_path):
    """As load_in_8bit=True, which would be ignored."""
    values = checks.HOLDS[name]
    other = next(value for value in (True, False, "another") if value not in values)
    if name in ("safe_serialization", "push_to_hub"):
        call, given = BertForMaskedLM.from_pretrained(checkpoint).save_pretrained, tmp_path
    else:
        call, given = BertForMaskedLM.from_pretrained, checkpoint
    for value in values:
        call(given, **{name: value})
    with pytest.raises(TypeError, match=f"{name}=.*{values[0]!r}.* only, not {other!r}: "):
        call(given, **{name: other})


@pytest.mark.parametrize("most", [1, 7, 100])
def test_texts_of_like_length_are_computed_together(most):
    lengths = [5, 1, 9, 1, 3, 3, 2]
    groups = list(batches_by_length(lengths, most))
    rows = [row for group in groups for row in group]
    assert sorted(rows) == list(range(7))
    assert [lengths[row] for row in rows] == sorted(lengths)
    assert all(len(group) == 1 or sum(lengths[row] for row in group) <= most for group in groups)
    assert len(groups) == {1: 7, 7: 4, 100: 1}[most]


@pytest.mark.parametrize(
    ("given", "shown"),
    [([101, 102], r"\[101, 102\]"), (5, "5"), (["ab"], r"\['ab'\]"), ([101] * 99, r"\[101, (101, )*10?1?,?…")],
)
def test_what_is_no_list_of_lists(given, shown):
    with pytest.raises(TypeError, match=rf"input_ids must be a list for each text, such as .*, not {shown}$"):
        PackedBatch.from_lists(given)
    with pytest.raises(TypeError, match=rf"token_type_ids must be a list for each text, .*, not {shown}$"):
        PackedBatch.from_lists([[1, 2]], given)


def test_packing_a_tensor_of_another_batch():
    batch = PackedBatch.from_padded(IDS, MASK)
    for wrong in (torch.zeros(4, 5), torch.zeros(3, 4, 2), torch.zeros(4)):
        with pytest.raises(ValueError, match=r"expected \(batch, length\) = \(4, 4\)"):
            batch.pack(wrong)


@pytest.mark.parametrize("positions", [[-1], [5], [0, 99]])
def test_positions_that_are_not_there(positions):
    batch = PackedBatch.from_lists([[1, 2, 3], [4, 5]])
    with pytest.raises(ValueError, match="count packed tokens, from 0 to 4"):
        require_positions(torch.tensor(positions), batch.num_tokens)
    for wrong in (torch.tensor(1), torch.tensor([True]), torch.tensor([1.0])):
        with pytest.raises(ValueError, match=r"\(M,\) whole numbers"):
            require_positions(wrong, batch.num_tokens)


def test_filled_up_with_a_sequence_of_its_own():
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    batch = PackedBatch.from_padded(torch.arange(1, 13).view(3, 4), mask)
    filled = filled_up(batch, 5)
    assert filled.lengths == (3, 0, 4, 5)
    assert filled.cu_seqlens.tolist() == [0, 3, 3, 7, 12]
    assert (filled.num_tokens, filled.num_sequences, filled.max_seqlen, filled.uniform) == (12, 4, 5, False)
    assert torch.equal(filled.input_ids[:7], batch.input_ids)
    assert torch.equal(filled.position_ids[:7], batch.position_ids)
    assert filled.unpack(torch.arange(12)).tolist() == [list(range(12))]
    assert batch.unpack(torch.arange(1, 8)).tolist() == [[1, 2, 3, 0], [0] * 4, [4, 5, 6, 7]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_a_mask_of_zeros_and_ones_may_be_of_floats(dtype):
    """As transformers takes it. Any other float is refused: it could be an additive mask, 0 where a token is."""
    ids, mask = torch.tensor([[5, 6, 7], [8, 9, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    got = PackedBatch.from_padded(ids, mask.to(dtype))
    assert torch.equal(got.input_ids, PackedBatch.from_padded(ids, mask).input_ids)
    for wrong in (-10000.0, 0.5, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="attention_mask may hold only 0"):
            PackedBatch.from_padded(ids, torch.where(mask == 1, 1.0, wrong).to(dtype))


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
        lambda: checks.require_positions(value, 2),
    ):
        with pytest.raises(TypeError, match=rf"must be a tensor, not {type(value).__name__}: torch\."):
            call()
