"""Architectures and heads of transformers, each with a tiny random model, rows and a collator."""

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

Row = dict[str, Any]

VOCABULARY, PAD, LAST = 60, 0, 2
IMAGE_TOKEN = VOCABULARY
NUM_ROWS = 16
PIXELS, PATCH = 16, 8

FILL = {"input_ids": PAD, "labels": -100}
"""What pads a column; everything else is padded with zeros."""


# Rows


def token_rows(*, seed: int = 0, low: int = 3, high: int = 30) -> list[Row]:
    """Rows of tokens of uneven lengths, which end with the token that some classifiers look for."""
    generator = random.Random(seed)  # noqa: S311
    lengths = [generator.randint(low, high) for _ in range(NUM_ROWS)]
    rows = [[generator.randrange(5, VOCABULARY) for _ in range(length - 1)] + [LAST] for length in lengths]
    return [{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows]


def labelled(label: Callable[[int, Row], Any], rows: Iterable[Row] | None = None) -> list[Row]:
    """Rows with labels made from index and row."""
    return [{**row, "labels": label(index, row)} for index, row in enumerate(rows or token_rows())]


def class_rows() -> list[Row]:
    """A class a row."""
    return labelled(lambda index, _: index % 3)


def target_rows() -> list[Row]:
    """A number a row."""
    return labelled(lambda index, _: index / 8)


def multi_label_rows() -> list[Row]:
    """Three yes or no a row."""
    return labelled(lambda index, _: [float(index >> bit & 1) for bit in range(3)])


def token_class_rows() -> list[Row]:
    """A class a token."""
    return labelled(lambda _, row: [token % 3 for token in row["input_ids"]])


def causal_rows() -> list[Row]:
    """The next token, but for prompts of uneven lengths."""
    return labelled(lambda index, row: [-100] * (index % 3) + row["input_ids"][index % 3 :])


def masked_rows() -> list[Row]:
    """Every fourth token."""
    return labelled(
        lambda index, row: [t if (index + place) % 4 == 0 else -100 for place, t in enumerate(row["input_ids"])]
    )


def pretraining_rows() -> list[Row]:
    """Masked tokens, and whether a sentence follows."""
    return [{**row, "next_sentence_label": index % 2} for index, row in enumerate(masked_rows())]


def order_rows() -> list[Row]:
    """Masked tokens, and whether sentences are in their order."""
    return [{**row, "sentence_order_label": index % 2} for index, row in enumerate(masked_rows())]


def replaced_rows() -> list[Row]:
    """Whether each token was replaced."""
    return labelled(lambda _, row: [token % 2 for token in row["input_ids"]])


def answer_rows() -> list[Row]:
    """Where an answer begins and ends."""
    return [
        {**r, "start_positions": i % 3, "end_positions": len(r["input_ids"]) - 1} for i, r in enumerate(token_rows())
    ]


def choice_rows() -> list[Row]:
    """Two texts a row, one of which is right."""
    pairs = zip(token_rows(), token_rows(seed=3), strict=True)
    return [{"input_ids": [a["input_ids"], b["input_ids"]], "labels": i % 2} for i, (a, b) in enumerate(pairs)]


def translation_rows() -> list[Row]:
    """Sources and targets of uneven lengths."""
    targets = token_rows(seed=7, low=2, high=12)
    return labelled(lambda index, _: targets[index]["input_ids"])


def noise(*shape: int, seed: int) -> torch.Tensor:
    """Random numbers."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def image_rows() -> list[Row]:
    """Images and their classes."""
    return [{"pixel_values": noise(3, PIXELS, PIXELS, seed=i), "labels": i % 3} for i in range(NUM_ROWS)]


def patch_rows() -> list[Row]:
    """Images of which some patches are hidden, to be painted."""
    hidden = torch.tensor([True, False, False, True])
    return [{"pixel_values": row["pixel_values"], "bool_masked_pos": hidden} for row in image_rows()]


def segment_rows() -> list[Row]:
    """Images and the class of each pixel, some of which do not count."""
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randint(0, 3, (PIXELS, PIXELS), generator=generator) for _ in range(NUM_ROWS)]
    for index, segments in enumerate(maps):
        segments[: index % 8] = 255
    return [{**row, "labels": segments} for row, segments in zip(image_rows(), maps, strict=True)]


def wave_rows() -> list[Row]:
    """Sounds of uneven lengths and their classes."""
    return [
        {"input_values": noise(10 * len(row["input_ids"]), seed=index), "labels": index % 3}
        for index, row in enumerate(token_rows())
    ]


def speech_rows() -> list[Row]:
    """Sounds of uneven lengths and what is said in them."""
    return [
        {"input_values": noise(400 + 40 * index, seed=index), "labels": [3, 4, 5][: 1 + index % 3]}
        for index in range(NUM_ROWS)
    ]


def spoken_rows(mels: int = 4, frames: int = 20) -> list[Row]:
    """Spectra of one length, and transcripts of uneven lengths."""
    targets = token_rows(seed=7, low=2, high=12)
    return [{"input_features": noise(mels, frames, seed=i), "labels": t["input_ids"]} for i, t in enumerate(targets)]


def captioned_rows() -> list[Row]:
    """An image a row and a text that goes with it."""
    rows = zip(token_rows(), image_rows(), strict=True)
    return [{**text, "pixel_values": image["pixel_values"]} for text, image in rows]


def masked_caption_rows() -> list[Row]:
    """An image a row and a text with masked tokens."""
    return [
        {**text, "pixel_values": image["pixel_values"]} for text, image in zip(masked_rows(), image_rows(), strict=True)
    ]


def seen_rows() -> list[Row]:
    """An image a row, whose four tokens stand before the text."""
    rows = []
    for row in captioned_rows():
        tokens = [IMAGE_TOKEN] * 4 + row["input_ids"]
        labels = [-100] * 4 + row["input_ids"]
        rows.append({**row, "input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": labels})
    return rows


# Collators


class Pad:
    """Pads lists and sounds, and stacks everything else."""

    def __init__(self, *, side: str = "right", fill: dict[str, int] | None = None, **constants: Any) -> None:
        self.side, self.fill, self.constants = side, FILL | (fill or {}), constants

    def __call__(self, rows: list[Row]) -> dict[str, Any]:
        """Rows as one batch."""
        return {key: self._column(key, [row[key] for row in rows]) for key in rows[0]} | self.constants

    def _column(self, key: str, values: list[Any]) -> torch.Tensor:
        tensors = [torch.as_tensor(value) for value in values]
        if len({tensor.shape for tensor in tensors}) == 1 and not isinstance(values[0], list):
            stacked = torch.stack(tensors)
            return stacked.double() if stacked.is_floating_point() else stacked
        padded = torch.nn.utils.rnn.pad_sequence(
            tensors, batch_first=True, padding_value=self.fill.get(key, 0), padding_side=self.side
        )
        return padded.double() if padded.is_floating_point() else padded


def pad_waves(rows: list[Row]) -> dict[str, Any]:
    """Sounds with a mask of their samples."""
    return Pad()([{**row, "attention_mask": [1] * len(row["input_values"])} for row in rows])


def pad_choices(rows: list[Row]) -> dict[str, Any]:
    """Two texts a row, `[rows, 2, width]`."""
    flat = [{"input_ids": text, "attention_mask": [1] * len(text)} for row in rows for text in row["input_ids"]]
    padded = {key: value.view(len(rows), 2, -1) for key, value in Pad()(flat).items()}
    return {**padded, "labels": torch.tensor([row["labels"] for row in rows])}


def without_masks(rows: list[Row]) -> dict[str, Any]:
    """For models that take none."""
    return {key: value for key, value in Pad()(rows).items() if key != "attention_mask"}


def from_first_token(inputs: dict[str, Any]) -> dict[str, Any]:
    """Rows padded on the left as they are without padding: the first token has no label, and stands at 0."""
    mask = inputs["attention_mask"]
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    labels = inputs["labels"].masked_fill((positions == 0) & (mask == 1), -100)
    return {**inputs, "labels": labels, "position_ids": positions}


# Architectures


@dataclass(frozen=True, kw_only=True)
class Case:
    """An architecture with a head, and rows for it."""

    architecture: str
    head: str
    model: str
    config: str
    rows: Callable[[], list[Row]]
    options: dict[str, Any] = field(default_factory=dict)
    collate: Callable[[list[Row]], dict[str, Any]] = field(default_factory=Pad)
    max_tokens: int = 64
    reference: Callable[[dict[str, Any]], dict[str, Any]] = dict
    """What the whole batch is, if it is not what the collator returns."""

    @property
    def name(self) -> str:
        """Architecture and head."""
        return f"{self.architecture}, {self.head}"

    def build(self) -> Any:
        """A random model in float64, without dropout and other noise."""
        transformers.set_seed(0)
        config = getattr(transformers, self.config)(**self.options)
        for part in _parts(config):
            _take_out_noise(part)
        return getattr(transformers, self.model)(config).double()


def _parts(config: Any) -> list[Any]:
    inner = [value for value in vars(config).values() if isinstance(value, transformers.PreTrainedConfig)]
    return [config, *(part for value in inner for part in _parts(value))]


def _take_out_noise(config: Any) -> None:
    for name, value in vars(config).items():
        if isinstance(value, float) and any(part in name for part in ("drop", "jitter", "mask_time_prob")):
            setattr(config, name, 0.0)
    if hasattr(config, "apply_spec_augment"):
        config.apply_spec_augment = False


LAYERS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
SPECIAL = {"pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": LAST}
TEXT = {**LAYERS, **SPECIAL, "vocab_size": VOCABULARY, "max_position_embeddings": 64}
DECODER = {**TEXT, "num_key_value_heads": 2}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": VOCABULARY, **SPECIAL}
CLASSES = {"num_labels": 3}
EXPERTS = {"experts_implementation": "eager"}  # torch's grouped product does not know float64
BART = {
    **SPECIAL,
    **{"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32},
    **{"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 64},
    **{"vocab_size": VOCABULARY, "decoder_start_token_id": LAST, "forced_eos_token_id": None},
}
T5 = {
    **{"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": VOCABULARY},
    **{"decoder_start_token_id": PAD, "pad_token_id": PAD, "eos_token_id": LAST},
}
SWITCH = {"num_experts": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "num_decoder_layers": 2}
IMAGE = {**LAYERS, "image_size": PIXELS, "patch_size": PATCH}
SOUND = {
    **LAYERS,
    **{"conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_conv_pos_embeddings": 2},
    **{"num_conv_pos_embedding_groups": 2, "num_feat_extract_layers": 2, "classifier_proj_size": 8},
    **{"do_stable_layer_norm": True, "vocab_size": 10, "pad_token_id": PAD},
}
WHISPER = {**BART, "num_mel_bins": 4, "max_source_positions": 10, "max_target_positions": 32}
CLIP_TEXT = {**TEXT, "projection_dim": 16}


SMALL_BERT = {**TEXT, "embedding_size": 16}
DISTIL = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "vocab_size": VOCABULARY, **CLASSES}
XLNET = {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32, "vocab_size": VOCABULARY, **SPECIAL, **CLASSES}
BLOOM = {**SPECIAL, "hidden_size": 16, "n_layer": 2, "n_head": 2, "vocab_size": VOCABULARY}
MAMBA = {**SPECIAL, "hidden_size": 16, "num_hidden_layers": 2, "vocab_size": VOCABULARY}
MIXTRAL = {**DECODER, **EXPERTS, "num_local_experts": 4}
BALANCED = {**MIXTRAL, "output_router_logits": True, "router_aux_loss_coef": 1.0}
QWEN2_MOE = {
    **{**DECODER, **EXPERTS, "num_experts": 4, "num_experts_per_tok": 2},
    **{"moe_intermediate_size": 8, "shared_expert_intermediate_size": 16},
}
SWIN = {
    **{"image_size": PIXELS, "patch_size": 4, "embed_dim": 8, "window_size": 2},
    **{"depths": [1, 1], "num_heads": [2, 2], **CLASSES},
}
CONVNEXT = {"patch_size": 4, "hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, **CLASSES}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic", **CLASSES}
SEGFORMER = {
    **{"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [8, 16], "mlp_ratios": [2, 2]},
    **{"patch_sizes": [3, 3], "strides": [2, 2], "num_attention_heads": [1, 2], "decoder_hidden_size": 8, **CLASSES},
}
WAV2VEC2 = {**SOUND, **CLASSES, "feat_extract_norm": "layer"}
GROUP_NORM = {**SOUND, **CLASSES, "feat_extract_norm": "group", "do_stable_layer_norm": False}
CLIP = {"text_config": CLIP_TEXT, "vision_config": {**IMAGE, "projection_dim": 16}, "projection_dim": 16}
VILT = {**TEXT, "image_size": PIXELS, "patch_size": PATCH, "max_image_length": -1}
LLAVA = {
    "vision_config": transformers.CLIPVisionConfig(**IMAGE, projection_dim=16),
    "text_config": transformers.LlamaConfig(**{**DECODER, "vocab_size": VOCABULARY + 1}),
    **{"image_token_id": IMAGE_TOKEN, "image_seq_length": 4},
}


def _text(architecture: str, head: str, model: str, rows: Callable[[], list[Row]], **more: Any) -> Case:
    options = more.pop("options", {**TEXT, **CLASSES})
    config = more.pop("config", model.split("For")[0].removesuffix("LMHeadModel") + "Config")
    return Case(architecture=architecture, head=head, model=model, config=config, rows=rows, options=options, **more)


def _causal(architecture: str, model: str, **more: Any) -> Case:
    return _text(architecture, "causal LM", model, causal_rows, **{"options": DECODER, **more})


CASES = [
    _text("BERT", "sequence classification", "BertForSequenceClassification", class_rows),
    _text("BERT", "regression", "BertForSequenceClassification", target_rows, options={**TEXT, "num_labels": 1}),
    _text(
        "BERT",
        "multi-label classification",
        "BertForSequenceClassification",
        multi_label_rows,
        options={**TEXT, **CLASSES, "problem_type": "multi_label_classification"},
    ),
    _text("BERT", "token classification", "BertForTokenClassification", token_class_rows),
    _text("BERT", "question answering", "BertForQuestionAnswering", answer_rows, options=TEXT),
    _text("BERT", "multiple choice", "BertForMultipleChoice", choice_rows, options=TEXT, collate=pad_choices),
    _text("BERT", "masked LM", "BertForMaskedLM", masked_rows),
    _text("BERT", "pretraining", "BertForPreTraining", pretraining_rows, options=TEXT),
    _text(
        "BERT",
        "sequence classification, padded left",
        "BertForSequenceClassification",
        class_rows,
        collate=Pad(side="left"),
    ),
    _text("RoBERTa", "sequence classification", "RobertaForSequenceClassification", class_rows),
    _text("DistilBERT", "token classification", "DistilBertForTokenClassification", token_class_rows, options=DISTIL),
    _text("ALBERT", "masked LM", "AlbertForMaskedLM", masked_rows, options=SMALL_BERT),
    _text("ALBERT", "pretraining", "AlbertForPreTraining", order_rows, options=SMALL_BERT),
    _text("DeBERTa-v2", "sequence classification", "DebertaV2ForSequenceClassification", class_rows),
    _text("MPNet", "multiple choice", "MPNetForMultipleChoice", choice_rows, options=TEXT, collate=pad_choices),
    _text(
        "ELECTRA",
        "pretraining",
        "ElectraForPreTraining",
        replaced_rows,
        options=SMALL_BERT,
        collate=Pad(fill={"labels": 0}),
    ),
    _text("ModernBERT", "masked LM", "ModernBertForMaskedLM", masked_rows),
    _text("FNet", "sequence classification", "FNetForSequenceClassification", class_rows, collate=without_masks),
    _text(
        "XLNet",
        "sequence classification",
        "XLNetForSequenceClassification",
        class_rows,
        options=XLNET,
        collate=Pad(side="left"),
    ),
    _text("GPT-2", "causal LM", "GPT2LMHeadModel", causal_rows, options=GPT2),
    _text(
        "GPT-2",
        "causal LM, padded left",
        "GPT2LMHeadModel",
        causal_rows,
        options=GPT2,
        collate=Pad(side="left"),
        reference=from_first_token,
    ),
    _text("GPT-2", "sequence classification", "GPT2ForSequenceClassification", class_rows, options={**GPT2, **CLASSES}),
    _causal("Llama", "LlamaForCausalLM"),
    _text(
        "Llama",
        "token classification",
        "LlamaForTokenClassification",
        token_class_rows,
        options={**DECODER, **CLASSES, "classifier_dropout": 0.0},
    ),
    _causal("Mistral", "MistralForCausalLM"),
    _causal("Qwen2", "Qwen2ForCausalLM"),
    _causal("Gemma 2", "Gemma2ForCausalLM", options={**DECODER, "head_dim": 8}),
    _causal("Phi", "PhiForCausalLM"),
    _causal("OPT", "OPTForCausalLM", options={**TEXT, "ffn_dim": 32, "word_embed_proj_dim": 16}),
    _causal("BLOOM", "BloomForCausalLM", options=BLOOM),
    _causal("GPT-NeoX", "GPTNeoXForCausalLM", options=TEXT),
    _causal("Mamba", "MambaForCausalLM", options=MAMBA),
    _text("BART", "seq2seq LM", "BartForConditionalGeneration", translation_rows, options=BART),
    _text("BART", "sequence classification", "BartForSequenceClassification", class_rows, options={**BART, **CLASSES}),
    _text("Pegasus", "seq2seq LM", "PegasusForConditionalGeneration", translation_rows, options=BART),
    _text("T5", "seq2seq LM", "T5ForConditionalGeneration", translation_rows, options=T5),
    _causal("Mixtral", "MixtralForCausalLM", options=MIXTRAL),
    _text("Mixtral", "causal LM, output_router_logits", "MixtralForCausalLM", causal_rows, options=BALANCED),
    _causal("Qwen2-MoE", "Qwen2MoeForCausalLM", options=QWEN2_MOE),
    _text(
        "Switch Transformers",
        "seq2seq LM",
        "SwitchTransformersForConditionalGeneration",
        translation_rows,
        options={**T5, **SWITCH},
    ),
    _text(
        "ViT",
        "image classification",
        "ViTForImageClassification",
        image_rows,
        options={**IMAGE, **CLASSES},
        max_tokens=5,
    ),
    _text(
        "ViT",
        "masked image modelling",
        "ViTForMaskedImageModeling",
        patch_rows,
        options={**IMAGE, "encoder_stride": PATCH},
        max_tokens=5,
    ),
    _text(
        "DINOv2",
        "image classification",
        "Dinov2ForImageClassification",
        image_rows,
        options={**IMAGE, **CLASSES},
        max_tokens=5,
    ),
    _text("Swin", "image classification", "SwinForImageClassification", image_rows, options=SWIN, max_tokens=5),
    _text(
        "ConvNeXt", "image classification", "ConvNextForImageClassification", image_rows, options=CONVNEXT, max_tokens=5
    ),
    _text("ResNet", "image classification", "ResNetForImageClassification", image_rows, options=RESNET, max_tokens=5),
    _text(
        "SegFormer",
        "semantic segmentation",
        "SegformerForSemanticSegmentation",
        segment_rows,
        options=SEGFORMER,
        max_tokens=5,
    ),
    _text(
        "Wav2Vec2",
        "audio classification",
        "Wav2Vec2ForSequenceClassification",
        wave_rows,
        options=WAV2VEC2,
        collate=pad_waves,
        max_tokens=640,
    ),
    _text(
        "Wav2Vec2",
        "audio classification, group norm",
        "Wav2Vec2ForSequenceClassification",
        wave_rows,
        options=GROUP_NORM,
        collate=pad_waves,
        max_tokens=640,
    ),
    _text(
        "Wav2Vec2",
        "CTC",
        "Wav2Vec2ForCTC",
        speech_rows,
        options={**SOUND, "feat_extract_norm": "layer"},
        collate=pad_waves,
        max_tokens=3000,
    ),
    _text(
        "HuBERT",
        "audio classification",
        "HubertForSequenceClassification",
        wave_rows,
        options=WAV2VEC2,
        collate=pad_waves,
        max_tokens=640,
    ),
    _text("Whisper", "speech to text", "WhisperForConditionalGeneration", spoken_rows, options=WHISPER, max_tokens=80),
    _text(
        "CLIP",
        "contrastive",
        "CLIPModel",
        captioned_rows,
        config="CLIPConfig",
        options=CLIP,
        collate=Pad(return_loss=True),
    ),
    _text("LLaVA", "causal LM with images", "LlavaForConditionalGeneration", seen_rows, options=LLAVA),
    _text(
        "ViLT",
        "masked LM with images",
        "ViltForMaskedLM",
        lambda: [
            {**row, "pixel_values": image["pixel_values"]}
            for row, image in zip(masked_rows(), image_rows(), strict=True)
        ],
        options=VILT,
    ),
]
