"""The embedded text encoder: a word tokenizer over the caption grammar and a tiny `UMT5EncoderModel`."""

from __future__ import annotations

import re

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from vggrpo.world.captions import _TEMPLATES, CAMERA_PHRASES, COLOURS, MOTION_VERBS, ROOMS, SHAPES

TEXT_DIM = 96


def grammar_words() -> list[str]:
    """Every word and mark that a caption can hold, sorted."""
    phrases = [p for options in CAMERA_PHRASES.values() for p in options]
    text = " ".join([*phrases, *COLOURS, *SHAPES, *ROOMS, *MOTION_VERBS, *_TEMPLATES, "a an and the , ."]).lower()
    return sorted(set(re.findall(r"[a-z]+|[^\sa-z]", re.sub(r"\{\w+\}", " ", text))))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Lower-cased words; what the grammar does not know becomes `<unk>`, so any prompt in any language is accepted."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "</s>", "<unk>", *grammar_words()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
        padding_side="right",
    )


def build_text_encoder(vocabulary: int) -> UMT5EncoderModel:
    """Two layers, width TEXT_DIM; trained together with the generator."""
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=vocabulary,
            d_model=TEXT_DIM,
            d_kv=24,
            d_ff=192,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=1,
            is_encoder_decoder=False,
            use_cache=False,
            tie_word_embeddings=True,
        )
    )
