"""Write a tokenizer as the files that `AutoTokenizer.from_pretrained` of transformers loads."""

import json
from typing import Any

from lit_gptdata._io import as_json
from lit_gptdata.tokens.gigatoken import ranks_as_json
from lit_gptdata.tokens.libraries.hugging_face import HuggingFaceReference
from lit_gptdata.tokens.libraries.tiktoken_encoding import PROBE
from lit_gptdata.tokens.tokenizer import Tokenizer

_FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def transformers_files(
    given: Any, vocab_size: int, length: int
) -> tuple[dict[str, bytes], dict[str, int]]:
    """tokenizer.json and tokenizer_config.json, name → content; the ids of BOS and EOS for config.json.

    `given`: anything that `Tokenizer` takes. Raises ValueError for one with more ids than the model, and
    for one that a tokenizer.json cannot hold, ImportError.
    """
    tokenizer = Tokenizer(given)
    reference, special_ids, name = tokenizer.reference, tokenizer.special_ids, tokenizer.name
    if tokenizer.vocab_size > vocab_size:
        problem = f"has {tokenizer.vocab_size:,} ids, but the model has vocab_size={vocab_size:,}"
        raise ValueError(f"tokenizer {name!r} {problem}: give the one of its training")
    if reference.library == "sentencepiece":
        raise ValueError(f"tokenizer {name!r} has no tokenizer.json: convert it with transformers")
    if reference.library == "tiktoken":
        values = json.loads(ranks_as_json(reference.content(), reference.rule, special_ids))
        split = values["pre_tokenizer"] | {"behavior": "Isolated", "invert": False}
        values["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, _BYTE_LEVEL]}
        values["added_tokens"] = [each | _FLAGS for each in values["added_tokens"]]
        values["model"]["vocab"] |= special_ids  # otherwise tokenizers gives them the next free ids
        values["decoder"] = _BYTE_LEVEL
    else:
        values = json.loads(reference.content())
        if tokenizer.left_out:  # it would add them to each text, and training did not
            values["post_processor"] = None
    text, probe = json.dumps(values, ensure_ascii=False), PROBE + " ".join(special_ids)
    engines = (HuggingFaceReference(text), reference)
    ours, theirs = (engine.encode(probe, frozenset(special_ids)).tolist() for engine in engines)
    if ours != theirs:
        raise ValueError(f"tokenizer {name!r} cannot be a tokenizer.json: give no tokenizer")
    end = tokenizer._end
    both = {"eos": end, "bos": tokenizer.begin if tokenizer.bos else end}  # one token in GPT-2
    named = {name: token for name, token in both.items() if token}
    config = {f"{name}_token": token for name, token in named.items()} | {"model_max_length": length}
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    files = {"tokenizer.json": text.encode(), "tokenizer_config.json": as_json(config)}
    return files, {f"{name}_token_id": special_ids[token] for name, token in named.items()}
