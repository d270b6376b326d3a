"""The numbers of a study beside transformers on the same weights, or beside a plain loop; and what becomes of them."""

import base64
import json
import zlib
from dataclasses import asdict

import pytest
import torch
from studied import PAIR, SIZES, TEXT, VOCABULARY, inputs, pair_of_models, tokenizer, unpack
from torch.utils.flop_counter import FlopCounterMode

from minibert import FillMask, PackedBatch
from minibert.attention import use_kernel
from minibert.study import heads, study, study_trace
from minibert.study.heads import fold, habits, maps, pack, spread, taken, written
from minibert.study.measures import MOST_TOKENS, cost, mixing_ratio, neighbours, shares
from minibert.study.reading import read_text
from minibert.trace import trace

# One rounding of float32 is 6e-8 of numbers of order 1 to 5; some tens of them may differ. As in test_parity.
ROUNDING = 1e-5


@pytest.fixture(scope="module")
def models():
    return pair_of_models()


@pytest.fixture(scope="module")
def found(models):
    return study(models[0], tokenizer(), TEXT, PAIR, targets=["france", "tea"])


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
    unbelievably = [
        [reading.pieces[p] for p in group] == ["un", "##believ", "##ab", "##ly"] for group in reading.groups()
    ]
    assert sum(unbelievably) == 1
    assert not any(place in group for group in reading.groups() for place in reading.masks)
    assert [reading.pieces[p] for p in range(len(reading.ids)) if reading.added[p]] == ["[CLS]", "[SEP]", "[SEP]"]
    assert "[MASK]".join(reading.filling) == f"{TEXT} {PAIR}"
    assert set(reading.segments) == {0, 1}


def test_the_shares_of_the_sum(models, found):
    table = torch.tensor(list(found.shares.values()))
    assert list(found.shares) == ["word", "position", "segment"]
    assert (table.sum(0) - 1).abs().max() < ROUNDING
    embeddings, place = models[0].embeddings, 3
    rows = [embeddings.word.weight[found.reading.ids[place]], embeddings.position.weight[place]]
    rows.append(embeddings.token_type.weight[found.reading.segments[place]])
    centred = [row - row.mean() for row in rows]
    total = sum(centred)
    for share, row in zip(table[:, place], centred, strict=True):
        assert share.item() == pytest.approx((row @ total / (total @ total)).item(), abs=ROUNDING)


def test_a_part_that_is_all_the_sum_has_the_whole_share():
    part = torch.randn(5, 8)
    assert torch.allclose(shares([part, torch.ones(5, 8)]), torch.tensor([[1.0] * 5, [0.0] * 5]), atol=ROUNDING)


def test_the_guesses_are_transformers_head_on_transformers_states(found, theirs):
    _, logits, _ = theirs
    for one in found.guesses:
        answer = logits[-1][one.position].argmax().item()
        assert one.answer.id == answer
        assert len(one.steps) == len(logits) == 2 * SIZES["num_hidden_layers"] + 1
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


def test_the_last_guess_is_that_of_fill_mask(models):
    one = study(models[0], tokenizer(), TEXT)
    for guess, answer in zip(one.guesses[0].steps[-1].best, FillMask(models[0], tokenizer())(TEXT), strict=True):
        assert (guess.id, guess.token) == (answer["token"], answer["token_str"])
        assert guess.probability == pytest.approx(answer["score"], abs=ROUNDING)
    assert one.answers[0].best[0].id == one.guesses[0].answer.id


def test_from_where_on_the_answer_is_first(found):
    for one in found.guesses:
        names = [step.after for step in one.steps]
        start = names.index(one.first)
        assert all(step.answer.rank == 1 for step in one.steps[start:])
        assert start == 0 or one.steps[start - 1].answer.rank > 1


def test_the_maps_are_those_of_transformers(found, theirs):
    maps_of_page = unpack(found.maps.weights).view(theirs[2].shape)
    assert (maps_of_page - theirs[2]).abs().max() < 0.004


def test_what_a_head_writes_adds_up_to_the_attention_output(models, found):
    recorded = trace(models[0], *[torch.tensor([found.reading.ids]), None, torch.tensor([found.reading.segments])])
    for number, layer in enumerate(models[0].layers):
        alpha, value = (recorded.read(f"layers.{number}.{name}")[0] for name in ("probabilities", "value"))
        weight = layer.attention.output.weight.detach()
        given = written(value, weight)  # (H, S, D)
        of_head = torch.einsum("hqs,hsd->hqd", alpha, given)
        for head in range(len(value)):
            size = value.shape[-1]
            alone = alpha[head] @ value[head] @ weight[:, head * size : (head + 1) * size].T
            assert torch.allclose(of_head[head], alone, atol=ROUNDING)
        total = of_head.sum(0) + layer.attention.output.bias
        assert torch.allclose(total, recorded.read(f"layers.{number}.attention_output")[0], atol=ROUNDING)
        shares_taken = taken(alpha, given.norm(dim=-1))
        assert torch.allclose(shares_taken.sum(-1), torch.ones(()), atol=ROUNDING)


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
                part = attentions[1, head, place, token] * (
                    layer.attention.output.weight[:, columns] @ value[token, columns]
                )
                if token == place:
                    own += part
                else:
                    others += part
        norms = [((part - part.mean()) * layer.attention_LayerNorm.weight).norm() for part in (others, own)]
    assert found.changes[1].mixing[place] == pytest.approx((norms[0] / sum(norms)).item(), abs=ROUNDING)


def test_a_token_that_reads_itself_alone_mixes_nothing():
    x, given = torch.randn(4, 6), torch.randn(2, 4, 6)
    ratio = mixing_ratio(x, given.sum(0), torch.eye(4).expand(2, 4, 4), given, torch.ones(6))
    assert ratio.abs().max() < ROUNDING


def test_how_much_a_layer_changes(models, found, theirs):
    states = theirs[0]
    for number, layer in enumerate(found.changes):
        hub = models[1].bert.encoder.layer[number]
        with torch.inference_mode():
            attended = hub.attention.output.dense(hub.attention.self(states[2 * number][None])[0])[0]
            worked = hub.output.dense(hub.intermediate(states[2 * number + 1]))
        for got, update, x in (
            (layer.attention, attended, states[2 * number]),
            (layer.feed_forward, worked, states[2 * number + 1]),
        ):
            assert got == pytest.approx((update.norm(dim=-1) / x.norm(dim=-1)).tolist(), rel=1e-4)
        expected = torch.cosine_similarity(states[2 * number], states[2 * number + 2], dim=-1)
        assert layer.cosine == pytest.approx(expected.tolist(), abs=ROUNDING)


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
        hidden, alone = log_p(set(word.places)), log_p(words - set(word.places))
        for number, one in enumerate(found.guesses):
            token = one.answer.id
            assert word.hidden[number].nats == pytest.approx((hidden - whole)[number, token].item(), abs=ROUNDING)
            assert word.alone[number].nats == pytest.approx((alone - nothing)[number, token].item(), abs=ROUNDING)
            assert word.hidden[number].winner == tokenizer().id_to_token(hidden[number].argmax().item())
            assert word.alone[number].winner == tokenizer().id_to_token(alone[number].argmax().item())


def test_many_words_go_in_groups_of_neighbours():
    groups = [[place] for place in range(1, 500)]
    joined = neighbours(groups, 512)
    assert len(joined) * 512 <= MOST_TOKENS
    assert [place for group in joined for place in group] == list(range(1, 500))
    assert neighbours(groups[:20], 40) == groups[:20]
    assert neighbours([], 40) == []


@pytest.mark.parametrize(
    ("name", "share"),
    [("the previous token", -1), ("the next token", 1), ("itself", 0)],
    ids=["previous", "next", "itself"],
)
def test_a_head_with_a_habit_is_named_by_it(name, share):
    reading = read_text(tokenizer(), pair_of_models()[0].config, "Paris is cold")
    size = len(reading.ids)
    weights = torch.zeros(2, size, size)
    for place in range(size):
        weights[0, place, min(max(place + share, 0), size - 1)] = 1
    weights[1] = 1 / size
    first, second = habits(weights, reading, 6)
    assert (first.layer, first.head, first.name) == (7, 1, name)
    assert first.habits[name] == pytest.approx(1)
    assert first.spread == pytest.approx(1)
    assert (second.name, second.spread) == ("", pytest.approx(size))


def test_habits_of_content():
    reading = read_text(tokenizer(), pair_of_models()[0].config, "Paris, paris.")
    size = len(reading.ids)
    for name, place in (("[CLS]", 0), ("[SEP]", size - 1), ("punctuation", 2)):
        weights = torch.zeros(1, size, size)
        weights[..., place] = 1
        assert habits(weights, reading, 0)[0].name == name
    same = heads.targets(reading)["the same word"]
    assert same.nonzero().tolist() == [[1, 3], [3, 1]]


def test_spread_is_the_number_of_tokens_of_an_even_spread():
    assert spread(torch.full((1, 3, 8), 1 / 8)).flatten().tolist() == pytest.approx([8] * 3)


def test_parameters_and_multiply_adds_are_those_of_the_model(models, found):
    reading = found.reading
    parts = cost(models[0].config, len(reading.ids), len(reading.masks))
    assert sum(part.parameters for part in parts) == sum(p.numel() for p in models[0].parameters())
    assert found.model.parameters == sum(part.parameters for part in parts)
    batch = PackedBatch.from_lists([reading.ids], [reading.segments])
    models[0].requires_grad_(False)
    with FlopCounterMode(display=False) as counter, use_kernel("formula"):
        models[0].predict(batch, torch.tensor(reading.masks))
    assert 2 * sum(part.multiply_adds for part in parts) == counter.get_total_flops()


def test_the_root_keeps_small_weights():
    weights = torch.softmax(torch.randn(3, 4, 128, 128) * 3, -1)
    back = unpack(pack(weights)).view(weights.shape)
    assert (back - weights).abs().max() <= 0.004
    assert (back.sum(-1) - 1).abs().max() < 0.01


@pytest.mark.parametrize("limit", ["MOST_WEIGHTS", "MOST_TEXT"])
def test_maps_that_are_too_many_are_folded(monkeypatch, limit):
    weights = [torch.softmax(torch.randn(2, 100, 100), -1) for _ in range(3)]
    lengths = [torch.rand(2, 100) for _ in range(3)]
    takes = [taken(one, length) for one, length in zip(weights, lengths, strict=True)]
    assert maps(weights, takes, lengths, [7, 50]).side == 100
    monkeypatch.setattr("minibert.study.heads." + limit, 3 * 2 * 100 * 100 // 2)
    kept = maps(weights, takes, lengths, [7, 50])
    assert kept.side == 64
    folded = unpack(kept.weights).view(3, 2, kept.side, kept.side)
    assert (folded.amax((-1, -2)) - torch.stack(weights).amax((-1, -2))).abs().max() < 0.004
    rows = unpack(kept.rows).view(3, 2, -1, 100)
    assert (rows - torch.stack(weights)[:, :, kept.row_places]).abs().max() < 0.004
    assert kept.row_places == [7, 50]


def test_the_lengths_of_what_is_given_are_kept():
    """To a share of 1 / 65,535 of the longest: 16 bits each."""
    weights, lengths = [torch.softmax(torch.randn(2, 9, 9), -1)], [torch.rand(2, 9) * 7]
    kept = maps(weights, [taken(weights[0], lengths[0])], lengths, [])
    shares = torch.frombuffer(bytearray(zlib.decompress(base64.b64decode(kept.lengths))), dtype=torch.uint16)
    back = shares.float().view(1, 2, 9) / 65535 * torch.tensor(kept.longest)[..., None]
    assert (back - lengths[0]).abs().max() < 7 / 65535


def test_folding_keeps_a_diagonal():
    assert torch.equal(fold(torch.eye(128)[None, None], 64)[0, 0], torch.eye(64))


def test_the_json_has_five_digits_of_every_number(found):
    """Five digits are right to half of the fifth: at most 5e-5 of the number."""
    data = found.to_dict()
    for number, layer in enumerate(found.changes):
        for name, values in asdict(layer).items():
            assert data["changes"][number][name] == pytest.approx(values, rel=5.1e-5), name
    for name, values in found.shares.items():
        assert data["shares"][name] == pytest.approx(values, rel=5.1e-5)


def test_ids_that_are_no_words_never_win():
    ours, _ = pair_of_models(vocab_size=len(VOCABULARY) + 20)
    with torch.no_grad():
        ours.head.bias[len(VOCABULARY) :] = 100
    found = study(ours, tokenizer(), TEXT)
    ids = [guess.id for step in found.guesses[0].steps for guess in step.best]
    ids += [guess.id for guess in found.answers[0].best]
    assert max(ids) < len(VOCABULARY)
    assert found.guesses[0].steps[-1].answer.rank == 1
    assert {one.winner for word in found.influence for one in word.hidden + word.alone} <= set(VOCABULARY)


def test_the_numbers_of_another_models_trace_are_not_shown(models):
    other = pair_of_models(num_hidden_layers=2)[0]
    with pytest.raises(ValueError, match="num_hidden_layers is 3, the model's 2"):
        study_trace(trace(models[0], torch.tensor([[2, 5, 6, 4, 3]])), 0, other, tokenizer())


def test_a_text_cannot_end_the_element_that_the_numbers_are_in(models):
    text = "</script><script>alert(1)</script><!-- [MASK]"
    found = study(models[0], tokenizer(), text)
    inside = found.to_html().split('type="application/json"')[1].split(">", 1)[1].split("</script>")[0]
    assert json.loads(inside)["reading"] == found.to_dict()["reading"]


def test_a_file_that_is_no_page_is_replaced_only_by_force(found, tmp_path):
    target = tmp_path / "notes.html"
    target.write_text("my notes", encoding="utf-8")
    with pytest.raises(FileExistsError, match="--force"):
        found.save(target)
    assert target.read_text(encoding="utf-8") == "my notes"
    found.save(target, force=True)
    assert target.read_text(encoding="utf-8") == found.to_html()
