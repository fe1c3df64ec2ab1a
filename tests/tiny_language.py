"""A tiny Llama, a tokenizer of whole words and a few lines of text: what trainers of language models need."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = (
    "a",
    "the",
    "cat",
    "dog",
    "bird",
    "sits",
    "runs",
    "sleeps",
    "on",
    "under",
    "near",
    "mat",
    "tree",
    "old",
    "red",
)


def llama(seed: int = 0, **changes: object) -> LlamaForCausalLM:
    """A Llama of 8,000 parameters."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, max_position_embeddings=64, **{**sizes, **changes}))


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word; a beginning and an end are put around a text."""
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def sentences(count: int = 16, seed: int = 0) -> list[str]:
    """Sentences of those words, 4 to 9 long."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 10, (count,), generator=g).tolist()
    return [" ".join(WORDS[i] for i in torch.randint(len(WORDS), (n,), generator=g)) for n in lengths]


def language_base(folder: Path) -> Path:
    """The Llama and its tokenizer as a folder that `from_pretrained` opens."""
    llama().save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder
