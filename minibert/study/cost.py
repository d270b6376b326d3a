"""View 6: the steps of model.py with one text's numbers filled in, and what each costs."""

from dataclasses import dataclass

from minibert.config import BertConfig


@dataclass(frozen=True)
class Part:
    """times: how often the step is there. parameters and multiply_adds are of all times together."""

    name: str
    shapes: str
    times: int
    parameters: int
    multiply_adds: int


def cost(config: BertConfig, tokens: int, asked: int) -> list[Part]:
    """What each step of the model reads and gives, for S tokens and M asked places; its learned numbers; and its
    multiply-adds, those of the matrix products alone (lookups, norms, the softmax and activations have almost none).
    """
    s, m, d, f = tokens, asked, config.hidden_size, config.intermediate_size
    n, h, k, v = config.num_hidden_layers, config.num_attention_heads, config.head_size, config.vocab_size
    rows = v + config.max_position_embeddings + config.type_vocab_size

    def part(name: str, shapes: str, times: int, parameters: int, products: int) -> Part:
        return Part(name, shapes, times, times * parameters, times * products)

    return [
        part("embeddings: word + position + segment, LayerNorm", f"({s}) → ({s}, {d})", 1, rows * d + 2 * d, 0),
        part("query, key, value", f"({s}, {d}) → 3 × ({s}, {h}, {k})", n, 3 * (d * d + d), 3 * s * d * d),
        part("attention: scores, softmax", f"({h}, {s}, {k}) · ({h}, {k}, {s}) → ({h}, {s}, {s})", n, 0, s * s * d),
        part("attention: weights · values", f"({h}, {s}, {s}) · ({h}, {s}, {k}) → ({s}, {d})", n, 0, s * s * d),
        part("attention: output, add, LayerNorm", f"({s}, {d}) → ({s}, {d})", n, d * d + 3 * d, s * d * d),
        part("feed-forward: up, activation", f"({s}, {d}) → ({s}, {f})", n, d * f + f, s * d * f),
        part("feed-forward: down, add, LayerNorm", f"({s}, {f}) → ({s}, {d})", n, f * d + 3 * d, s * f * d),
        part("head: dense, activation, LayerNorm", f"({m}, {d}) → ({m}, {d})", 1, d * d + 3 * d, m * d * d),
        part("head: product with every word embedding", f"({m}, {d}) → ({m}, {v})", 1, v, m * d * v),
    ]
