"""Twins: a minibert and a transformers model with the same random weights, batches of every mask shape, and the
checks that compare the two. Used by the parity tests and by the test of those tests.
"""

from dataclasses import asdict, replace

import needs
import torch
import transformers

from minibert import BertConfig, BertForMaskedLM
from minibert.checkpoint.names import NAMES, hub_names
from minibert.packing import PackedBatch


def sizes(vocabulary, hidden, layers, heads, feed_forward, longest, types, **more):
    return dict(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=feed_forward,
        max_position_embeddings=longest,
        type_vocab_size=types,
        **more,
    )


# Awkward on purpose: no two sizes are equal, so that swapped axes and forgotten splits fail.
CONFIGS = {
    "batch 13, gelu": sizes(99, 32, 5, 4, 37, 19, 2),
    "3 heads, gelu_new": sizes(131, 24, 2, 3, 17, 11, 3, hidden_act="gelu_new", layer_norm_eps=1e-7),
    "1 head, relu": sizes(53, 10, 1, 1, 7, 23, 2, hidden_act="relu", pad_token_id=None),
}
SIZES = {"batch 13, gelu": (13, 7), "3 heads, gelu_new": (3, 11), "1 head, relu": (1, 5)}
MASKS = ("dense", "right", "left", "holes")

# float32 on the CPU. The logits are of order 1 to 5; one rounding is 6e-8 of that, and a path through the model
# has some tens of roundings that may differ, since the two add the same numbers in another order where lengths
# differ.
LOGITS = 1e-5
LOSS = 2e-6
GRADIENT = 1e-5  # of the largest gradient in the tensor


def compare(what, got, expected, tolerance, where=""):
    """Assert that two tensors differ by at most `tolerance`, and keep the largest difference for the last table."""
    difference = (got - expected).abs().max().item()
    assert difference <= tolerance, f"{where} {what} differ by {difference:.2e}, more than {tolerance:.0e}"
    needs.measured(what, difference, tolerance)


def twins(config, attention="eager", dtype=torch.float32):
    """(ours, theirs), with random weights everywhere, in evaluation mode."""
    torch.manual_seed(1)
    ours = BertForMaskedLM(BertConfig(**config)).eval()
    with torch.no_grad():
        for name, parameter in ours.state_dict(keep_vars=True).items():
            if name.startswith("embeddings") and parameter.dim() == 2:
                parameter.normal_(0, 0.02)  # as small as BERT's own, so that the eps of the first LayerNorm counts
            elif parameter.dim() == 2:
                parameter.normal_(0, parameter.shape[1] ** -0.5)
            else:
                parameter.normal_(1.0 if "LayerNorm.weight" in name else 0.0, 0.2)
    theirs = transformers.BertConfig(**asdict(ours.config), attn_implementation=attention)
    theirs = transformers.BertForMaskedLM(theirs).eval()
    copy_weights(ours, theirs)
    return ours.to(dtype), theirs.to(dtype)


def copy_weights(ours, theirs):
    state = theirs.state_dict()
    with torch.no_grad():
        for name, tensor in ours.state_dict().items():
            hubs = hub_names(name)
            for hub, part in zip(hubs, tensor.chunk(len(hubs)), strict=True):
                state[hub].copy_(part)


def make_batch(config, mask, shape, two_segments=False):
    """The keyword arguments of both models' forward, labels included."""
    generator = torch.Generator().manual_seed(2)
    rows, columns = shape
    ids = torch.randint(0, config["vocab_size"], shape, generator=generator)
    lengths = torch.randint(1, columns + 1, (rows, 1), generator=generator)
    lengths[0] = columns
    column = torch.arange(columns)
    attention_mask = {
        "dense": torch.ones(shape, dtype=torch.long),
        "right": (column < lengths).long(),
        "left": (column >= columns - lengths).long(),
        "holes": (torch.rand(shape, generator=generator) < 0.6).long(),
    }[mask]
    attention_mask[:, columns // 2] |= attention_mask.sum(1) == 0  # a row of padding alone is another test's matter
    labels = torch.where(torch.rand(shape, generator=generator) < 0.4, ids, -100)
    labels[attention_mask == 0] = -100
    batch = dict(input_ids=ids, attention_mask=attention_mask, labels=labels)
    if two_segments:
        batch["token_type_ids"] = (column >= columns // 2).long() * attention_mask
    return batch


def pack(batch):
    return PackedBatch.from_padded(batch["input_ids"], batch["attention_mask"], batch.get("token_type_ids"))


def on_a_fake_gpu(batch):
    """The packed batch in a FakeTensorMode: its tensors have a device and no numbers."""
    tensors = {name: x for name, x in vars(batch).items() if isinstance(x, torch.Tensor)}
    return replace(batch, **{name: torch.empty_like(x, device="cuda") for name, x in tensors.items()})


def assert_same_logits_and_loss(ours, theirs, batch, logits=LOGITS, loss=LOSS, label="float32"):
    got, expected = ours(**batch), theirs(**batch)
    seen = batch["attention_mask"].bool()
    assert expected.logits[seen].abs().max() > 0.5, "logits of order 1, or the tolerance means nothing"
    compare(f"logits, {label}", got.logits[seen], expected.logits[seen], logits)
    compare(f"loss, {label}", got.loss, expected.loss, loss)
    return got, expected


def assert_same_gradients(ours, theirs, batch, tolerance=GRADIENT, label="float32"):
    for model in (ours, theirs):
        model.zero_grad()
        model(**batch).loss.backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.state_dict(keep_vars=True).items():
        hubs = hub_names(name)
        for hub, part in zip(hubs, parameter.grad.chunk(len(hubs)), strict=True):
            gradient = expected[hub].grad
            scale = gradient.abs().max().clamp(min=1e-3)
            what = f"gradients, of the largest entry, {label}"
            compare(what, part / scale, gradient / scale, tolerance, where=hub)


def outputs(model, names, run):
    """What the modules of these names give while `run` lasts."""
    found = {}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: found.__setitem__(name, output.detach())
        )
        for name in names
    ]
    run()
    for handle in handles:
        handle.remove()
    return found


def assert_same_submodules(ours, theirs, batch, tolerance=LOGITS, label="float32"):
    """Every module of the name table gives what its counterpart gives: for layer after layer, in packed order."""
    pairs = {}
    for name, hubs in NAMES:
        if name == "head":
            continue  # the bias: the logits show it
        for number in range(ours.config.num_hidden_layers) if ".N." in name else [0]:
            pairs[name.replace(".N.", f".{number}.")] = [hub.replace(".N.", f".{number}.") for hub in hubs]
    packed, shape = pack(batch), batch["input_ids"].shape
    got = outputs(ours, pairs, lambda: ours.predict(packed, torch.arange(packed.num_tokens)))
    expected = outputs(theirs, [hub for hubs in pairs.values() for hub in hubs], lambda: theirs(**batch))
    for name, hubs in pairs.items():
        right = torch.cat([packed.pack(expected[hub].expand(*shape, -1)) for hub in hubs], dim=-1)
        scale = right.abs().max().clamp(min=1)
        what = f"submodules, of the largest entry, {label}"
        compare(what, got[name] / scale, right / scale, tolerance, where=f"{name} against {hubs}")
