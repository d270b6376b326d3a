"""BERT in numpy, as people port it, with the quirks that public ports have. Nothing of it is ours or transformers'."""

import json
from dataclasses import asdict, dataclass
from math import erf

import numpy as np

from minibert.checkpoint.names import hub_names


@dataclass
class NumpyBert:
    """merged_heads: query, key and value are written as (B, S, D), otherwise as (B, S, H, K). eps: of the layers'
    LayerNorms, if it is another than the embeddings' and the head's. The other quirks are faults.
    """

    model: object
    merged_heads: bool = True
    eps: float | None = None
    tanh: bool = False
    sample_std: bool = False
    pre_norm: bool = False

    def __post_init__(self):
        self.config = self.model.config
        self.weights = {}
        for name, x in self.model.state_dict().items():
            hubs = hub_names(name)
            self.weights |= {hub: part.numpy() for hub, part in zip(hubs, x.chunk(len(hubs)), strict=True)}

    def linear(self, x, name):
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def norm(self, x, name):
        eps = self.eps if self.eps and ".layer." in name else self.config.layer_norm_eps
        scale = np.sqrt(x.var(-1, keepdims=True, ddof=int(self.sample_std)) + np.float32(eps))
        return (x - x.mean(-1, keepdims=True)) / scale * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def gelu(self, x):
        if self.tanh:  # as jax.nn.gelu does unless told
            return (
                np.float32(0.5) * x * (1 + np.tanh(np.float32((2 / np.pi) ** 0.5) * (x + np.float32(0.044715) * x**3)))
            )
        return (0.5 * x * (1 + np.vectorize(erf)(x / 2**0.5))).astype(np.float32)

    def run(self, input_ids, attention_mask, token_type_ids, labels):
        w, heads = self.weights, self.config.num_attention_heads
        rows, length = input_ids.shape
        out = dict(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids, labels=labels)
        place = w["bert.embeddings.position_embeddings.weight"][:length]
        x = w["bert.embeddings.word_embeddings.weight"][input_ids] + place
        x = out["embeddings.sum"] = x + w["bert.embeddings.token_type_embeddings.weight"][token_type_ids]
        x = out["embeddings.norm"] = self.norm(x, "bert.embeddings.LayerNorm")
        for n in range(self.config.num_hidden_layers):
            path, name = f"bert.encoder.layer.{n}", f"layers.{n}"
            read = self.norm(x, f"{path}.attention.output.LayerNorm") if self.pre_norm else x
            parts = [self.linear(read, f"{path}.attention.self.{part}") for part in ("query", "key", "value")]
            split = [part.reshape(rows, length, heads, -1) for part in parts]
            written = parts if self.merged_heads else split
            out |= {f"{name}.{part}": each for part, each in zip(("query", "key", "value"), written, strict=True)}
            query, key, value = (part.transpose(0, 2, 1, 3) for part in split)
            scores = query @ key.transpose(0, 1, 3, 2) / np.float32(query.shape[-1] ** 0.5)
            scores = np.where(attention_mask[:, None, None] == 1, scores, np.float32(-1e9))
            powers = np.exp(scores - scores.max(-1, keepdims=True))
            out[f"{name}.probabilities"] = powers / powers.sum(-1, keepdims=True)
            context = (out[f"{name}.probabilities"] @ value).transpose(0, 2, 1, 3).reshape(x.shape)
            x = self.block(
                x, self.linear(context, f"{path}.attention.output.dense"), f"{path}.attention.output.LayerNorm"
            )
            read = self.norm(x, f"{path}.output.LayerNorm") if self.pre_norm else x
            inner = self.gelu(self.linear(read, f"{path}.intermediate.dense"))
            x = self.block(x, self.linear(inner, f"{path}.output.dense"), f"{path}.output.LayerNorm")
            if not self.pre_norm:
                out[f"{name}.feed_forward_norm"] = x
        x = self.gelu(self.linear(x, "cls.predictions.transform.dense"))
        x = out["head.norm"] = self.norm(x, "cls.predictions.transform.LayerNorm")
        logits = out["logits"] = x @ w["bert.embeddings.word_embeddings.weight"].T + w["cls.predictions.bias"]
        asked = labels != -100
        wrong = (
            np.log(np.exp(logits[asked]).sum(-1)) - np.take_along_axis(logits[asked], labels[asked][:, None], 1)[:, 0]
        )
        return out | {"loss": wrong.mean(keepdims=True)}

    def block(self, x, update, norm):
        return x + update if self.pre_norm else self.norm(x + update, norm)

    def write(self, path, inputs):
        metadata = {"format": "minibert-trace", "version": "1", "dtype": "float32", "backend": "numpy"}
        metadata["config"] = json.dumps(asdict(self.config))
        np.savez(path, metadata=json.dumps(metadata), **self.run(**{name: x.numpy() for name, x in inputs.items()}))
