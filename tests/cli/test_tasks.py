"""What the tasks make of rows: labels, what the loss is on, what is cut."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoTokenizer, EvalPrediction, PreTrainedTokenizerFast, RobertaConfig

from hf_mbp.cli.arguments import DataArguments, ModelArguments
from hf_mbp.cli.errors import UserError
from hf_mbp.cli.metrics import cross_entropy
from hf_mbp.cli.models import load_config, load_tokenizer
from hf_mbp.cli.splits import Splits
from hf_mbp.cli.tasks import TASKS, find_task, text_classification
from hf_mbp.cli.tasks.base import TaskSetup
from hf_mbp.cli.tasks.language_modeling import encode_conversation
from hf_mbp.cli.tasks.preference_tuning import encode_pair
from tests.cli.conftest import SIZES, word_tokenizer

Prepared = Callable[..., TaskSetup]


def prepare(task: str, model: Path, train: Any, validation: Any = None, **options: Any) -> TaskSetup:
    def rows(given: Any) -> Dataset | None:
        return Dataset.from_list(given) if isinstance(given, list) else given

    model_options = {k: options.pop(k) for k in ("new_head",) if k in options}
    source = "config_name" if options.pop("random_weights", False) else "model_name_or_path"
    model_arguments = ModelArguments(**{source: str(model)}, **model_options)
    splits = Splits(train=rows(train), validation=rows(validation), train_origin="train.x", validation_origin="test.x")
    config = load_config(model_arguments)
    tokenizer = load_tokenizer(model_arguments, config)
    return TASKS[task](splits, tokenizer, config, model_arguments, DataArguments(train_file="train.x", **options))


def blank_tokenizer(scheme: str) -> PreTrainedTokenizerFast:
    """Of letters and a few words, each with the blank in front of it."""
    symbols = ["<unk>", "</s>", *"abehinorstu\u2581\n<>|", "\u2581a", "\u2581b", "\u2581h", "\u2581hi"]
    merges = [("\u2581", "a"), ("\u2581", "b"), ("\u2581", "h"), ("\u2581h", "i")]
    vocabulary = {symbol: index for index, symbol in enumerate(symbols)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")
    fast.chat_template = (
        "{% for m in messages %}{{ '<' + m['role'] + '>\n' + m['content'] + '</s>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<assistant>\n' }}{% endif %}"
    )
    return fast


def classify(model: Path, *labels: Any, validation: tuple[Any, ...] | None = None, **options: Any) -> TaskSetup:
    def rows(values: tuple[Any, ...]) -> list[dict[str, Any]]:
        return [{"text": "a " * (i + 1), "label": value} for i, value in enumerate(values)]

    return prepare("text_classification", model, rows(labels), validation and rows(validation), **options)


def test_unknown_task() -> None:
    with pytest.raises(UserError, match=f"task is 'chess'; write one of {', '.join(TASKS)}"):
        find_task("chess")


class TestTextClassification:
    @pytest.mark.parametrize(
        ("values", "names", "ids"),
        [
            (("spam", "ham", "spam"), ["ham", "spam"], [1, 0, 1]),
            ((0, 1, 0), ["0", "1"], [0, 1, 0]),
            ((10, 9, 10), ["9", "10"], [1, 0, 1]),  # by value, not as text
            ((True, False), ["False", "True"], [1, 0]),
        ],
    )
    def test_labels_get_ids_in_sorted_order(
        self, encoder: Path, values: tuple[Any, ...], names: list[str], ids: list[int]
    ) -> None:
        setup = classify(encoder, *values)
        assert [setup.model.config.id2label[i] for i in range(len(names))] == names
        assert setup.model.config.num_labels == len(names)
        assert setup.train["labels"][:] == ids

    def test_named_classes_of_a_data_set_keep_their_ids(self, encoder: Path) -> None:
        features = Features({"text": Value("string"), "label": ClassLabel(names=["z", "a", "never"])})
        rows = Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
        setup = prepare("text_classification", encoder, rows)
        assert setup.model.config.id2label == {0: "z", 1: "a", 2: "never"}
        assert setup.train["labels"][:] == [1, 0]

    def test_labels_are_told(self, encoder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """A typing error in a label makes a class of its own."""
        classify(encoder, "spam", "ham", "spam ")
        assert "labels: 3, those of the training data: 'ham', 'spam', 'spam '\n" in capsys.readouterr().out

    def test_unlabelled_rows_are_refused(self, encoder: Path) -> None:
        """Test sets on the Hub often have -1 for every label."""
        features = Features({"text": Value("string"), "label": ClassLabel(names=["z", "a"])})
        rows = Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
        hidden = Dataset.from_dict({"text": ["a"], "label": [-1]}, features=features)
        with pytest.raises(UserError, match=r"test.x, column 'label', has labels .* '-1'; known are 'z', 'a'"):
            prepare("text_classification", encoder, rows, hidden)

    def test_unknown_label_in_the_validation_set(self, encoder: Path) -> None:
        with pytest.raises(
            UserError,
            match=r"test.x, .* has labels that the training data does not have: 'egg'; known are 'ham', 'spam'",
        ):
            classify(encoder, "ham", "spam", validation=("ham", "egg"))

    @pytest.mark.parametrize(("value", "shown"), [(0.5, "0.5"), ([1], r"\[1\]")])
    def test_values_that_are_no_labels(self, encoder: Path, value: Any, shown: str) -> None:
        with pytest.raises(
            UserError, match=f"train.x, column 'label': {shown} is not a label; write names or integers"
        ):
            classify(encoder, value, value)

    def test_one_class_only(self, encoder: Path) -> None:
        with pytest.raises(UserError, match="all rows have the label 'ham'; nothing to tell apart"):
            classify(encoder, "ham", "ham")

    def test_a_trained_classifier_keeps_its_labels_unless_told_otherwise(self, encoder: Path, tmp_path: Path) -> None:
        first = classify(encoder, "ham", "spam")
        first.model.save_pretrained(tmp_path / "trained")
        AutoTokenizer.from_pretrained(encoder).save_pretrained(tmp_path / "trained")
        assert classify(tmp_path / "trained", "spam", "spam").train["labels"][:] == [1, 1]
        with pytest.raises(UserError, match=r"labels that the model .*new_head.* does not have: 'x', 'y', 'z'"):
            classify(tmp_path / "trained", "x", "y", "z")
        assert classify(tmp_path / "trained", "x", "y", "z", new_head=True).model.config.num_labels == 3

    def test_a_classifier_without_names_takes_ids(self, encoder: Path, tmp_path: Path) -> None:
        first = classify(encoder, "LABEL_0", "LABEL_1")
        first.model.save_pretrained(tmp_path / "trained")
        AutoTokenizer.from_pretrained(encoder).save_pretrained(tmp_path / "trained")
        assert classify(tmp_path / "trained", 1, 0).train["labels"][:] == [1, 0]
        with pytest.raises(UserError, match="does not have: '2'"):
            classify(tmp_path / "trained", 1, 2)

    @pytest.mark.parametrize("kind", ["regression", "multi_label_classification"])
    def test_what_a_model_was_trained_for_before_is_over(self, encoder: Path, tmp_path: Path, kind: str) -> None:
        """Its loss was another one, of numbers or of several labels a row."""
        first = classify(encoder, "ham", "spam").model
        first.config.problem_type = kind
        first.save_pretrained(tmp_path / "trained")
        AutoTokenizer.from_pretrained(encoder).save_pretrained(tmp_path / "trained")
        setup = classify(tmp_path / "trained", "x", "y", "z", new_head=True)
        batch = setup.collator([setup.train[i] for i in range(3)])
        outputs = setup.model.eval()(**batch)
        assert outputs.loss.item() == pytest.approx(cross_entropy(outputs.logits.detach().numpy(), np.arange(3)))

    def test_rows_are_cut_but_not_padded_and_the_user_is_told(
        self, encoder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        rows = [{"text": "a " * n, "label": n % 2} for n in (1, 5, 6, 9)]
        setup = prepare("text_classification", encoder, rows, rows, max_length=7)
        assert [len(ids) for ids in setup.train["input_ids"]] == [3, 7, 7, 7]
        assert all(ids[0] == 2 and ids[-1] == 3 for ids in setup.train["input_ids"])  # [CLS] and [SEP] stay
        assert setup.train.column_names == ["input_ids", "labels"]
        assert "train: 4 rows, tokens a row: median 7, longest 7; 2 rows cut after 7 tokens (max_length)" in (
            capsys.readouterr().out
        )
        assert setup.validation is not None
        assert [len(ids) for ids in setup.validation["input_ids"]] == [7, 7, 7, 3]  # longest first
        assert setup.validation["labels"][:] == [1, 0, 1, 1]

    def test_without_max_length_the_model_is_the_limit(self, encoder: Path) -> None:
        rows = [{"text": "a " * n, "label": n % 2} for n in (1, 100)]
        setup = prepare("text_classification", encoder, rows)
        assert [len(ids) for ids in setup.train["input_ids"]] == [3, 32]
        with pytest.raises(UserError, match="max_length is 33, but the model reads at most 32 tokens"):
            prepare("text_classification", encoder, rows, max_length=33)

    def test_pairs(self, encoder: Path) -> None:
        rows = [{"text": "a", "other": "b b", "label": n} for n in (0, 1)]
        setup = prepare("text_classification", encoder, rows, text_pair_column="other")
        assert setup.train["input_ids"][0] == [2, 6, 3, 7, 7, 3]

    def test_texts_must_be_text(self, encoder: Path) -> None:
        with pytest.raises(UserError, match="column 'text' must hold text, but has 3"):
            prepare("text_classification", encoder, [{"text": 3, "label": 0}, {"text": 4, "label": 1}])

    @pytest.mark.parametrize("column", ["text", "label"])
    def test_empty_cells_are_counted(self, encoder: Path, column: str) -> None:
        """Integers beside an empty cell are read as fractions, of which it would be said that they are no labels."""
        rows = [{"text": "a", "label": 0.0}, {"text": "b", "label": 1.0}, {"text": "c", "label": 1.0}]
        rows[1][column] = None
        with pytest.raises(
            UserError,
            match=rf"column '{column}' \(option {column}_column\): 1 of 3 rows are empty; fill them in",
        ):
            prepare("text_classification", encoder, rows)

    def test_empty_cells_in_rows_that_are_not_used_do_not_matter(self, encoder: Path) -> None:
        rows = Dataset.from_list(
            [{"text": "a", "label": "x"}, {"text": None, "label": "y"}, {"text": "c", "label": "y"}]
        )
        setup = prepare("text_classification", encoder, rows.select([0, 2]))
        assert len(setup.train) == 2

    def test_the_collator_pads_to_the_longest_of_the_group(self, encoder: Path) -> None:
        setup = classify(encoder, 0, 1, 0)
        batch = setup.collator([setup.train[0], setup.train[2]])
        assert batch["input_ids"].tolist() == [[2, 6, 3, 0, 0], [2, 6, 6, 6, 3]]
        assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1] * 5]
        assert batch["labels"].tolist() == [0, 0]

    def test_metrics(self) -> None:
        logits = np.array([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]], dtype=np.float32)
        labels = np.array([0, 1, 1])
        metrics = text_classification.compute_metrics(EvalPrediction(predictions=logits, label_ids=labels))
        expected = torch.nn.functional.cross_entropy(torch.tensor(logits), torch.tensor(labels)).item()
        assert metrics == pytest.approx({"accuracy": 2 / 3, "f1": 2 / 3, "mean_loss": expected})


def visible(setup: TaskSetup, tokenizer: Any, index: int = 0) -> tuple[str, str]:
    """What a row says, and what of it the loss is on."""
    row = setup.train[index]
    return tokenizer.decode(row["input_ids"]), tokenizer.decode([label for label in row["labels"] if label != -100])


class TestLanguageModeling:
    @pytest.fixture
    def tokenizer(self, chat_model: Path) -> Any:
        return AutoTokenizer.from_pretrained(chat_model)

    def test_the_loss_is_on_the_answer_alone_with_its_end(self, chat_model: Path, tokenizer: Any) -> None:
        rows = [{"q": "a b", "a": "c d e"}]
        setup = prepare("language_modeling", chat_model, rows, prompt_column="q", answer_column="a")
        said = "<|im_start|> user a b <|im_end|> <|im_start|> assistant c d e <|im_end|>"
        assert visible(setup, tokenizer) == (said, "c d e <|im_end|>")
        row = setup.train[0]
        # labels stand where their tokens are: the model shifts them
        assert all(label in (-100, token) for token, label in zip(row["input_ids"], row["labels"], strict=True))

    def test_padding_is_masked_by_position_not_by_token(self, chat_model: Path) -> None:
        """The end token pads, too; it must stay a label where it ends an answer."""
        rows = [{"q": "a", "a": "b"}, {"q": "a", "a": "b c d"}]
        setup = prepare("language_modeling", chat_model, rows, prompt_column="q", answer_column="a")
        batch = setup.collator([setup.train[0], setup.train[1]])
        end = setup.model.config.pad_token_id
        length = len(setup.train[0]["input_ids"])
        assert batch["input_ids"][0, length:].tolist() == [end, end]
        assert batch["labels"][0, length - 1 :].tolist() == [end, -100, -100]
        assert batch["attention_mask"][0].tolist() == [1] * length + [0, 0]

    def test_every_answer_of_a_conversation_is_learned(self, chat_model: Path, tokenizer: Any) -> None:
        messages = [
            {"role": role, "content": content}
            for role, content in [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
        ]
        rows = [{"messages": messages}]
        setup = prepare("language_modeling", chat_model, rows, messages_column="messages")
        text, learned = visible(setup, tokenizer)
        assert text == tokenizer.apply_chat_template(messages, tokenize=False).strip()
        assert learned == "b <|im_end|> d <|im_end|>"

    def test_plain_text_ends_with_the_end_token(self, chat_model: Path, tokenizer: Any) -> None:
        setup = prepare("language_modeling", chat_model, [{"text": "a b"}, {"text": "c"}])
        assert visible(setup, tokenizer) == ("a b <|im_end|>",) * 2

    def test_rows_are_cut_and_those_without_an_answer_left_are_dropped(
        self, chat_model: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
    ) -> None:
        rows = [{"q": "a", "a": "b c d"}, {"q": "a b c d e f", "a": "g"}, {"q": "a", "a": "b"}]
        setup = prepare("language_modeling", chat_model, rows, prompt_column="q", answer_column="a", max_length=8)
        assert [visible(setup, tokenizer, i)[1] for i in range(2)] == ["b c", "b <|im_end|>"]
        assert (
            "train: 2 rows, tokens a row: median 8, longest 8; 1 rows cut after 8 tokens (max_length);"
            " 1 rows left out, which have nothing to learn from within 8 tokens"
        ) in capsys.readouterr().out

    def test_nothing_to_learn_from(self, chat_model: Path) -> None:
        with pytest.raises(UserError, match="none of the 2 train rows has anything to learn from"):
            prepare("language_modeling", chat_model, [{"text": ""}, {"text": "  "}])

    def test_a_model_without_a_chat_template(self, encoder: Path) -> None:
        with pytest.raises(UserError, match="has no chat template for conversations"):
            prepare("language_modeling", encoder, [{"q": "a", "a": "b"}], prompt_column="q", answer_column="a")

    def test_a_template_that_rewrites_earlier_turns(self, tokenizer: Any) -> None:
        tokenizer.chat_template = "{{ messages | length }} {{ messages[-1]['content'] }}"
        messages = [{"role": role, "content": "a"} for role in ("user", "assistant", "user", "assistant")]
        with pytest.raises(UserError, match="chat template rewrites earlier messages"):
            encode_conversation(tokenizer, messages)

    @pytest.mark.parametrize(
        ("messages", "message"),
        [
            (None, "must be a list of {role, content}, but one is None"),
            ("hello", "must be a list of {role, content}, but one is 'hello'"),
            ([{"content": "a"}], "must be a list of {role, content}"),
            ([{"role": "assistant", "content": "a"}], "begins with the assistant"),
            ([{"role": "user", "content": 3}, {"role": "assistant", "content": "a"}], "template does not take .* 3"),
            ([{"role": "user", "content": "a"}, {"role": "assistant"}], "template does not take the conversation"),
        ],
    )
    def test_what_is_no_conversation(self, tokenizer: Any, messages: Any, message: str) -> None:
        with pytest.raises(UserError, match=message):
            encode_conversation(tokenizer, messages)

    @pytest.mark.parametrize("scheme", ["first", "always"])
    def test_tokenizers_that_begin_with_a_blank(self, scheme: str) -> None:
        """Llama's: it is in front of the conversation, and of no answer in it."""
        tokenizer = blank_tokenizer(scheme)
        contents = [("user", "a hi"), ("assistant", "hi b"), ("user", "b"), ("assistant", "a")]
        messages = [{"role": role, "content": content} for role, content in contents]
        ids, labels = encode_conversation(tokenizer, messages)
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
        learned = tokenizer.convert_ids_to_tokens([label for label in labels if label != -100])
        assert learned[:4] == ["h", "i", "\u2581b", "</s>"]
        better, worse = ([*messages[:3], {"role": "assistant", "content": content}] for content in ("hi", "a"))
        prompt, *answers = encode_pair(tokenizer, better, worse, "rows")
        begin = len(tokenizer.apply_chat_template(messages[:3], tokenize=False, add_generation_prompt=True))
        for answer, conversation in zip(answers, (better, worse), strict=True):
            whole = tokenizer.apply_chat_template(conversation, tokenize=False)
            assert prompt + answer == tokenizer(whole, add_special_tokens=False)["input_ids"]
            assert prompt == tokenizer(whole[:begin], add_special_tokens=False)["input_ids"]

    def test_what_the_template_itself_refuses(self, tokenizer: Any) -> None:
        tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
        messages = [{"role": role, "content": "a"} for role in ("user", "assistant")]
        with pytest.raises(UserError, match=r"does not take the conversation .*: roles must alternate"):
            encode_conversation(tokenizer, messages)

    def test_missing_columns(self, chat_model: Path) -> None:
        with pytest.raises(UserError, match=r"no column 'a' \(option answer_column\); its columns are q"):
            prepare("language_modeling", chat_model, [{"q": "a"}], prompt_column="q", answer_column="a")


def test_places_for_padding_are_none_for_tokens(tmp_path: Path) -> None:
    """RoBERTa's configuration counts both, and some tokenizers on the Hub know no limit."""
    word_tokenizer(pad_token="[PAD]").save_pretrained(tmp_path)
    RobertaConfig(vocab_size=99, max_position_embeddings=34, pad_token_id=1, **SIZES).save_pretrained(tmp_path)
    rows = [{"text": "a " * number, "label": number % 2} for number in (33, 40)]
    setup = prepare("text_classification", tmp_path, rows, random_weights=True)
    assert [len(ids) for ids in setup.train["input_ids"]] == [32, 32]
    setup.model(**setup.collator([setup.train[0]]))


def test_config_limits_the_tokenizer(chat_model: Path) -> None:
    """Tokenizers in GGUF files, and some on the Hub, know no limit."""
    arguments = ModelArguments(model_name_or_path=str(chat_model))
    config = AutoConfig.from_pretrained(chat_model)
    assert load_tokenizer(arguments, config).model_max_length == config.max_position_embeddings == 64
