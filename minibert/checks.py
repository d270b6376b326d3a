"""What a user gives, checked where it comes in: shapes, dtypes and ranges, each with a sentence that says what to do.

The rest of the package can then take its input for granted.
"""

import sys
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from os import PathLike

import torch
from torch import Tensor, nn

from minibert.config import BertConfig

IGNORE = -100  # the label that means "nothing was asked here", in torch's cross_entropy and everywhere else
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
# What each takes, for "did you mean …?".
TAKEN = {
    "the model": ("input_ids", "attention_mask", "token_type_ids", "position_ids", "labels"),
    "from_pretrained": ("dtype", "torch_dtype", "device", "revision", "local_files_only", "init_missing_head"),
    "save_pretrained": ("tokenizer", "state_dict", "is_main_process", "save_function"),
}
# What transformers' tokenizers give, and what no model reads.
FROM_TOKENIZERS = ("special_tokens_mask", "offset_mapping", "length", "overflow_to_sample_mapping")
NOWHERE = (
    "the device meta holds no numbers: choose auto, cpu, cuda or mps, outside of init_empty_weights(). An empty model "
    "is BertForMaskedLM(config)"
)
RATES = ("hidden_dropout_prob", "attention_probs_dropout_prob")  # what of the configuration may be set while loading
# Arguments and attributes of transformers that are not here, and what to use instead.
_INSTEAD = {
    "inputs_embeds": "give input_ids, and put the vectors (B, S, D) there by a forward hook: "
    "model.embeddings.word.register_forward_hook(lambda *_: vectors)",
    "masked_lm_labels lm_labels": "it is called labels now",
    "ignore_index": "a label of -100 is left out of the loss",
    "logits_to_keep": "model.predict(batch, positions) gives the logits of some positions alone",
    "num_items_in_batch": "the loss is a mean: scale it yourself, or set accepts_loss_kwargs = False for the Trainer",
    "encoder_hidden_states encoder_attention_mask past_key_values use_cache is_decoder": "that is for decoders, and "
    "BERT is an encoder",
    "head_mask prune_heads": "set the head's columns in model.layers[N].attention.output.weight to 0",
    "next_sentence_label seq_relationship_logits": "that is of the next-sentence head, which this model does not have",
    "last_hidden_state pooler pooler_output add_pooling_layer num_labels classifier": "this is the masked language "
    "model, and has no classifier: take hidden_states (with output_hidden_states=True), or model.encode(batch)",
    "attn_implementation set_attn_implementation use_flash_attention_2": "the fastest is chosen for each batch; "
    "minibert.attention.use_kernel(…) forces one, within a with block",
    "config": "the sizes come from the checkpoint's config.json; for an untrained model, BertForMaskedLM(config)",
    "state_dict from_config init_weights post_init": "BertForMaskedLM(config) is an untrained model, and "
    "minibert.checkpoint.names.from_transformers(state) is what its load_state_dict takes",
    "layer_norm_eps hidden_act vocab_size tie_word_embeddings ignore_mismatched_sizes": "what the file says holds",
    "device_map max_memory offload_folder tp_plan": 'give device="cuda"; the model is not cut into parts, but '
    "accelerate.dispatch_model can do it",
    "quantization_config load_in_8bit load_in_4bit quantize dequantize to_bettertransformer": "prepare_for_inference("
    "model) makes it faster, with torch.int8 on a CPU or torch.bfloat16 on a GPU smaller, too",
    "trust_remote_code code_revision": "no code of a checkpoint is ever run",
    "token use_auth_token cache_dir proxies": "set HF_TOKEN (or call `hf auth login`), HF_HUB_CACHE or HTTPS_PROXY",
    "force_download resume_download": "delete the checkpoint in the cache: `hf cache rm`",
    "output_loading_info name_or_path": "model.load_report says what was read",
    "from_tf from_flax": "convert it first, with the program that wrote it: only safetensors are read",
    "subfolder": "give the folder itself",
    "variant max_shard_size use_safetensors safe_serialization": "one file, model.safetensors, is read and written",
    "push_to_hub": "call model.save_pretrained(folder), and upload that: `hf upload owner/name folder`",
    "get_output_embeddings set_output_embeddings decoder": "the head compares with model.word_embeddings (V, D), and "
    "adds model.head.bias",
    "set_input_embeddings word_embeddings": "it is model.embeddings.word; for more words "
    "model.resize_token_embeddings(…)",
    "get_position_embeddings resize_position_embeddings": "they are model.embeddings.position",
    "enable_input_require_grads disable_input_require_grads activation_checkpointing_enable "
    "activation_checkpointing_disable supports_gradient_checkpointing": "call model.gradient_checkpointing_enable(), "
    "which needs no more, or _disable()",
    "generate": "BERT does not write on; minibert.FillMask(model, tokenizer) fills in [MASK]",
    "encoder layer get_encoder get_decoder": "its layers are model.layers",
    "get_memory_footprint": "sum(x.nbytes for x in model.parameters())",
    "add_adapter load_adapter": "call peft.get_peft_model(model, peft.LoraConfig(…))",
}
INSTEAD = {name: remedy for names, remedy in _INSTEAD.items() for name in names.split()}
# May be given, with one of the values that hold here anyway.
HOLDS: dict[str, tuple[object, ...]] = {
    **dict.fromkeys("use_safetensors safe_serialization tie_word_embeddings".split(), (True,)),
    **dict.fromkeys("low_cpu_mem_usage token use_auth_token use_cache resume_download".split(), (True, False)),
    **dict.fromkeys("trust_remote_code push_to_hub force_download is_decoder from_tf from_flax".split(), (False,)),
    **dict.fromkeys("ignore_mismatched_sizes load_in_8bit load_in_4bit add_pooling_layer".split(), (False,)),
    "output_loading_info": (False,),
    "attn_implementation": ("eager", "sdpa"),
    "subfolder": ("",),
    "ignore_index": (IGNORE,),
}


def no_attribute(owner: str, name: str) -> AttributeError:
    """The error for an attribute that is not there, with what to use instead of one of transformers."""
    return AttributeError(f"{owner} has no {name!r}" + (f": {INSTEAD[name]}" if name in INSTEAD else ""))


def own_config(config: object) -> BertConfig:
    """A configuration; one of transformers is converted. Raises TypeError for what is none."""
    if isinstance(config, BertConfig):
        return config
    values = config.to_dict() if hasattr(config, "to_dict") else config
    if isinstance(values, Mapping):
        return BertConfig.from_dict(values)
    raise TypeError(
        f"config must be a minibert.BertConfig, not {config!r:.60}: for the weights of a checkpoint, "
        "BertForMaskedLM.from_pretrained(name_or_path)"
    )


def device_of(device_map: object, device: torch.device | str | None) -> torch.device | None:
    """The one device that a device_map of accelerate names, or `device` if there is none. Raises TypeError for more,
    and ValueError for one that is not there.
    """
    if isinstance(device_map, Mapping) and set(device_map) == {""}:  # the whole model
        device_map = device_map[""]
    if device_map is not None and device is not None:
        raise ValueError(f"device is {device!r} and device_map {device_map!r}: give one of the two")
    where = device if device_map is None else f"cuda:{device_map}" if type(device_map) is int else device_map
    spread = device_map in ("auto", "balanced", "balanced_low_0", "sequential")
    if spread or not isinstance(where, str | torch.device | None):
        raise TypeError(f"from_pretrained takes no device_map={device_map!r}: {INSTEAD['device_map']}")
    if where is None and torch.get_default_device().type == "meta":
        where = "meta"
    return None if where is None else find_device(where)


def refuse_others(others: Mapping[str, object], what: str, more: Sequence[object] = ()) -> None:
    """Raise TypeError, as Python does, for an argument that `what` does not have, and say what to use; and for `more`
    of them by place. What a tokenizer gives to the model may be passed on to it.
    """
    if more:
        raise TypeError(
            f"{what} takes {', '.join(TAKEN[what])} by place, and more by name. (torch.onnx.export(dynamo=False) gives "
            "all by place: call `minibert export --out model.onnx`, or minibert.export.export, instead.)"
        )
    for name, value in others.items():
        passed_on = (what == "the model" and name in FROM_TOKENIZERS) or (value is None and name in INSTEAD)
        if passed_on or value in HOLDS.get(name, ()):
            continue
        like = get_close_matches(name, TAKEN[what], 1)
        hint = INSTEAD.get(name) or (f"did you mean {like[0]}?" if like else "its docstring lists what it takes")
        if name in HOLDS:
            raise TypeError(f"{what} has {name}={' or '.join(map(repr, HOLDS[name]))} only, not {value!r}: {hint}")
        raise TypeError(f"{what} takes no argument {name!r}: {hint}")


def find_device(name: str | torch.device) -> torch.device:
    """The device with this name: "cpu", "cuda", "cuda:1", "mps", …; "auto" is CUDA where there is one, else the CPU.

    Raises ValueError, naming what there is, if torch knows no such device, if this machine has none, and for "meta",
    which holds no numbers.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        gpus = f"cuda:0 to cuda:{torch.cuda.device_count() - 1}" if torch.cuda.is_available() else "no cuda"
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"the device {name} cannot be used here, where there is cpu and {gpus}"
            f"{' and mps' if torch.backends.mps.is_available() else ''} ({reason}). cpu is everywhere"
        ) from error
    if device.type == "meta":
        raise ValueError(NOWHERE)
    return device


def being_traced() -> bool:
    """Whether this call is being recorded (torch.compile, torch.export, torch.jit.trace), or transformed by torch.func:
    then no tensor can be asked what it holds.
    """
    recorded = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]
    return recorded or torch._C._are_functorch_transforms_active()


def require_tensors(**given: object) -> None:
    """Raise TypeError for what is no tensor, such as a list or a NumPy array. None is what was left out."""
    for name, value in given.items():
        if value is None and name == "input_ids":
            raise TypeError("input_ids is missing: give the ids of the tokens, a tensor (batch, length)")
        if isinstance(value, Mapping):
            raise TypeError(f"{name} must be a tensor, not {type(value).__name__}: unpack it, model(**encoding)")
        if value is not None and not isinstance(value, Tensor):
            kind = type(value).__name__
            how = "torch.from_numpy(…)" if kind == "ndarray" else "torch.tensor(…)"
            raise TypeError(f"{name} must be a tensor, not {kind}: {how} makes one")


def lengths_of_lists(name: str, lists: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The length of each list of ids. Raises TypeError for what is no list of lists, such as the ids of one text."""
    with suppress(TypeError):  # what has no length
        if not any(isinstance(ids, str) for ids in lists):
            return tuple(len(ids) for ids in lists)
    shown = repr(lists)
    shown = shown if len(shown) <= 60 else f"{shown[:57]}…"
    raise TypeError(f"{name} must be a list for each text, such as [[101, 7592, 102]], not {shown}")


def padded_inputs(
    input_ids: Tensor, attention_mask: Tensor | None, token_type_ids: Tensor | None, position_ids: Tensor | None
) -> tuple[Tensor | None, Tensor, Tensor]:
    """The mask as bool (or None, if nothing is padding), the token types and the positions, each (B, S), with nothing
    else left out. `PackedBatch.from_padded` says what each may be. Raises ValueError for other shapes or types; what
    the mask holds is not asked while the call is recorded.
    """
    require_tensors(input_ids=input_ids, attention_mask=attention_mask)
    require_tensors(token_type_ids=token_type_ids, position_ids=position_ids)
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids must be (batch, length), not {tuple(input_ids.shape)}: add the batch dimension")
    types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
    columns = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    positions = columns if position_ids is None else position_ids
    if positions.dim() == 2 and positions.shape[1] == input_ids.shape[1]:
        with suppress(RuntimeError):  # (1, S) holds for each row
            positions = positions.expand(input_ids.shape)
    for name, ids in (("input_ids", input_ids), ("token_type_ids", types), ("position_ids", positions)):
        _require_shape(name, ids, input_ids)
        if ids.dtype not in INTEGERS:
            raise ValueError(f"{name} must hold integers, not {ids.dtype}")
    if attention_mask is None:
        return None, types, positions
    _require_shape("attention_mask", attention_mask, input_ids)
    mask = attention_mask.bool()
    if mask.numel() and not being_traced():
        if not bool((attention_mask == mask).all()):
            raise ValueError(
                "attention_mask may hold only 0 (padding) and 1 (token), but it ranges from "
                f"{attention_mask.min().item()} to {attention_mask.max().item()}"
            )
        _require_seen(mask, token_type_ids)
    return mask, types, positions


def _require_seen(mask: Tensor, token_type_ids: Tensor | None) -> None:
    """Raise ValueError or warn where mask and token types seem to be exchanged: a tokenizer gives the types first."""
    by_name = "By place the mask comes before the token types: give attention_mask= and token_type_ids= by name"
    empty = int((~mask.any(1)).sum())
    if empty == len(mask):
        raise ValueError(f"attention_mask is 0 everywhere, so there is no token to read. {by_name}")
    if empty:
        warn(f"attention_mask is 0 in the whole of {empty} of {len(mask)} rows, whose logits are all 0. {by_name}")
    if token_type_ids is not None and bool((token_type_ids.masked_fill(mask, 0) > 0).any()):
        warn(f"attention_mask is 0 at tokens of type 1, as in no tokenizer's output. {by_name}")


def warn(message: str) -> None:
    """Warn at the line of the user's program that led here, which Python then shows once."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("minibert", "torch"):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def require_labels(labels: Tensor, attention_mask: Tensor | None, input_ids: Tensor) -> None:
    """Raise ValueError for labels of another shape than `input_ids`, and for a label where there is no token."""
    _require_shape("labels", labels, input_ids)
    under_padding = 0 if attention_mask is None else int(((labels != IGNORE) & (attention_mask == 0)).sum())
    if under_padding:
        raise ValueError(f"{under_padding} labels stand where attention_mask is 0, and none is scored: make them -100")


def largest(ids: Tensor, types: Tensor, positions: Tensor) -> tuple[int, int, int]:
    """The largest token id, type and position of a batch, on the host; −1 if it is empty. Raises ValueError if one is
    negative.
    """
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        raise ValueError(
            "torch.jit.trace would make constants of the lengths in this one batch, and the program would be wrong for "
            "the next: trace the padded call, model(input_ids, attention_mask), and no PackedBatch"
        )
    if ids.numel() == 0:
        return (-1, -1, -1)
    stacked = torch.stack([ids, types, positions])  # (3, T): one question to the device, not six
    lows, (token_id, token_type, position) = torch.stack([stacked.amin(1), stacked.amax(1)]).tolist()
    for name, low in zip(("input_ids", "token_type_ids", "position_ids"), lows, strict=True):
        if low < 0:
            raise ValueError(f"{name} may not be negative, but holds {low}")
    return token_id, token_type, position


def require_embeddings(largest: tuple[int, int, int], config: BertConfig) -> None:
    """Raise ValueError if the largest token id, type or position of a batch has no embedding in a model of this size.
    (A GPU would end the process.)
    """
    token_id, token_type, position = largest
    if token_id >= config.vocab_size:
        raise ValueError(f"token id {token_id} is unknown: the vocabulary has {config.vocab_size} entries, from 0")
    if token_type >= config.type_vocab_size:
        raise ValueError(f"token type {token_type} is unknown: the model has {config.type_vocab_size}, counted from 0")
    if position >= config.max_position_embeddings:
        raise ValueError(
            f"a sequence reaches {position + 1} tokens, and the model has positions for "
            f"{config.max_position_embeddings}: shorten it, or ask for truncation where the text is tokenized"
        )


def require_positions(positions: Tensor, num_tokens: int) -> None:
    """Raise ValueError unless `positions` is (M,) whole numbers between 0 and T − 1. On a GPU the range is left to the
    indexing itself, since asking would stall the queue.
    """
    require_tensors(positions=positions)
    if positions.dim() != 1 or positions.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"positions must be (M,) whole numbers, not {tuple(positions.shape)} {positions.dtype}")
    if positions.is_cpu and positions.numel():
        low, high = int(positions.min()), int(positions.max())
        if low < 0 or high >= num_tokens:
            raise ValueError(
                f"positions go from {low} to {high}, but they count packed tokens, from 0 to {num_tokens - 1}"
            )


def require_no_dropout(model: nn.Module) -> None:
    """Raise ValueError if the model is in training mode, in which dropout makes its answers random. (Turning dropout
    off and on again here would disturb another thread that trains this model.)
    """
    for name, part in model.named_modules():
        if isinstance(part, nn.Dropout) and part.training and part.p > 0:
            raise ValueError(
                f"the model is in training mode ({name} has dropout of {part.p}), so its answers would be random: call "
                "model.eval() before asking, and model.train() before training on"
            )


def require_model(model: object) -> None:
    """Raise TypeError for what is no model of this package, such as the name of one, or one of transformers."""
    if not isinstance(getattr(model, "config", None), BertConfig):
        kind = f"the name {model!r}" if isinstance(model, str | PathLike) else type(model)
        raise TypeError(
            f"the model must be minibert's BertForMaskedLM, not {kind}: BertForMaskedLM.from_pretrained(folder) "
            "loads one, also what transformers' save_pretrained(folder) wrote"
        )


def require_vocabulary(tokens: int, config: BertConfig) -> None:
    """Raise ValueError if a tokenizer has more tokens than the model has embeddings. Warn if it has fewer, but for a
    model that is filled up to a multiple of 8, 16, … or 128.
    """
    if tokens > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokens} tokens and the model {config.vocab_size}: they are not of one checkpoint"
        )
    filled_up = {-(-tokens // multiple) * multiple for multiple in (8, 16, 32, 64, 128)}
    if config.vocab_size not in (tokens, *filled_up):
        warn(
            f"the tokenizer has {tokens} tokens and the model {config.vocab_size}, more than filling up makes: are "
            "they of one checkpoint? If so, model.resize_token_embeddings cuts the rest off"
        )


def _require_shape(name: str, tensor: Tensor, input_ids: Tensor) -> None:
    if tensor.shape != input_ids.shape:
        raise ValueError(f"{name} is {tuple(tensor.shape)}, but input_ids is {tuple(input_ids.shape)}: give both alike")
