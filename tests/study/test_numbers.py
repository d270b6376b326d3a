"""The numbers of a study beside transformers on the same weights, or beside a plain loop; and what becomes of them."""

import base64
import zlib
from dataclasses import asdict

import pytest
import torch
from studied import PAIR, SIZES, TEXT, VOCABULARY, inputs, pair_of_models, tokenizer, unpack
from torch.utils.flop_counter import FlopCounterMode

from minibert import PackedBatch
from minibert.attention import use_kernel
from minibert.study import heads, study
from minibert.study.heads import fold, habits, maps, taken, written
from minibert.study.measures import MOST_TOKENS, cost, mixing_ratio, neighbours, shares
from minibert.study.reading import read_text
from minibert.trace import trace

# One rounding of float32 is 6e-8 of numbers of order 1 to 5; some tens of them may differ. As in test_parity.
ROUNDING = 1e-5


@pytest.fixture(scope="module")
def theirs(models, found):
    """transformers on the same text: hidden states after each attention and each feed-forward, and attention maps."""
    model, states = models[1], []
    handles = []
    for layer in model.bert.encoder.layer:
        for part in (layer.attention.output, layer.output):
            handles.append(part.register_forward_hook(lambda module, inputs, output: states.append(output[0])))
    with torch.inference_mode():
        out = model(**inputs(found.reading), output_hidden_states=True, output_attentions=True)
        states = [out.hidden_states[0][0], *states]
        logits = [model.cls(state) for state in states]
    for handle in handles:
        handle.remove()
    return states, logits, torch.cat(out.attentions)  # attentions: (L, H, S, S)


def test_what_is_read(found):
    reading = found.reading
    assert [reading.pieces[place] for place in reading.masks] == ["[MASK]", "[MASK]"]
    words = [[reading.pieces[place] for place in group] for group in reading.groups()]
    assert words.count(["un", "##believ", "##ab", "##ly"]) == 1
    assert ["[MASK]"] not in words
    assert [reading.pieces[p] for p in range(len(reading.ids)) if reading.added[p]] == ["[CLS]", "[SEP]", "[SEP]"]
    assert "[MASK]".join(reading.filling) == f"{TEXT} {PAIR}"
    assert set(reading.segments) == {0, 1}


def test_the_shares_of_the_sum(model, found):
    table = torch.tensor(list(found.shares.values()))
    assert list(found.shares) == ["word", "position", "segment"]
    assert (table.sum(0) - 1).abs().max() < ROUNDING
    embeddings, place = model.embeddings, 3
    rows = [embeddings.word.weight[found.reading.ids[place]], embeddings.position.weight[place]]
    rows.append(embeddings.token_type.weight[found.reading.segments[place]])
    centred = [row - row.mean() for row in rows]
    total = sum(centred)
    for share, row in zip(table[:, place], centred, strict=True):
        assert share.item() == pytest.approx((row @ total / (total @ total)).item(), abs=ROUNDING)
    part = torch.randn(5, 8)  # one that is all the sum: what is the same in each number counts for nothing
    assert torch.allclose(shares([part, torch.ones(5, 8)]), torch.tensor([[1.0] * 5, [0.0] * 5]), atol=ROUNDING)


def test_the_guesses_are_transformers_head_on_transformers_states(found, theirs):
    _, logits, _ = theirs
    for answered, one in zip(found.answers, found.guesses, strict=True):
        answer = logits[-1][one.position].argmax().item()
        assert one.answer.id == answered.best[0].id == answer
        assert answered.position == one.position
        for step, expected in zip(one.steps, logits, strict=True):
            row = expected[one.position]
            best = row.softmax(-1).topk(5)
            assert [guess.id for guess in step.best] == best.indices.tolist()
            assert [guess.probability for guess in step.best] == pytest.approx(best.values.tolist(), abs=ROUNDING)
            assert step.answer.rank == 1 + int((row > row[answer]).sum())
            for word, followed in zip(found.targets, step.targets, strict=True):
                token = tokenizer().token_to_id(word)
                assert followed.rank == 1 + int((row > row[token]).sum())
                assert followed.probability == pytest.approx(row.softmax(-1)[token].item(), abs=ROUNDING)
        start = [step.after for step in one.steps].index(one.first)
        assert all(step.answer.rank == 1 for step in one.steps[start:])
        assert start == 0 or one.steps[start - 1].answer.rank > 1


def test_the_maps_are_those_of_transformers(found, theirs):
    maps_of_page = unpack(found.maps.weights).view(theirs[2].shape)
    assert (maps_of_page - theirs[2]).abs().max() < 0.004


def test_what_a_head_writes_adds_up_to_the_attention_output(model, found):
    recorded, output = trace(model, **inputs(found.reading)), model.layers[1].attention.output
    names = ("probabilities", "value", "attention_output")
    alpha, value, total = (recorded.read(f"layers.1.{name}")[0] for name in names)
    weight, size = output.weight.detach(), value.shape[-1]
    given = written(value, weight)  # (H, S, D)
    of_head = torch.einsum("hqs,hsd->hqd", alpha, given)
    for head in range(len(value)):
        alone = alpha[head] @ value[head] @ weight[:, head * size : (head + 1) * size].T
        assert torch.allclose(of_head[head], alone, atol=ROUNDING)
    assert torch.allclose(of_head.sum(0) + output.bias, total, atol=ROUNDING)
    expected = alpha * given.norm(dim=-1)[:, None]
    assert torch.allclose(taken(alpha, given.norm(dim=-1)), expected / expected.sum(-1, keepdim=True), atol=ROUNDING)


def test_the_mixing_ratio_is_that_of_its_definition(models, found, theirs):
    states, _, attentions = theirs
    layer, place = models[0].layers[1], found.reading.masks[0]
    with torch.inference_mode():
        x = states[2]  # what layer 2 reads
        value = models[1].bert.encoder.layer[1].attention.self.value(x)
        size = SIZES["hidden_size"] // SIZES["num_attention_heads"]
        others, own = torch.zeros(len(x[0])), x[place].clone()
        for head in range(SIZES["num_attention_heads"]):
            columns = slice(head * size, (head + 1) * size)
            for token in range(len(x)):
                given = layer.attention.output.weight[:, columns] @ value[token, columns]
                (own if token == place else others).add_(attentions[1, head, place, token] * given)
        norms = [((part - part.mean()) * layer.attention_LayerNorm.weight).norm() for part in (others, own)]
    assert found.changes[1].mixing[place] == pytest.approx((norms[0] / sum(norms)).item(), abs=ROUNDING)
    x, given = torch.randn(4, 6), torch.randn(2, 4, 6)  # a token that reads itself alone mixes nothing
    ratio = mixing_ratio(x, given.sum(0), torch.eye(4).expand(2, 4, 4), given, torch.ones(6))
    assert ratio.abs().max() < ROUNDING


def test_how_much_a_layer_changes(models, found, theirs):
    states = theirs[0]
    for number, layer in enumerate(found.changes):
        hub = models[1].bert.encoder.layer[number]
        x, middle, out = states[2 * number : 2 * number + 3]
        with torch.inference_mode():
            attended = hub.attention.output.dense(hub.attention.self(x[None])[0])[0]
            worked = hub.output.dense(hub.intermediate(middle))
        for got, update, read in ((layer.attention, attended, x), (layer.feed_forward, worked, middle)):
            assert got == pytest.approx((update.norm(dim=-1) / read.norm(dim=-1)).tolist(), rel=1e-4)
        assert layer.cosine == pytest.approx(torch.cosine_similarity(x, out, dim=-1).tolist(), abs=ROUNDING)


def test_hiding_and_revealing_beside_a_plain_loop(models, found):
    reading, mask = found.reading, tokenizer().token_to_id("[MASK]")
    words = {place for group in reading.groups() for place in group}

    def log_p(hidden):
        ids = [mask if place in hidden else token for place, token in enumerate(reading.ids)]
        with torch.inference_mode():
            logits = models[1](**{**inputs(reading), "input_ids": torch.tensor([ids])}).logits[0]
        return logits[reading.masks].log_softmax(-1)  # (M, V)

    whole, nothing = log_p(set()), log_p(words)
    assert [word.places for word in found.influence] == reading.groups()
    for word in found.influence:
        pairs = (word.hidden, log_p(set(word.places)), whole), (word.alone, log_p(words - set(word.places)), nothing)
        for changes, then, start in pairs:
            for number, one in enumerate(found.guesses):
                expected = (then - start)[number, one.answer.id].item()
                assert changes[number].nats == pytest.approx(expected, abs=ROUNDING)
                assert changes[number].winner == tokenizer().id_to_token(then[number].argmax().item())


def test_many_words_go_in_groups_of_neighbours():
    groups = [[place] for place in range(1, 500)]
    joined = neighbours(groups, 512)
    assert len(joined) * 512 <= MOST_TOKENS
    assert [place for group in joined for place in group] == list(range(1, 500))
    assert neighbours(groups[:20], 40) == groups[:20]
    assert neighbours([], 40) == []


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("the previous token", lambda place: max(place - 1, 0)),
        ("the next token", lambda place: min(place + 1, 5)),
        ("itself", lambda place: place),
        ("[CLS]", lambda place: 0),
        ("punctuation", lambda place: 2),
        ("[SEP]", lambda place: 5),
    ],
)
def test_a_head_with_a_habit_is_named_by_it(model, name, read):
    reading = read_text(tokenizer(), model.config, "Paris, paris.")
    weights = torch.full((2, 6, 6), 1 / 6)
    weights[0] = torch.nn.functional.one_hot(torch.tensor([read(place) for place in range(6)]), 6)
    first, second = habits(weights, reading, 6)
    assert (first.layer, first.head, first.name) == (7, 1, name)
    assert (first.habits[name], first.spread) == (pytest.approx(1), pytest.approx(1))
    assert (second.name, second.spread) == ("", pytest.approx(6))  # even over six tokens
    assert heads.targets(reading)["the same word"].nonzero().tolist() == [[1, 3], [3, 1]]


def test_parameters_and_multiply_adds_are_those_of_the_model(found):
    ours, _ = pair_of_models()
    reading = found.reading
    parts = cost(ours.config, len(reading.ids), len(reading.masks))
    assert sum(part.parameters for part in parts) == sum(p.numel() for p in ours.parameters())
    assert found.model.parameters == sum(part.parameters for part in parts)
    batch = PackedBatch.from_lists([reading.ids], [reading.segments])
    with FlopCounterMode(display=False) as counter, use_kernel("formula"):
        ours.requires_grad_(False).predict(batch, torch.tensor(reading.masks))
    assert 2 * sum(part.multiply_adds for part in parts) == counter.get_total_flops()


@pytest.mark.parametrize("limit", ["MOST_WEIGHTS", "MOST_TEXT"])
def test_maps_are_kept_and_folded_where_they_are_too_many(monkeypatch, limit):
    """The root keeps a weight to 0.004, and of a length 16 bits are kept: a share of 1 / 65,535 of the longest."""
    weights = [torch.softmax(3 * torch.randn(2, 100, 100), -1) for _ in range(3)]
    lengths = [7 * torch.rand(2, 100) for _ in range(3)]
    takes = [taken(one, length) for one, length in zip(weights, lengths, strict=True)]
    kept, whole = maps(weights, takes, lengths, [7, 50]), torch.stack(weights)
    assert kept.side == 100
    back = unpack(kept.weights).view(whole.shape)
    assert (back - whole).abs().max() < 0.004
    assert (back.sum(-1) - 1).abs().max() < 0.01
    coded = torch.frombuffer(bytearray(zlib.decompress(base64.b64decode(kept.lengths))), dtype=torch.uint16)
    back = coded.float().view(3, 2, 100) / 65535 * torch.tensor(kept.longest)[..., None]
    assert (back - torch.stack(lengths)).abs().max() < 7 / 65535
    monkeypatch.setattr("minibert.study.heads." + limit, 3 * 2 * 100 * 100 // 2)
    kept = maps(weights, takes, lengths, [7, 50])
    assert (kept.side, kept.row_places) == (64, [7, 50])
    for text, expected in ((kept.weights, whole), (kept.taken, torch.stack(takes))):
        folded = unpack(text).view(3, 2, 64, 64)
        assert (folded.amax((-1, -2)) - expected.amax((-1, -2))).abs().max() < 0.004
    assert (unpack(kept.rows).view(3, 2, -1, 100) - whole[:, :, kept.row_places]).abs().max() < 0.004
    assert torch.equal(fold(torch.eye(128)[None, None], 64)[0, 0], torch.eye(64))


def test_the_json_has_five_digits_of_every_number(found):
    """Five digits are right to half of the fifth: at most 5e-5 of the number."""
    data = found.to_dict()
    rows = [(data["changes"][number], asdict(layer)) for number, layer in enumerate(found.changes)]
    for shown, exact in [*rows, (data["shares"], found.shares)]:
        for name, values in exact.items():
            assert shown[name] == pytest.approx(values, rel=5.1e-5), name


def test_ids_that_are_no_words_never_win():
    ours, _ = pair_of_models(vocab_size=len(VOCABULARY) + 20)
    with torch.no_grad():
        ours.head.bias[len(VOCABULARY) :] = 100
    found = study(ours, tokenizer(), TEXT)
    ids = [guess.id for step in [*found.guesses[0].steps, *found.answers] for guess in step.best]
    assert max(ids) < len(VOCABULARY)
    assert found.guesses[0].steps[-1].answer.rank == 1
    assert {one.winner for word in found.influence for one in word.hidden + word.alone} <= set(VOCABULARY)
