"""Families of models train with the gradient of the whole batch: text, images, sounds, both, experts and adapters."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertForSequenceClassification,
    CLIPVisionConfig,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    ModernBertConfig,
    ModernBertForTokenClassification,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2BertConfig,
    Wav2Vec2BertForSequenceClassification,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from hf_mbp import MBPConfig, MBPTrainer, check_equivalence
from hf_mbp.collate import count_cells
from tests.helpers import (
    BERT,
    NO_DROPOUT,
    PAD,
    VOCABULARY,
    Pad,
    Recorder,
    bert_config,
    build,
    llama_config,
    masked_prefix,
    mbp_trainer,
    relative_error,
    t5_config,
    token_rows,
    whole_gradients,
    with_labels,
)

pytestmark = [
    # Of Python 3.12 and of the data loader, where there are fewer cores than workers.
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
]

IN_FLOAT64 = 1e-12
PARTS_IN_FLOAT32 = 1e-6
"""Norms, positions or logits that a model computes in float32 whatever its weights are."""

LAYERS = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {**LAYERS, "num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 64}
SPECIAL = {"pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2}
EAGER_EXPERTS = {"experts_implementation": "eager"}  # the grouped product does not know float64

IMAGE_TOKEN, VIDEO_TOKEN, VISION_START = VOCABULARY, VOCABULARY + 1, VOCABULARY + 2
PIXELS, PATCH = 8, 4
FRAMES, MELS = 20, 4
FEATURES = 16


# Rows


def class_rows() -> list[dict[str, Any]]:
    return with_labels(token_rows(), lambda index, row: index % 3)


def token_class_rows() -> list[dict[str, Any]]:
    return with_labels(token_rows(), lambda index, row: [token % 4 for token in row["input_ids"]])


def causal_rows() -> list[dict[str, Any]]:
    return with_labels(token_rows(), masked_prefix)


def seq2seq_rows() -> list[dict[str, Any]]:
    targets = token_rows(seed=7, low=2, high=12)
    return with_labels(token_rows(), lambda index, row: targets[index]["input_ids"])


def noise(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def image_rows() -> list[dict[str, Any]]:
    return [{"pixel_values": noise(3, PIXELS, PIXELS, seed=index), "labels": index % 3} for index in range(16)]


def spoken_rows() -> list[dict[str, Any]]:
    """Log-mel features, all of one length as Whisper has them, and transcripts of uneven lengths."""
    targets = token_rows(seed=7, low=2, high=12)
    return [
        {"input_features": noise(MELS, FRAMES, seed=index), "labels": target["input_ids"]}
        for index, target in enumerate(targets)
    ]


def wave_rows() -> list[dict[str, Any]]:
    """Samples of sounds of uneven lengths, and their classes."""
    return [
        {"input_values": noise(10 * len(row["input_ids"]), seed=index), "labels": index % 3}
        for index, row in enumerate(token_rows())
    ]


def pad_waves(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    waves = [row["input_values"] for row in rows]
    return {
        "input_values": torch.nn.utils.rnn.pad_sequence(waves, batch_first=True),
        "attention_mask": torch.nn.utils.rnn.pad_sequence(
            [torch.ones(len(wave), dtype=torch.long) for wave in waves], batch_first=True
        ),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }


def spectrum_rows() -> list[dict[str, Any]]:
    """Features of sounds of uneven lengths, `[frames, features]`, and their classes."""
    return [
        {"input_features": noise(len(row["input_ids"]), FEATURES, seed=index), "labels": index % 3}
        for index, row in enumerate(token_rows())
    ]


def pad_spectra(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    padded = pad_waves([{**row, "input_values": row["input_features"]} for row in rows])
    return {"input_features": padded.pop("input_values"), **padded}


def seen_rows() -> list[dict[str, Any]]:
    """An image a row, whose 4 tokens stand between the text; image tokens and what is before them are no targets."""
    rows = []
    for index, row in enumerate(token_rows(low=2, high=20)):
        prompt, text = row["input_ids"][:1], row["input_ids"][1:]
        token_ids = [*prompt, *[IMAGE_TOKEN] * 4, *text]
        rows.append(
            {
                "input_ids": token_ids,
                "attention_mask": [1] * len(token_ids),
                "labels": [-100] * 5 + text,
                "pixel_values": noise(3, PIXELS, PIXELS, seed=index),
            }
        )
    return rows


def packed_rows() -> list[dict[str, Any]]:
    """An image a row, of uneven sizes, as patches; a token stands for 2 x 2 of them."""
    rows = []
    for index, row in enumerate(token_rows(low=2, high=16)):
        text, columns = row["input_ids"], 1 + index % 3
        seen = [VISION_START, *[IMAGE_TOKEN] * 2 * columns]
        rows.append(
            {
                "input_ids": seen + text,
                "attention_mask": [1] * len(seen + text),
                "mm_token_type_ids": [int(token == IMAGE_TOKEN) for token in seen + text],
                "labels": [-100] * len(seen) + text,
                "pixel_values": noise(4 * 2 * columns, 3 * 2 * PATCH**2, seed=index),
                "image_grid_thw": torch.tensor([[1, 4, 2 * columns]]),
            }
        )
    return rows


class PadAndPack(Pad):
    """Tokens are padded; the patches of all images are laid end to end, with a row of `image_grid_thw` for each."""

    def column(self, key: str, values: list[Any]) -> torch.Tensor:
        return torch.cat(values) if key in ("pixel_values", "image_grid_thw") else super().column(key, values)


# Models


def deberta() -> Any:
    relative = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}
    config = DebertaV2Config(
        **BERT, **NO_DROPOUT, **relative, vocab_size=VOCABULARY, num_labels=3, pooler_hidden_size=16, pooler_dropout=0.0
    )
    return build(DebertaV2ForSequenceClassification, config)


def modernbert() -> Any:
    windows = {"local_attention": 8, "global_attn_every_n_layers": 2}
    config = ModernBertConfig(
        **LAYERS, **SPECIAL, **windows, vocab_size=VOCABULARY, cls_token_id=1, sep_token_id=2, num_labels=4
    )
    return build(ModernBertForTokenClassification, config)


def gemma(model_class: Any, config_class: Any) -> Any:
    # A window shorter than the padding leaves positions with nothing to see, which in float64 is no number in Gemma 2.
    changes = {"head_dim": 8, "sliding_window": 64, "query_pre_attn_scalar": 8}
    return build(model_class, config_class(**TEXT, **SPECIAL, **changes))


def bart() -> Any:
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 64}
    dropout = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
    config = BartConfig(**sizes, **heads, **dropout, **SPECIAL, vocab_size=VOCABULARY, decoder_start_token_id=2)
    return build(BartForConditionalGeneration, config)


def vit() -> Any:
    config = ViTConfig(**LAYERS, **NO_DROPOUT, image_size=PIXELS, patch_size=PATCH, num_labels=3)
    return build(ViTForImageClassification, config)


def whisper() -> Any:
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_mel_bins": MELS}
    widths = {"max_source_positions": FRAMES // 2, "max_target_positions": 20, "vocab_size": VOCABULARY}
    config = WhisperConfig(**sizes, **heads, **widths, **SPECIAL, dropout=0.0, decoder_start_token_id=1)
    return build(WhisperForConditionalGeneration, config)


def wav2vec2(feat_extract_norm: str = "layer") -> Any:
    convolutions = {"conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_conv_pos_embeddings": 2}
    quiet = {"layerdrop": 0.0, "hidden_dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
    more = {"feat_proj_dropout": 0.0, "final_dropout": 0.0, "mask_time_prob": 0.0, "apply_spec_augment": False}
    config = Wav2Vec2Config(
        **BERT,
        **convolutions,
        **quiet,
        **more,
        num_conv_pos_embedding_groups=2,
        num_feat_extract_layers=2,
        feat_extract_norm=feat_extract_norm,
        do_stable_layer_norm=feat_extract_norm == "layer",
        classifier_proj_size=8,
        num_labels=3,
    )
    return build(Wav2Vec2ForSequenceClassification, config)


def wav2vec2_bert() -> Any:
    dropouts = ("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout", "final_dropout")
    quiet = {**dict.fromkeys(dropouts, 0.0), "layerdrop": 0.0, "conformer_conv_dropout": 0.0}
    sizes = {"feature_projection_input_dim": FEATURES, "classifier_proj_size": 8, "conv_depthwise_kernel_size": 3}
    config = Wav2Vec2BertConfig(**LAYERS, **quiet, **sizes, apply_spec_augment=False, num_labels=3)
    return build(Wav2Vec2BertForSequenceClassification, config)


def llava() -> Any:
    vision = CLIPVisionConfig(**LAYERS, image_size=PIXELS, patch_size=PATCH, projection_dim=16)
    text = llama_config(vocab_size=VOCABULARY + 4)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN, image_seq_length=4)
    return build(LlavaForConditionalGeneration, config)


def qwen_vl(model_class: Any, config_class: Any, **vision: Any) -> Any:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    text = {**TEXT, **SPECIAL, "vocab_size": VOCABULARY + 4, "rope_parameters": rope}
    patches = {"patch_size": PATCH, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_heads": 2, "depth": 2}
    config = config_class(
        vision_config={**patches, "hidden_size": 16, **vision},
        text_config=text,
        image_token_id=IMAGE_TOKEN,
        video_token_id=VIDEO_TOKEN,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_START + 1,
    )
    return build(model_class, config)


def qwen2_vl() -> Any:
    return qwen_vl(Qwen2VLForConditionalGeneration, Qwen2VLConfig, embed_dim=16, mlp_ratio=2)


def qwen2_5_vl() -> Any:
    sizes = {"intermediate_size": 32, "out_hidden_size": 16, "window_size": 16, "fullatt_block_indexes": [1]}
    return qwen_vl(Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig, **sizes)


def mixtral() -> Any:
    config = MixtralConfig(**TEXT, **SPECIAL, **EAGER_EXPERTS, num_local_experts=4, sliding_window=None)
    return build(MixtralForCausalLM, config)


def qwen2_moe(**changes: Any) -> Any:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    shared = {"shared_expert_intermediate_size": 16}
    return build(
        Qwen2MoeForCausalLM, Qwen2MoeConfig(**TEXT, **SPECIAL, **EAGER_EXPERTS, **experts, **shared, **changes)
    )


def lora() -> Any:
    adapted = get_peft_model(
        build(LlamaForCausalLM, llama_config()),
        LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False),
    )
    return adapted.double()


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, its rows and their collator, and how many tokens a micro-batch may have."""

    model: Callable[[], Any]
    rows: Callable[[], list[dict[str, Any]]]
    collate: Any = field(default_factory=Pad)
    max_tokens: int = 64
    bound: float = IN_FLOAT64


def causal(model: Callable[[], Any], **changes: Any) -> Case:
    return Case(model=model, rows=causal_rows, bound=PARTS_IN_FLOAT32, **changes)


CASES = {
    "bert": Case(model=lambda: build(BertForSequenceClassification, bert_config(num_labels=3)), rows=class_rows),
    "deberta": Case(model=deberta, rows=class_rows, bound=PARTS_IN_FLOAT32),
    "modernbert": Case(model=modernbert, rows=token_class_rows, bound=PARTS_IN_FLOAT32),
    "qwen2": causal(lambda: build(Qwen2ForCausalLM, Qwen2Config(**TEXT, **SPECIAL))),
    "gemma2": causal(lambda: gemma(Gemma2ForCausalLM, Gemma2Config)),
    "gemma3": causal(lambda: gemma(Gemma3ForCausalLM, Gemma3TextConfig)),
    "gpt_neox": causal(
        lambda: build(
            GPTNeoXForCausalLM,
            GPTNeoXConfig(**LAYERS, **SPECIAL, vocab_size=VOCABULARY, max_position_embeddings=64),
        )
    ),
    "bart": Case(model=bart, rows=seq2seq_rows),
    "t5": Case(model=lambda: build(T5ForConditionalGeneration, t5_config()), rows=seq2seq_rows),
    "vit": Case(model=vit, rows=image_rows, max_tokens=5),
    "whisper": Case(model=whisper, rows=spoken_rows, max_tokens=4 * FRAMES),
    "wav2vec2": Case(model=wav2vec2, rows=wave_rows, collate=pad_waves, max_tokens=640),
    "wav2vec2_bert": Case(model=wav2vec2_bert, rows=spectrum_rows, collate=pad_spectra),
    "llava": Case(model=llava, rows=seen_rows, bound=PARTS_IN_FLOAT32),
    "mixtral": causal(mixtral),
    "qwen2_moe": causal(qwen2_moe),
    "lora": causal(lora),
}

PACKED = {"qwen2_vl": qwen2_vl, "qwen2_5_vl": qwen2_5_vl}


def packed(model: str, collate: Any = None) -> Case:
    return Case(model=PACKED[model], rows=packed_rows, collate=collate or PadAndPack(), bound=PARTS_IN_FLOAT32)


def trainer_of(case: Case, model: Any, folder: Path, **changes: Any) -> MBPTrainer:
    options = {"data_collator": case.collate, "max_tokens_per_micro_batch": case.max_tokens, "on_inexact": "error"}
    workers = 2 if changes.get("collate_in") == "workers" else 0
    return mbp_trainer(model, case.rows(), folder, **{**options, "dataloader_num_workers": workers, **changes})


def assert_equals_the_whole_batch(case: Case, folder: Path, **changes: Any) -> None:
    model, rows = case.model(), case.rows()
    whole_loss, expected = whole_gradients(model, lambda m: m(**case.collate(rows)).loss)
    recorder = Recorder()
    trainer = trainer_of(case, model, folder, callbacks=[recorder], **changes)
    trainer.train()
    logs = trainer.state.log_history[0]
    assert logs["mbp_micro_batches"] >= 3
    error = relative_error(expected, recorder.gradients[0])
    print(f"relative error {error:.1g}")  # shown by pytest -rP
    assert error < case.bound
    assert logs["loss"] == pytest.approx(whole_loss, rel=1e-6)


OF_PEFT = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.mark.parametrize("collate_in", ["main", "workers"])
@pytest.mark.parametrize("model", [pytest.param(name, marks=[OF_PEFT] if name == "lora" else []) for name in CASES])
def test_model_equals_the_whole_batch(model: str, collate_in: str, tmp_path: Path) -> None:
    assert_equals_the_whole_batch(CASES[model], tmp_path, collate_in=collate_in)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("model", PACKED)
def test_packed_patches_equal_the_whole_batch(model: str, side: str, tmp_path: Path) -> None:
    assert_equals_the_whole_batch(packed(model, PadAndPack(side=side)), tmp_path)


@pytest.mark.parametrize("collate_in", ["main", "workers"])
def test_images_in_left_padded_text(collate_in: str, tmp_path: Path) -> None:
    """As the processors of vision-language models pad."""
    case = Case(model=llava, rows=seen_rows, collate=Pad(side="left"), bound=PARTS_IN_FLOAT32)
    assert_equals_the_whole_batch(case, tmp_path, collate_in=collate_in)


def test_packed_patches_cannot_be_cut_into_rows(tmp_path: Path) -> None:
    case = packed("qwen2_vl")
    trainer = trainer_of(case, case.model(), tmp_path, collate_in="workers")
    message = r"'pixel_values' has 2\d\d entries for 16 rows\. Set collate_in='main'"
    with pytest.raises(ValueError, match=message):
        trainer.train()
    with pytest.raises(ValueError, match=r"'pixel_values' has .* Set collate_in='main'"):
        check_equivalence(trainer)


# Sounds


def recorded(model: Any) -> list[dict[str, Any]]:
    """Fills with the inputs of the calls that train; probing has no gradients."""
    calls: list[dict[str, Any]] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled():
            calls.append(kwargs)

    model.register_forward_pre_hook(note, with_kwargs=True)
    return calls


def with_masks(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """With the mask that the feature extractor returns on request; Whisper pads the features to one length anyway."""
    mask = torch.zeros(len(rows), FRAMES, dtype=torch.long)
    for index in range(len(rows)):
        mask[index, : 2 + index] = 1
    return {**Pad()(rows), "attention_mask": mask}


@pytest.mark.parametrize("collate", [Pad(), with_masks], ids=["features", "features and mask"])
@pytest.mark.parametrize("collate_in", ["main", "workers"])
def test_budget_counts_frames_and_target_tokens(collate_in: str, collate: Any, tmp_path: Path) -> None:
    case, model = CASES["whisper"], whisper()
    calls = recorded(model)
    trainer = trainer_of(case, model, tmp_path, collate_in=collate_in, data_collator=collate, check_at_start=False)
    rows = trainer.mbp_rows.sample(16)
    assert {trainer.row_length(row) for row in case.rows()} == {FRAMES}
    assert trainer.mbp_rows.sizes(rows).tolist() == [[FRAMES, len(row["labels"])] for row in case.rows()]
    trainer.train()
    cells = [len(call["labels"]) * (FRAMES + call["labels"].shape[1]) for call in calls]
    assert len(cells) >= 3
    assert max(cells) <= case.max_tokens
    assert [count_cells(call, with_targets=True) for call in calls] == cells
    assert trainer.state.log_history[0]["mbp_cells"] == sum(cells)
    assert all(call["input_features"].shape[-1] == FRAMES for call in calls)


@pytest.mark.parametrize("collate_in", ["main", "workers"])
def test_budget_counts_the_frames_of_the_mask(collate_in: str, tmp_path: Path) -> None:
    """Where frames come before mels, the mask tells the frames and the last dimension does not."""
    case, model = CASES["wav2vec2_bert"], wav2vec2_bert()
    calls = recorded(model)
    trainer_of(case, model, tmp_path, collate_in=collate_in, check_at_start=False).train()
    cells = [call["input_features"].shape[0] * call["input_features"].shape[1] for call in calls]
    assert len(cells) >= 3
    assert max(cells) <= case.max_tokens
    assert [count_cells(call, with_targets=False) for call in calls] == cells


@pytest.mark.parametrize("collate_in", ["main", "workers"])
def test_sounds_and_their_masks_are_as_wide_as_the_longest_of_them(collate_in: str, tmp_path: Path) -> None:
    case, model = CASES["wav2vec2"], wav2vec2()
    calls = recorded(model)
    metrics = trainer_of(case, model, tmp_path, collate_in=collate_in, check_at_start=False).train().metrics
    widths = [call["input_values"].shape[1] for call in calls]
    assert widths == [int(call["attention_mask"].sum(dim=1).max()) for call in calls]
    assert widths == [call["attention_mask"].shape[1] for call in calls]
    assert len(set(widths)) >= 3
    assert metrics["mbp_padding_fraction"] < metrics["mbp_padding_fraction_unsplit"]


def test_a_norm_over_time_that_mixes_padding_in_is_named(tmp_path: Path) -> None:
    """The group norm of wav2vec2 averages over all frames of a row, padding included."""
    report = check_equivalence(trainer_of(CASES["wav2vec2"], wav2vec2("group"), tmp_path))
    assert not report.is_exact
    assert "depends on how wide it is padded" in " ".join(report.findings)
    assert "pad all rows to one length" in " ".join(report.findings)


def without_masks(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """As wav2vec2 with a group norm is trained."""
    return {key: value for key, value in pad_waves(rows).items() if key != "attention_mask"}


def test_sounds_without_masks_keep_the_width_of_their_batch(tmp_path: Path) -> None:
    """So that the padding which the norm averages over is that of the unsplit batch."""
    case = Case(model=lambda: wav2vec2("group"), rows=wave_rows, collate=without_masks, max_tokens=640)
    assert not check_equivalence(trainer_of(case, case.model(), tmp_path)).is_exact
    assert_equals_the_whole_batch(case, tmp_path, collate_in="workers")


# Experts


@pytest.mark.parametrize("collate_in", ["main", "workers"])
def test_the_load_balancing_loss_is_named_as_not_additive(collate_in: str, tmp_path: Path) -> None:
    model = qwen2_moe(output_router_logits=True, router_aux_loss_coef=1.0)
    trainer = trainer_of(causal(qwen2_moe), model, tmp_path, collate_in=collate_in, on_inexact="warn")
    report = check_equivalence(trainer)
    assert not report.is_exact
    assert any("load-balancing loss" in finding and "not a mean" in finding for finding in report.findings)
    with pytest.warns(UserWarning, match=r"(?s)changes the gradient.*load-balancing loss of the experts"):
        trainer.train()


@OF_PEFT
def test_only_the_adapters_have_gradients(tmp_path: Path) -> None:
    model = lora()
    recorder = Recorder()
    trainer_of(CASES["lora"], model, tmp_path, callbacks=[recorder]).train()
    assert recorder.gradients[0].keys() == {name for name, _ in model.named_parameters() if "lora_" in name}


# Without a budget of one's own


@pytest.mark.parametrize("model", ["llava", "qwen2_vl", "whisper", "wav2vec2", "vit"])
def test_the_budget_is_sized_on_rows_that_cannot_be_cut(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = packed(model) if model in PACKED else CASES[model]
    trainer = trainer_of(case, case.model(), tmp_path)
    trainer.mbp_config = MBPConfig(memory_limit=0.5)
    trainer.train()
    assert "tokens each, sized for" in capsys.readouterr().out
