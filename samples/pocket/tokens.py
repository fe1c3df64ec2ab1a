"""The pocket tokenizer: a small byte-level BPE in CLIP's format."""

from __future__ import annotations

import json
from collections import Counter

from things import MARKS
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer
from world import COLOUR_NAMES, PLACE_NAMES, TEMPLATES, THING_NAMES

LENGTH = 32  # tokens of every prompt, start and end marks included
VOCABULARY = 1200  # tokens at most before the end-of-word bytes are added; the words below need fewer
BEGIN, END = "<|startoftext|>", "<|endoftext|>"
# Words of common DreamBooth prompts that the pocket world does not know: kept whole, to keep prompts short.
OTHER_WORDS = """\
top of fabric mountain blue house purple rug forest wheat field tree autumn leaves floating water ocean milk sunflowers
around it mirror sidewalk crowded street dirt road shiny wet cube shaped wearing red hat santa rainbow scarf
monocle chef outfit firefighter police pink glasses yellow shirt wizard stuffed animal bowl can toy cartoon plushie
boot sunglasses and is by my your his her their this that with without small big little large old new painting drawing
style image sky sea sun night day light dark green gold silver brown grey gray bottle cup book shoe bag bear bird man
woman person child table bed window door garden park river lake bridge castle island field flower flowers
"""


def train_tokenizer() -> CLIPTokenizer:
    """Learn the merges from the world's words and the words above."""
    raw = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=END))
    raw.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    raw.decoder = decoders.ByteLevel()
    sentences = [*TEMPLATES, *THING_NAMES, *PLACE_NAMES, *COLOUR_NAMES, *MARKS, "an on in with and"]
    words = Counter(" ".join(sentences).replace("{}", "").split() * 20 + OTHER_WORDS.split() * 5)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BEGIN, END],
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        min_frequency=5,
        show_progress=False,
    )
    raw.train_from_iterator([word for word, n in words.items() for _ in range(n)], trainer)
    return as_clip_tokenizer(raw)


def as_clip_tokenizer(raw: Tokenizer) -> CLIPTokenizer:
    """The same merges as a `CLIPTokenizer`, with every single byte also as the end of a word, as in CLIP."""
    model = json.loads(raw.to_str())["model"]
    pieces = [token for token in model["vocab"] if token not in (BEGIN, END)]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ordered = list(dict.fromkeys([*alphabet, *(byte + "</w>" for byte in alphabet), *pieces, BEGIN, END]))
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in model["merges"]]
    return CLIPTokenizer(
        vocab={token: k for k, token in enumerate(ordered)},
        merges=merges,
        unk_token=END,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=END,
        model_max_length=LENGTH,
    )
