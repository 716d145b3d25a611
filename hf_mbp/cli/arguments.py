"""The options of `hf-mbp train` that neither TrainingArguments nor MBPConfig has."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

Dtype = Literal["float32", "bfloat16", "float16", "auto"]


@dataclass(kw_only=True)
class RunArguments:
    """What to do."""

    task: str = field(
        default="text_classification",
        metadata={
            "help": "what to train: embedding, image_classification, instruction_tuning, language_modeling,"
            " masked_language_modeling, preference_tuning, question_answering, sequence_to_sequence,"
            " text_classification, token_classification"
        },
    )
    eval_before_training: bool = field(
        default=True, metadata={"help": "evaluate the untrained model, too, so that the result can be compared"}
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "delete the earlier run (checkpoints, results) that output_dir holds, if it does not go on"},
    )
    dry_run: bool = field(
        default=False,
        metadata={"help": "stop before the first step: load all but the weights, show the plan, write nothing"},
    )
    debug_traceback: bool = field(
        default=False, metadata={"help": "show where an error came from, not only its message"}
    )


@dataclass(kw_only=True)
class ModelArguments:
    """Which model."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "a model on the Hub, a folder, or package://NAME/FOLDER for one inside an installed pip package"
        },
    )
    config_name: str | None = field(
        default=None,
        metadata={
            "help": "instead, to train a new model from random weights: a configuration on the Hub, or a folder with"
            " its config.json; its path is relative to the working directory or to the recipe"
        },
    )
    gguf_file: str | None = field(
        default=None,
        metadata={"help": "file in the model's folder, when the weights are in GGUF; they are de-quantized"},
    )
    tokenizer_name: str | None = field(default=None, metadata={"help": "tokenizer, when it is not the model's own"})
    model_revision: str = field(default="main", metadata={"help": "branch, tag or commit of the model on the Hub"})
    dtype: str = field(
        default="float32", metadata={"help": f"of the weights: {', '.join(get_args(Dtype))} (as stored)"}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "for example sdpa, eager, flash_attention_2"}
    )
    new_head: bool = field(
        default=False, metadata={"help": "start a new classification head, though the model has one for other labels"}
    )
    pickled_weights: bool = field(
        default=False,
        metadata={"help": "load weights that are not in safetensors, too: pickles such as pytorch_model.bin"},
    )
    trust_remote_code: bool = field(
        default=False,
        metadata={"help": "run code that comes with the model; a recipe cannot say this for you, it has to be typed"},
    )
    use_peft: bool = field(
        default=False, metadata={"help": "train LoRA adapters alone: instruction_tuning, preference_tuning"}
    )
    lora_r: int = field(default=16, metadata={"help": "rank of the adapters"})
    lora_alpha: int = field(default=32, metadata={"help": "what they add counts lora_alpha / lora_r times"})
    lora_dropout: float = field(default=0.05, metadata={"help": "dropout before the adapters, from 0 to below 1"})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "layers that get adapters, or all-linear; unset: those that PEFT knows to suit the model"},
    )

    def __post_init__(self) -> None:
        if self.dtype not in get_args(Dtype):
            raise ValueError(f"dtype is {self.dtype!r}; write one of {', '.join(get_args(Dtype))}")
        if self.attn_implementation is not None and "/" in self.attn_implementation and not self.trust_remote_code:
            raise ValueError(
                f"attn_implementation is {self.attn_implementation!r}: such a kernel is code from the Hub; type"
                " --trust_remote_code to run it, or write sdpa, eager or flash_attention_2"
            )
        if self.model_name_or_path is not None and self.config_name is not None:
            raise ValueError("write either model_name_or_path (its weights) or config_name (random weights), not both")
        for name in ("lora_r", "lora_alpha"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; write a whole number from 1, such as 16")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout is {self.lora_dropout}; write a number from 0 to below 1, such as 0.05")

    @property
    def starts_new_head(self) -> bool:
        """Whether the weights of the head are random: by themselves, or with all others."""
        return self.new_head or self.config_name is not None


class ModelShape(ModelArguments):
    """The same model without weights: its parameters have shapes, and take no memory."""


@dataclass(kw_only=True)
class DataArguments:
    """Which data."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "data set on the Hub; sklearn://digits are those that scikit-learn brings"}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "its configuration"})
    train_split: str = field(default="train", metadata={"help": "its split to train on"})
    validation_split: str | None = field(
        default=None, metadata={"help": "its split to evaluate on; unset: 'validation' if there is one"}
    )
    train_file: str | None = field(
        default=None,
        metadata={
            "help": "a file instead: .csv, .tsv, .json, .jsonl, .ndjson, .parquet, .txt, also .gz, .xz, .bz2;"
            " or a folder of images, in it one for each class;"
            " its path is relative to the working directory or to the recipe"
        },
    )
    validation_file: str | None = field(default=None, metadata={"help": "the same, to evaluate on"})
    validation_fraction: float | None = field(
        default=None, metadata={"help": "evaluate on this random share of the training data (0 to 1) instead"}
    )
    text_column: str = field(default="text", metadata={"help": "column with the text"})
    text_pair_column: str | None = field(
        default=None, metadata={"help": "classification of pairs: column with the second text"}
    )
    label_column: str = field(
        default="label", metadata={"help": "classification: column with the label, a name or an integer"}
    )
    prompt_column: str | None = field(
        default=None, metadata={"help": "language modeling, instructions, preferences: what the user says"}
    )
    answer_column: str | None = field(
        default=None, metadata={"help": "language modeling, instructions: what the model is to answer"}
    )
    messages_column: str | None = field(
        default=None,
        metadata={"help": "language modeling, instructions: whole conversations, lists of {role, content}"},
    )
    image_column: str = field(default="image", metadata={"help": "image classification: column with the image"})
    source_column: str = field(
        default="source",
        metadata={"help": "sequence to sequence: what is read; translation.en is a column inside a column"},
    )
    target_column: str = field(default="target", metadata={"help": "sequence to sequence: what is to be written"})
    source_prefix: str = field(
        default="", metadata={"help": "sequence to sequence: put before every source, such as 'summarize: ' for T5"}
    )
    max_source_length: int | None = field(
        default=None, metadata={"help": "sequence to sequence: max_length of sources"}
    )
    max_target_length: int | None = field(
        default=None, metadata={"help": "sequence to sequence: max_length of targets, also of those that are generated"}
    )
    words_column: str = field(default="words", metadata={"help": "token classification: column with lists of words"})
    tags_column: str = field(
        default="tags", metadata={"help": "token classification: column with lists of tags, names or integers"}
    )
    question_column: str = field(default="question", metadata={"help": "question answering: what is asked"})
    context_column: str = field(
        default="context", metadata={"help": "question answering: the text that has the answer"}
    )
    answers_column: str = field(
        default="answers",
        metadata={"help": "question answering: {text: [...], answer_start: [...]}, right answers and where they start"},
    )
    doc_stride: int = field(
        default=128, metadata={"help": "question answering: tokens that windows of a long context have in common"}
    )
    max_answer_length: int = field(
        default=30, metadata={"help": "question answering: look for no longer answer, in tokens"}
    )
    mlm_probability: float = field(
        default=0.15, metadata={"help": "masked language modeling: share of the tokens that is hidden"}
    )
    preparation: str | None = field(
        default=None,
        metadata={
            "help": "make the rows from others: tagged_words (words and tags from the text_column), glossary_questions"
            " (answers from a question_column with terms and a context_column with what they mean)"
        },
    )
    assistant_only_loss: bool = field(
        default=True, metadata={"help": "conversations: the loss is on what the assistant says, not on all of it"}
    )
    chosen_column: str | None = field(
        default=None,
        metadata={"help": "preferences: the better answer to prompt_column; or the whole conversation that ends in it"},
    )
    rejected_column: str | None = field(default=None, metadata={"help": "preferences: the worse one, as chosen_column"})
    rejected_from_other_rows: bool = field(
        default=False,
        metadata={"help": "preferences: instead, the worse one is the chosen answer of another row, of like length"},
    )
    query_column: str = field(default="query", metadata={"help": "embedding: what is looked for"})
    passage_column: str = field(default="passage", metadata={"help": "embedding: the text that is to be found"})
    similarity_scale: float = field(
        default=20.0, metadata={"help": "embedding: factor of the cosine similarities in the loss, 1 / temperature"}
    )
    max_length: int | None = field(
        default=None, metadata={"help": "cut rows after so many tokens; unset: after as many as the model can read"}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "use only the first so many rows"})
    max_eval_samples: int | None = field(default=None, metadata={"help": "use only the first so many rows"})
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "processes that tokenize"})

    def __post_init__(self) -> None:
        for name in (
            *("max_length", "max_source_length", "max_target_length", "doc_stride", "max_answer_length"),
            *("max_train_samples", "max_eval_samples", "preprocessing_num_workers"),
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; write a whole number from 1, or leave it out")
        if self.validation_fraction is not None and not 0 < self.validation_fraction < 1:
            raise ValueError(
                f"validation_fraction is {self.validation_fraction}; write a number between 0 and 1, such as 0.1"
            )
        if not 0 < self.mlm_probability < 1:
            raise ValueError(f"mlm_probability is {self.mlm_probability}; write a number between 0 and 1, such as 0.15")
        if not self.similarity_scale > 0:
            raise ValueError(f"similarity_scale is {self.similarity_scale}; write a number above 0, such as 20")
        self._check_sources()
        self._check_columns()

    def _check_sources(self) -> None:
        if (self.dataset_name is None) == (self.train_file is None):
            raise ValueError("write either dataset_name (a data set on the Hub) or train_file (a file of yours)")
        if self.validation_file is not None and self.train_file is None:
            raise ValueError("validation_file goes with train_file; for a data set on the Hub write validation_split")
        given = [
            n for n in ("validation_file", "validation_split", "validation_fraction") if getattr(self, n) is not None
        ]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} both say what to evaluate on; keep one of them")

    def _check_columns(self) -> None:
        if self.chosen_column is None and (self.prompt_column is None) != (self.answer_column is None):
            raise ValueError("prompt_column and answer_column go together; one of them is missing")
        if self.prompt_column is not None and self.messages_column is not None:
            raise ValueError("write either prompt_column and answer_column, or messages_column, not both")
