"""Examples: what an epoch holds, and that an example does not depend on who makes it."""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch

from minibert.masking import example_generator, mask_tokens
from minibert.tokenizer import from_vocabulary
from minibert.training.data import Corpus, cut_into_rows, masked_rows
from minibert.training.tokens import Lines, TokenFile

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
TOKENIZER = from_vocabulary([*SPECIAL, *(f"word{number}" for number in range(2000))])
CLS, SEP, MASK = 2, 3, 4
FIRST = len(SPECIAL)  # the first id that is a word


def lines(lengths, ids=None):
    starts = torch.tensor([0, *lengths]).cumsum(0)
    if ids is None:
        ids = torch.arange(int(starts[-1])) % 1500 + FIRST
    return Lines(ids.to(torch.uint16), starts)


def token_file(lengths, weight=1.0, name="text", ids=None):
    made = lines(lengths, ids)
    return TokenFile(made.tokens, made.starts, name, weight, lines([3], torch.full((3,), 2004)), "")


def lengths_drawn(count, longest=60, seed=0):
    return torch.randint(1, longest + 1, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def corpus(*files, **settings):
    return Corpus(files, TOKENIZER, **dict(max_length=32, short_fraction=0.3, tokens_per_step=256, seed=0) | settings)


def rows_of(example):
    """The rows before they were masked, without [CLS] and [SEP]."""
    ids = example.batch.input_ids.clone()
    ids[example.positions] = example.targets
    rows = [row.tolist() for row in ids.split(list(example.batch.lengths))]
    assert all(row[0] == CLS and row[-1] == SEP for row in rows)
    return [row[1:-1] for row in rows]


def everything(made, epoch):
    return sorted(number for step in made.steps(epoch) for number in step)


@pytest.mark.parametrize("short_fraction", [0.0, 0.3, 1.0])
def test_an_epoch_has_every_token_once_in_rows_that_fit(short_fraction):
    file = token_file(lengths_drawn(400))
    made = corpus(file, short_fraction=short_fraction)
    numbers = everything(made, 0)
    assert numbers == list(range(len(numbers))), "each example is in one step"
    example = made.examples(0, numbers)
    assert max(example.batch.lengths) == 32
    assert list(example.batch.lengths) == made.lengths(0, numbers)
    start, length = cut_into_rows(file, 30, short_fraction, torch.Generator().manual_seed(1))
    covered = torch.cat([torch.arange(a, a + n) for a, n in zip(start.tolist(), length.tolist(), strict=True)])
    assert torch.equal(covered, torch.arange(len(file.tokens)))
    assert sorted(token for row in rows_of(example) for token in row) == sorted(file.tokens.tolist())


def test_rows_are_stretches_over_line_ends_and_lines_alone():
    file = token_file(lengths_drawn(3000, longest=20))
    made = corpus(file)
    begins, ends = set(file.starts.tolist()[:-1]), set(file.starts.tolist()[1:])
    cuts = made._cuts(0)
    pairs = list(zip(cuts.start.tolist(), (cuts.start + cuts.length).tolist(), strict=True))
    following = dict(zip(file.starts.tolist(), file.starts.tolist()[1:], strict=False))
    alone = sum(following.get(start) == stop for start, stop in pairs) / len(pairs)
    # 0.3 of about 1400 rows on average; regions of 1000 tokens (about 30) are drawn as one, so the spread is wide
    assert 0.1 < alone < 0.5
    assert sum(start not in begins and stop not in ends for start, stop in pairs) > 0.4 * len(pairs)
    only_alone = corpus(file, short_fraction=1.0)._cuts(0)
    assert sorted(only_alone.start.tolist()) == file.starts.tolist()[:-1]


def test_a_line_longer_than_a_row_is_cut_and_none_of_it_lost():
    made = corpus(token_file([1, 100, 1]), short_fraction=1.0)
    rows = rows_of(made.examples(0, everything(made, 0)))
    assert sorted(map(len, rows)) == [1, 1, 10, 30, 30, 30]


def test_each_epoch_is_cut_shuffled_and_masked_afresh_and_the_same_again():
    file = token_file(lengths_drawn(400))
    made, again, other = corpus(file), corpus(file), corpus(file, seed=1)
    steps = [list(one.steps(epoch)) for one, epoch in ((made, 0), (again, 0), (made, 1), (other, 0))]
    assert steps[0] == steps[1]
    assert steps[0] not in steps[2:]

    def first(corpus, epoch):
        return corpus.examples(epoch, next(corpus.steps(epoch)))

    assert torch.equal(first(made, 5).batch.input_ids, first(again, 5).batch.input_ids)
    rows = [{tuple(row) for row in rows_of(made.examples(epoch, everything(made, epoch)))} for epoch in (0, 1)]
    assert len(rows[0] & rows[1]) < 0.5 * len(rows[0]), "cut afresh; a line that is alone both times is the same row"
    lines_alone = corpus(file, short_fraction=1.0)  # cut alike in every epoch
    assert list(lines_alone.steps(0)) != list(lines_alone.steps(1))
    # With one row there is nothing to cut or shuffle: what differs is the mask.
    alone = corpus(token_file([30]), short_fraction=1.0)
    masks = {tuple(alone.examples(epoch, [0]).positions.tolist()) for epoch in range(20)}
    assert len(masks) > 10


def test_steps_are_even_and_mix_lengths_and_texts():
    files = [token_file(lengths_drawn(400, seed=1)), token_file(lengths_drawn(400, seed=2), name="other")]
    made = corpus(*files, tokens_per_step=1000)
    steps = list(made.steps(0))
    tokens = [sum(made.lengths(0, step)) for step in steps]
    assert all(1000 - 2 * 32 - 1000 / len(steps) <= n <= 1000 + 32 for n in tokens), "even to a row, the last one too"
    cuts = made._cuts(0)
    for step in steps:
        assert set(cuts.file[torch.tensor(step)].tolist()) == {0, 1}
        assert len(set(made.lengths(0, step))) > 3


def test_no_step_is_empty_however_little_text_there_is():
    for seed in range(50):
        made = corpus(token_file(lengths_drawn(4, longest=30, seed=seed)), tokens_per_step=32, seed=seed)
        assert all(made.steps(0)), seed


def test_weights_say_how_often_a_text_comes_up():
    word = torch.full((2000,), FIRST)
    files = [token_file([20] * 100, weight, ids=word + number) for number, weight in enumerate((1, 3, 0.25, 1.5))]
    made = corpus(*files)
    counts = torch.stack(
        [
            torch.tensor([token for row in rows_of(made.examples(e, everything(made, e))) for token in row]).bincount(
                minlength=FIRST + 4
            )[FIRST:]
            for e in range(8)
        ]
    )  # (8, 4)
    assert set(counts[:, 0].tolist()) == {2000}
    assert set(counts[:, 1].tolist()) == {6000}
    # Rows have about 25 tokens of 30 at most; a share of the rows is right to a row, and their lengths differ.
    assert counts[:, 2].float().mean() == pytest.approx(500, abs=40)
    assert counts[:, 3].float().mean() == pytest.approx(3000, abs=80)
    assert len(set(counts[:, 2].tolist())) > 1, "the share is drawn afresh each epoch"


def test_held_out_lines_are_in_no_example():
    made = corpus(token_file(lengths_drawn(100), weight=2.5))
    for epoch in range(3):
        assert not any(2004 in row for row in rows_of(made.examples(epoch, everything(made, epoch))))


def _one_by_one(arguments):
    made, epoch, numbers = arguments
    return [(example.batch.input_ids.tolist(), example.positions.tolist(), example.targets.tolist())
            for example in (made.examples(epoch, [number]) for number in numbers)]  # fmt: skip


@pytest.mark.slow
def test_an_example_does_not_depend_on_who_makes_it_or_with_which_others():
    """This process, or another that makes shares of four, in any order: bit for bit the same rows and masks."""
    made = corpus(token_file(lengths_drawn(400)), token_file(lengths_drawn(50), 1.5, "other"))
    numbers = everything(made, 2)
    expected = dict(zip(numbers, _one_by_one((made, 2, numbers)), strict=True))

    together = made.examples(2, numbers)
    borders = together.batch.cu_seqlens.tolist()
    for place, number in enumerate(numbers):
        inside = (together.positions >= borders[place]) & (together.positions < borders[place + 1])
        row = together.batch.input_ids[borders[place] : borders[place + 1]].tolist()
        positions = (together.positions[inside] - borders[place]).tolist()
        assert (row, positions, together.targets[inside].tolist()) == expected[number]

    shares = [numbers[rank::4][::-1] for rank in range(4)]
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        for share, made_there in zip(
            shares, pool.map(_one_by_one, [(made, 2, share) for share in shares]), strict=True
        ):
            assert made_there == [expected[number] for number in share]


def test_masks_are_what_mask_tokens_draws_for_the_row_alone():
    made = corpus(token_file(lengths_drawn(200)))
    numbers = everything(made, 1)[:20]
    for number in numbers:
        example = made.examples(1, [number])
        original = torch.tensor([[CLS, *rows_of(example)[0], SEP]])
        masked = mask_tokens(original, original < FIRST, vocab_size=2005, mask_token_id=MASK,
                             generator=example_generator(0, 1, number))  # fmt: skip
        assert torch.equal(example.batch.input_ids[None], masked.input_ids)
        assert torch.equal(example.positions, (masked.labels[0] >= 0).nonzero().flatten())


def test_a_random_token_is_one_that_the_tokenizer_has():
    """A model may have more rows, to fill up its vocabulary."""
    example = masked_rows([torch.arange(FIRST, 2005)] * 20, [example_generator(0, 0, n) for n in range(20)], TOKENIZER)
    shown = example.batch.input_ids[example.positions]
    drawn = shown[(shown != MASK) & (shown != example.targets)]
    assert len(drawn) > 300
    assert 1900 < int(drawn.max()) < 2005


def test_weights_that_leave_no_row_are_refused():
    with pytest.raises(ValueError, match="larger weights"):
        next(corpus(token_file([20], weight=1e-9)).steps(0))
    assert len(list(corpus(token_file([20])).steps(0))) == 1
