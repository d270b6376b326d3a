"""Examples: what an epoch holds, and that an example does not depend on who makes it."""

from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
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
FIRST, HELD_OUT = len(SPECIAL), 2004  # the first id that is a word; the one of the lines that are held out


def lines(lengths, ids=None):
    starts = torch.tensor([0, *lengths]).cumsum(0)
    ids = torch.arange(int(starts[-1])) % 1500 + FIRST if ids is None else ids
    return Lines(ids.to(torch.uint16), starts)


def token_file(lengths, weight=1.0, name="text", ids=None):
    made = lines(lengths, ids)
    return TokenFile(made.tokens, made.starts, name, weight, lines([3], torch.full((3,), HELD_OUT)), "")


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


def all_rows(made, epoch=0):
    return rows_of(made.examples(epoch, everything(made, epoch)))


@pytest.mark.parametrize("short_fraction", [0.0, 0.3, 1.0])
def test_an_epoch_has_every_token_once_in_rows_that_fit(short_fraction):
    """Of the lines to train on; what is held out is in no row."""
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
    bounds = file.starts.tolist()
    lone = set(pairwise(bounds))
    cuts = corpus(file)._cuts(0)
    pairs = list(zip(cuts.start.tolist(), (cuts.start + cuts.length).tolist(), strict=True))
    # 0.3 of about 1400 rows on average; regions of 1000 tokens (about 30) are drawn as one, so the spread is wide
    assert 0.1 < sum(pair in lone for pair in pairs) / len(pairs) < 0.5
    assert sum(start not in bounds and stop not in bounds for start, stop in pairs) > 0.4 * len(pairs)
    assert sorted(corpus(file, short_fraction=1.0)._cuts(0).start.tolist()) == bounds[:-1]
    cut = all_rows(corpus(token_file([1, 100, 1]), short_fraction=1.0))
    assert sorted(map(len, cut)) == [1, 1, 10, 30, 30, 30], "a longer line is cut, and none of it lost"


def test_each_epoch_is_cut_shuffled_and_masked_afresh_and_the_same_again():
    file = token_file(lengths_drawn(400))
    made, again, other = corpus(file), corpus(file), corpus(file, seed=1)
    steps = [list(one.steps(epoch)) for one, epoch in ((made, 0), (again, 0), (made, 1), (other, 0))]
    assert steps[0] == steps[1]
    assert steps[0] not in steps[2:]
    first, same = (one.examples(5, next(one.steps(5))) for one in (made, again))
    assert torch.equal(first.batch.input_ids, same.batch.input_ids)
    rows = [set(map(tuple, all_rows(made, epoch))) for epoch in (0, 1)]
    assert len(rows[0] & rows[1]) < 0.5 * len(rows[0]), "cut afresh; a line that is alone both times is the same row"
    lines_alone = corpus(file, short_fraction=1.0)  # cut alike in every epoch
    assert list(lines_alone.steps(0)) != list(lines_alone.steps(1))
    alone = corpus(token_file([30]), short_fraction=1.0)  # one row: what differs is the mask
    assert len({tuple(alone.examples(epoch, [0]).positions.tolist()) for epoch in range(20)}) > 10


def test_steps_are_even_and_mix_lengths_and_texts():
    files = [token_file(lengths_drawn(400, seed=1)), token_file(lengths_drawn(400, seed=2), name="other")]
    made = corpus(*files, tokens_per_step=1000)
    steps, cuts = list(made.steps(0)), made._cuts(0)
    for step in steps:
        tokens = sum(made.lengths(0, step))
        assert 1000 - 2 * 32 - 1000 / len(steps) <= tokens <= 1000 + 32, "even to a row, the last one too"
        assert set(cuts.file[torch.tensor(step)].tolist()) == {0, 1}
        assert len(set(made.lengths(0, step))) > 3
    for seed in range(50):
        little = corpus(token_file(lengths_drawn(4, longest=30, seed=seed)), tokens_per_step=32, seed=seed)
        assert all(little.steps(0)), f"no step is empty (seed {seed})"


def test_weights_say_how_often_a_text_comes_up():
    word = torch.full((2000,), FIRST)
    files = [token_file([20] * 100, weight, ids=word + number) for number, weight in enumerate((1, 3, 0.25, 1.5))]
    made = corpus(*files)
    epochs = [torch.tensor([token for row in all_rows(made, epoch) for token in row]) for epoch in range(8)]
    counts = torch.stack([tokens.bincount(minlength=FIRST + 4)[FIRST:] for tokens in epochs])  # (8, 4)
    assert set(counts[:, 0].tolist()) == {2000}
    assert set(counts[:, 1].tolist()) == {6000}
    # Rows have about 25 tokens of 30 at most; a share of the rows is right to a row, and their lengths differ.
    assert counts[:, 2].float().mean() == pytest.approx(500, abs=40)
    assert counts[:, 3].float().mean() == pytest.approx(3000, abs=80)
    assert len(set(counts[:, 2].tolist())) > 1, "the share is drawn afresh each epoch"
    with pytest.raises(ValueError, match="larger weights"):
        next(corpus(token_file([20], weight=1e-9)).steps(0))


def one_by_one(arguments):
    made, epoch, numbers = arguments
    examples = (made.examples(epoch, [number]) for number in numbers)
    return [(one.batch.input_ids.tolist(), one.positions.tolist(), one.targets.tolist()) for one in examples]


@pytest.mark.slow
def test_an_example_does_not_depend_on_who_makes_it_or_with_which_others():
    """This process, or another, in any order: bit for bit the same rows and masks."""
    made = corpus(token_file(lengths_drawn(400)), token_file(lengths_drawn(50), 1.5, "other"))
    numbers = everything(made, 2)
    expected = one_by_one((made, 2, numbers))
    together = made.examples(2, numbers)
    borders = together.batch.cu_seqlens.tolist()
    for start, end, alone in zip(borders[:-1], borders[1:], expected, strict=True):
        inside = (together.positions >= start) & (together.positions < end)
        positions = (together.positions[inside] - start).tolist()
        assert (together.batch.input_ids[start:end].tolist(), positions, together.targets[inside].tolist()) == alone
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        assert pool.submit(one_by_one, (made, 2, numbers[::-4])).result() == expected[::-4]


def test_masks_are_what_mask_tokens_draws_for_the_row_alone():
    made = corpus(token_file(lengths_drawn(200)))
    for number in everything(made, 1)[:20]:
        example = made.examples(1, [number])
        original = torch.tensor([[CLS, *rows_of(example)[0], SEP]])
        of_the_row = dict(vocab_size=2005, mask_token_id=MASK, generator=example_generator(0, 1, number))
        masked = mask_tokens(original, original < FIRST, **of_the_row)
        assert torch.equal(example.batch.input_ids[None], masked.input_ids)
        assert torch.equal(example.positions, (masked.labels[0] >= 0).nonzero().flatten())


def test_a_random_token_is_one_that_the_tokenizer_has():
    """A model may have more rows, to fill up its vocabulary."""
    example = masked_rows([torch.arange(FIRST, 2005)] * 20, [example_generator(0, 0, n) for n in range(20)], TOKENIZER)
    shown = example.batch.input_ids[example.positions]
    drawn = shown[(shown != MASK) & (shown != example.targets)]
    assert len(drawn) > 300
    assert 1900 < int(drawn.max()) < 2005
