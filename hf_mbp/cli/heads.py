"""What `hf-mbp estimate` can train a model for, when only its configuration is known."""

from collections.abc import Mapping

HEADS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "causal_lm": ("AutoModelForCausalLM", ("ForCausalLM", "LMHeadModel")),
    "masked_lm": ("AutoModelForMaskedLM", ("ForMaskedLM", "ForPreTraining")),
    "seq2seq_lm": ("AutoModelForSeq2SeqLM", ("ForConditionalGeneration",)),
    "sequence_classification": ("AutoModelForSequenceClassification", ("ForSequenceClassification",)),
    "token_classification": ("AutoModelForTokenClassification", ("ForTokenClassification",)),
    "question_answering": ("AutoModelForQuestionAnswering", ("ForQuestionAnswering",)),
    "multiple_choice": ("AutoModelForMultipleChoice", ("ForMultipleChoice",)),
    "image_classification": ("AutoModelForImageClassification", ("ForImageClassification",)),
}
"""What can be trained, by the class that makes it and the ends of the names under which checkpoints have it."""

USUAL_WIDTH = 512
"""Tokens that are assumed where nothing says how long the rows are."""
