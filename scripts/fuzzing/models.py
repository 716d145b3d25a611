"""Tiny models to feed data to: configurations and tokenizers, without weights."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, LlamaConfig, PreTrainedTokenizerFast, T5Config

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<|start|>", "<|end|>")
_WORDS = tuple("abcdefghijklmnopqrstuvwxyz")
_SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
_CHAT = (
    "{% for m in messages %}{{ '<|start|> ' + m['role'] + ' ' + m['content'] + ' <|end|> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|> assistant ' }}{% endif %}"
)
LONGEST = 64


def make_models(folder: Path) -> None:
    """Writes the folders `encoder` (BERT), `decoder` (Llama with a chat template) and `both` (T5)."""
    size = len(_SPECIAL) + len(_WORDS)
    encoder = _tokenizer(pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]")
    encoder.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    encoder.save_pretrained(folder / "encoder")
    BertConfig(vocab_size=size, max_position_embeddings=LONGEST, **_SIZES).save_pretrained(folder / "encoder")
    decoder = _tokenizer(eos_token="<|end|>", pad_token="<|end|>")
    decoder.chat_template = _CHAT
    decoder.save_pretrained(folder / "decoder")
    LlamaConfig(vocab_size=size, max_position_embeddings=LONGEST, **_SIZES).save_pretrained(folder / "decoder")
    _tokenizer(pad_token="[PAD]", eos_token="<|end|>").save_pretrained(folder / "both")
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_heads": 2, "num_layers": 1}
    T5Config(vocab_size=size, **sizes, decoder_start_token_id=0, pad_token_id=0).save_pretrained(folder / "both")


def _tokenizer(**options: str) -> PreTrainedTokenizerFast:
    """One that knows letters, split at blanks."""
    vocabulary = {word: index for index, word in enumerate((*_SPECIAL, *_WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", model_max_length=LONGEST, **options)
