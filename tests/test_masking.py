"""Masking against transformers' DataCollatorForLanguageModeling, token for token; and the loss.

Proportions are checked to five standard deviations of the binomial: a right recipe fails once in 1.7 million
draws, and the seeds are fixed.
"""

import math
import warnings
from itertools import product

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import BertTokenizer, DataCollatorForLanguageModeling
from transformers.loss.loss_utils import ForMaskedLMLoss

from minibert import mask_tokens, masked_lm_loss
from minibert.masking import Outcome, example_generator, mask_packed

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PIECES = ["un", "##believ", "##able", "play", "##ing", "##s", "the", "rain", "in", "spain", "'", ".", ","]
VOCAB = SPECIAL + PIECES + [f"word{number}" for number in range(81)]
SIZE, MASK = len(VOCAB), VOCAB.index("[MASK]")
RECIPES = [(0.8, 0.1), (1, 0), (0.8, 0.0), (0, 1), (0, 0), (0.9, 0.1)]  # whole numbers too
SEEDS = range(8)


@pytest.fixture(scope="module")
def hub_tokenizer():
    if transformers.__version__.startswith("4."):
        pytest.skip("a BertTokenizer is made from a vocabulary since transformers 5")
    return BertTokenizer(vocab={token: number for number, token in enumerate(VOCAB)})


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def draw_ids(shape, seed):
    """Ordinary ids, with [CLS] first, [SEP] last and some padding, and the mask of the special ones."""
    ids = torch.randint(len(SPECIAL), SIZE, shape, generator=seeded(seed))
    ids[:, 0], ids[:, -1] = VOCAB.index("[CLS]"), VOCAB.index("[SEP]")
    ids[::2, -3:] = VOCAB.index("[PAD]")
    return ids, ids < len(SPECIAL)


def mask(ids, special, seed=0, **options):
    return mask_tokens(ids, special, vocab_size=SIZE, mask_token_id=MASK, generator=seeded(seed), **options)


# ------------------------------------------------------------------------------------------------- the collator's draws


@pytest.mark.parametrize(("mask_fraction", "random_fraction"), RECIPES)
def test_same_tokens_as_the_collator(hub_tokenizer, mask_fraction, random_fraction):
    for seed in SEEDS:
        probability = (0.15, 0.5, 1, 0)[seed % 4]
        collator = DataCollatorForLanguageModeling(
            hub_tokenizer,
            mlm_probability=probability or 1e-30,  # it refuses 0
            mask_replace_prob=mask_fraction,
            random_replace_prob=random_fraction,
            seed=seed,
        )
        shares = dict(probability=probability, mask_fraction=mask_fraction, random_fraction=random_fraction)
        generator = seeded(seed)
        for number in range(2):  # the generator goes on from one batch to the next, as the collator's does
            ids, special = draw_ids((3, 19), seed + 100 * number)
            theirs = collator([{"input_ids": row.tolist()} for row in ids])
            ours = mask_tokens(ids, special, vocab_size=SIZE, mask_token_id=MASK, generator=generator, **shares)
            assert ours.input_ids.tolist() == theirs["input_ids"].tolist()
            assert ours.labels.tolist() == theirs["labels"].tolist()


def words_by_offsets(offsets, special):
    """The collator's notion of a word: tokens that touch in the text. Written out here a token at a time."""
    words = torch.full(special.shape, -1)
    for row, place in special.eq(0).nonzero().tolist():
        touches = place > 0 and not special[row, place - 1] and offsets[row, place, 0] == offsets[row, place - 1, 1]
        words[row, place] = words[row, place - 1] if touches else words[row].max() + 1
    return words


def test_whole_words_are_the_collators(hub_tokenizer):
    texts = [
        "unbelievable rain plays in spain's unbelievable rain.",
        "the rain, the rain in spain, unbelievables plays un",
        "play playing plays unbelieving the rain.",
    ]
    encoded = hub_tokenizer(
        texts, padding=True, return_tensors="pt", return_special_tokens_mask=True, return_offsets_mapping=True
    )
    assert encoded["input_ids"].eq(VOCAB.index("##able")).any(), "the texts have words of several tokens"
    given = encoded["input_ids"], encoded["special_tokens_mask"]
    words = words_by_offsets(encoded["offset_mapping"], encoded["special_tokens_mask"])
    rows = [
        {key: encoded[key][row] for key in ("input_ids", "special_tokens_mask", "offset_mapping")} for row in range(3)
    ]
    for seed in SEEDS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it says that it replaces by [MASK] only
            collator = DataCollatorForLanguageModeling(
                hub_tokenizer, whole_word_mask=True, mlm_probability=0.3, seed=seed
            )
        theirs = collator([dict(row) for row in rows])
        ours = mask(*given, seed, probability=0.3, mask_fraction=1.0, random_fraction=0.0, word_ids=words)
        assert ours.input_ids.tolist() == theirs["input_ids"].tolist()
        assert ours.labels.tolist() == theirs["labels"].tolist()


# ---------------------------------------------------------------------------------------------------------- proportions


def assert_share(count, total, share):
    """Within five standard deviations of the binomial."""
    assert abs(count - total * share) <= 5 * math.sqrt(total * share * (1 - share)), f"{count} of {total}, not {share}"


def assert_recipe(outcome, could_be):
    """15 %, and of these 80, 10 and 10 %."""
    chosen = int((outcome >= Outcome.MASK).sum())
    assert_share(int((outcome[could_be] >= Outcome.MASK).sum()), int(could_be.sum()), 0.15)
    for code, share in ((Outcome.MASK, 0.8), (Outcome.RANDOM, 0.1), (Outcome.KEPT, 0.1)):
        assert_share(int((outcome == code).sum()), chosen, share)


@pytest.mark.parametrize("seed", range(3))
def test_bert_recipe_is_15_percent_and_80_10_10(seed):
    ids, special = draw_ids((400, 128), seed)
    assert_recipe(mask(ids, special, seed).outcome, ~special)
    first = torch.rand(ids.shape, generator=seeded(seed + 1000)) < 0.5  # of words of one to four tokens
    first[:, ::4] = True
    outcome = mask(ids, torch.zeros_like(ids), seed, word_ids=first.cumsum(1)).outcome
    assert_recipe(outcome, first)
    mixed = (outcome[:, 1:] != outcome[:, :-1]) & ~first[:, 1:] & (outcome[:, 1:] >= Outcome.MASK)
    assert mixed.any(), "the tokens of one word are replaced each on its own account"


def test_random_replacement_draws_from_the_whole_vocabulary_evenly():
    ids, special = draw_ids((400, 128), 3)
    masked = mask(ids, special, probability=1.0, mask_fraction=0.0, random_fraction=1.0)
    drawn = masked.input_ids[masked.outcome == Outcome.RANDOM]
    for count in drawn.bincount(minlength=SIZE).tolist():
        assert_share(count, len(drawn), 1 / SIZE)


# ------------------------------------------------------------------------------------------------- what always holds

shapes = st.tuples(st.integers(0, 5), st.integers(0, 12))


@settings(deadline=None, max_examples=80)
@given(shapes, st.integers(0, 2**32), st.floats(0, 1), st.sampled_from(RECIPES), st.booleans())
def test_ids_labels_and_outcomes_agree(shape, seed, probability, recipe, whole_words):
    generator = seeded(seed + 1)
    ids = torch.randint(SIZE, shape, generator=generator)
    special = torch.rand(shape, generator=generator) < 0.3
    words = torch.randint(-1, 2, shape, generator=generator) if whole_words else None
    before = [x.clone() for x in (ids, special, words) if x is not None]
    options = {"probability": probability, "mask_fraction": recipe[0], "random_fraction": recipe[1], "word_ids": words}
    new, labels, outcome = mask(ids, special, seed, **options)

    assert all(torch.equal(x, y) for x, y in zip((ids, special, words), before, strict=False)), "arguments untouched"
    assert new.shape == labels.shape == outcome.shape == ids.shape
    assert (new.dtype, labels.dtype, outcome.dtype) == (torch.int64, torch.int64, torch.int8)
    eligible = ~special if words is None else ~special & (words >= 0)
    chosen = outcome >= Outcome.MASK
    assert torch.equal(outcome == Outcome.NOT_ELIGIBLE, ~eligible)
    assert torch.equal(labels, torch.where(chosen, ids, -100))
    assert (new[outcome == Outcome.MASK] == MASK).all()
    if whole_words:
        inside = (words[:, 1:] == words[:, :-1]) & eligible[:, 1:] & eligible[:, :-1]
        assert torch.equal(chosen[:, 1:][inside], chosen[:, :-1][inside]), "a word is chosen whole"
    still = (outcome == Outcome.KEPT) | ~chosen
    assert torch.equal(new[still], ids[still])
    assert ((new >= 0) & (new < SIZE)).all()
    for never, code in (
        (recipe[0] == 0, Outcome.MASK),
        (recipe[1] == 0, Outcome.RANDOM),
        (sum(recipe) == 1, Outcome.KEPT),
    ):
        assert not never or not (outcome == code).any()
    if probability in (0, 1):
        assert torch.equal(chosen, eligible & bool(probability))
    results = []
    for _ in range(2):  # without a generator torch's own seed counts
        torch.manual_seed(seed)
        results.append(mask_tokens(ids, special, vocab_size=SIZE, mask_token_id=MASK, **options).input_ids)
    assert torch.equal(*results)


def test_a_word_is_not_joined_across_a_special_token_or_a_row():
    ids = torch.full((200, 3), 50)
    special = torch.tensor([[0, 1, 0]]).expand(200, 3)
    chosen = mask(ids, special, probability=0.5, word_ids=torch.zeros_like(ids)).labels != -100
    assert (chosen[:, 0] != chosen[:, 2]).any()
    assert not chosen[:, 1].any()
    assert 0 < chosen[:, 0].sum() < 200


def test_example_generator_differs_by_seed_epoch_and_example_and_by_nothing_else():
    def draw(numbers):
        return tuple(torch.rand(4, generator=example_generator(*numbers)).tolist())

    numbers = list(product((0, 1, 11), (0, 1, 11), (0, 1, 11, 10**9)))
    forwards = {one: draw(one) for one in numbers}
    assert forwards == {one: draw(one) for one in reversed(numbers)}
    assert len(set(forwards.values())) == len(numbers)


def test_sequences_end_to_end_draw_what_each_would_draw_alone():
    lengths = (400, 1, 0, 900, 700)
    ids, special = (x[0] for x in draw_ids((1, sum(lengths)), 0))
    sizes = dict(vocab_size=SIZE, mask_token_id=MASK)
    packed = mask_packed(ids, special, lengths, [example_generator(0, 0, row) for row in range(5)], **sizes)
    parts = zip(ids.split(lengths), special.split(lengths), strict=True)
    alone = [
        mask_tokens(some[None], which[None], generator=example_generator(0, 0, row), **sizes)
        for row, (some, which) in enumerate(parts)
    ]
    for together, pieces in zip(packed, zip(*alone, strict=True), strict=True):
        assert torch.equal(together, torch.cat(pieces, 1)[0])


def test_a_generator_of_the_cpu_serves_ids_on_a_gpu():
    """Fake tensors have a device and no numbers: an operation on two devices at once is an error there too."""
    generator = seeded(0)
    with FakeTensorMode():
        ids = torch.ones(2, 7, dtype=torch.int64, device="cuda")
        for special in (ids.bool(), ids.bool().cpu()):
            made = mask_tokens(ids, special, vocab_size=9, mask_token_id=3, word_ids=ids, generator=generator)
            assert {x.device.type for x in made} == {"cuda"}


IDS = torch.full((2, 3), 50)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"input_ids": IDS[0]}, r"\(batch, length\) int64, not \(3,\)"),
        ({"input_ids": IDS.int()}, "int64.*int32"),
        ({"special_tokens_mask": IDS[:1]}, r"special_tokens_mask is \(1, 3\), but input_ids is \(2, 3\)"),
        ({"word_ids": IDS[:, :1]}, r"word_ids is \(2, 1\)"),
        ({"special_tokens_mask": IDS.float()}, "special_tokens_mask.*float32"),
        ({"word_ids": IDS.float()}, "word_ids.*float32"),
        ({"word_ids": IDS.bool()}, "word_ids.*bool"),
        ({"probability": -0.1}, "probability must be between 0 and 1, not -0.1"),
        ({"probability": math.nan}, "probability.*nan"),
        ({"mask_fraction": 2}, "mask_fraction.*2"),
        ({"random_fraction": -1}, "random_fraction.*-1"),
        ({"mask_fraction": 0.8, "random_fraction": 0.3}, "mask_fraction 0.8 and random_fraction 0.3"),
    ],
)
def test_wrong_arguments_are_named(changes, words):
    arguments = {"input_ids": IDS, "special_tokens_mask": torch.zeros_like(IDS), **changes}
    with pytest.raises(ValueError, match=words):
        mask_tokens(vocab_size=SIZE, mask_token_id=MASK, **arguments)


# ------------------------------------------------------------------------------------------------------------- the loss

LOGITS = 4 * torch.randn(2, 5, 7, generator=seeded(0), dtype=torch.float64)
TARGETS = torch.tensor([[0, -100, 6, 3, -100], [-100, -100, 2, 2, 5]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_loss_is_torchs_and_transformers(dtype):
    """Half precision is scored in float32, so to the bit like it."""
    scored = dtype if dtype == torch.float64 else torch.float32
    logits = LOGITS.to(dtype)
    loss = masked_lm_loss(logits, TARGETS)
    assert loss.mean.dtype == loss.sum.dtype == scored
    assert loss.mean == masked_lm_loss(logits.to(scored), TARGETS).mean
    torch.testing.assert_close(loss.mean, F.cross_entropy(logits.to(scored).flatten(0, 1), TARGETS.flatten()))
    torch.testing.assert_close(loss.mean.float(), ForMaskedLMLoss(logits, TARGETS, 7))
    assert loss.count == 6
    assert loss.sum / loss.count == loss.mean
    # a sum that float16 cannot hold
    assert masked_lm_loss(torch.zeros(40_000, 7, dtype=dtype), torch.zeros(40_000).long()).sum > 65504


def test_loss_written_out():
    loss = masked_lm_loss(torch.tensor([[0.0, 0.0], [0.0, math.log(3)], [9.0, -9.0]]), torch.tensor([0, 1, -100]))
    assert loss.sum.item() == pytest.approx(math.log(2) + math.log(4 / 3))
    assert loss.count.item() == 2
    one = masked_lm_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([1]))
    assert one.mean.item() == one.sum.item() == pytest.approx(math.log(2))


def test_ignored_positions_change_nothing_and_get_no_gradient():
    spoiled = LOGITS.masked_fill((TARGETS == -100)[..., None], 1e9).requires_grad_()
    loss = masked_lm_loss(spoiled, TARGETS)
    assert loss.mean == masked_lm_loss(LOGITS, TARGETS).mean
    loss.mean.backward()
    assert (spoiled.grad[TARGETS == -100] == 0).all()
    assert (spoiled.grad[TARGETS != -100] != 0).any()


@pytest.mark.parametrize("shape", [(2, 5), (0,), (3, 0)])
def test_nothing_masked_is_zero_with_a_graph(shape):
    logits = torch.randn(*shape, 7, requires_grad=True)
    loss = masked_lm_loss(logits, torch.full(shape, -100))
    loss.mean.backward()
    assert (loss.mean.item(), loss.sum.item(), loss.count.item()) == (0, 0, 0)
    assert (logits.grad == 0).all()


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        *(
            (torch.where(TARGETS == 6, bad, TARGETS), rf"label {bad} is not an id below 7.*-100")
            for bad in (7, -1, -101)
        ),
        (TARGETS.flatten(), r"logits \(2, 5, 7\) need targets \(2, 5\)"),
        (TARGETS[:, :4], r"logits \(2, 5, 7\) need targets \(2, 5\)"),
        (TARGETS[..., None], r"logits \(2, 5, 7\) need targets \(2, 5\)"),
        (TARGETS.float(), "torch.float32"),
        (TARGETS.bool(), "torch.bool"),
    ],
)
def test_targets_that_do_not_fit(targets, words):
    with pytest.raises(ValueError, match=words):
        masked_lm_loss(LOGITS, targets)
    assert masked_lm_loss(LOGITS, TARGETS.int()).mean == masked_lm_loss(LOGITS, TARGETS).mean
